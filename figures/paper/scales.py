"""What each scale of the paper trains: its systems, seeds and sweeps, and the names of their runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cil import recipes
from figures.paper.study import Sizes

BOTH = ("baseline", "baseline-lpa")
FOUR = (*BOTH, "dytox", "dytox-lpa")
RunKey = tuple[str, int]  # recipe, seed


@dataclass(frozen=True)
class Scale:
    """What a scale trains: seeds of each system in each setting, the first of which is the one that is measured.

    order: patterns of recipe names in the order in which their runs are started, seed by seed; without any, the longest
    come first.
    """

    tables: dict[str, dict[str, int]]  # setting -> system -> number of seeds
    joint: dict[str, int]  # systems with a joint twin in the first setting -> number of seeds
    as_long: dict[str, int]  # systems with a joint twin there that takes as many steps as CIL -> number of seeds
    lambdas: tuple[float, ...] = recipes.LAMBDAS
    sweep_seeds: int = 1
    sizes: Sizes = field(default_factory=Sizes)
    terminal: dict[str, int] = field(default_factory=dict)  # with a joint twin there on all classes at once
    controls: dict[str, int] = field(default_factory=dict)  # further systems there -> number of seeds
    order: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        return next(iter(self.tables))


CIFAR, IMAGENET = (
    [f"{before}{s.lower()}" for s in recipes.SCENARIOS[kind]]
    for kind, before in (("cifar", ""), ("imagenet", "imagenet-"))
)
SCALES = {
    "demo": Scale(
        {"": dict.fromkeys(BOTH, 2) | dict.fromkeys(FOUR[2:], 1)}, dict.fromkeys(BOTH, 1), dict.fromkeys(BOTH, 1),
        (0.002, 0.02, 1.0), sizes=Sizes(128, None, (30, 20)),
    ),
    "learned": Scale(
        {"b2-2": dict.fromkeys(BOTH, 8) | dict.fromkeys(FOUR[2:], 4), "b6-2": dict.fromkeys(BOTH, 4),
         "b2-2-alphabetical": dict.fromkeys(BOTH, 3)},
        dict.fromkeys(BOTH, 2), dict.fromkeys(BOTH, 8) | {"baseline-mhsa": 5}, (0.002, 0.02, 0.2, 1.0), sweep_seeds=4,
        terminal=dict.fromkeys(BOTH, 8), controls={name: 5 if name == "baseline-mhsa" else 4 for name in recipes.CONTROLS},
        sizes=Sizes(256, None, (100, 100)),
        order=(
            r"b2-2-baseline(-lpa)?(-joint-as-long|-joint-terminal)?", r"b2-2-baseline(-lpa)?-joint", r".*-mhsa(-.*)?",
            r".*-(gate|frozen|random)", r".*-(lambda|nlpa)-.*", r"b6-2-.*", r"b2-2-dytox.*", r"b2-2-alphabetical-.*",
        ),
    ),
    "small": Scale(
        {CIFAR[0]: dict.fromkeys(FOUR, 3)} | {setting: dict.fromkeys(BOTH, 1) for setting in CIFAR[1:]},
        dict.fromkeys(FOUR, 3), dict.fromkeys(BOTH, 3),
    ),
    "paper": Scale(
        {setting: dict.fromkeys(FOUR, 3) for setting in (*CIFAR, *IMAGENET)}, dict.fromkeys(FOUR, 3),
        dict.fromkeys(BOTH, 3), sweep_seeds=3,
    ),
}  # fmt: skip


class Runs:
    """The runs of a scale, as artifacts ask for them. Systems are named as in recipes: baseline-lpa, baseline-joint ...

    own: system -> its number of seeds in the first setting. twins: system -> its twin of joint training task by task.
    """

    def __init__(self, name: str):
        self.name, self.scale = name, SCALES[name]
        self.own = self.scale.tables[self.scale.first]
        self.twins = {system: f"{system}-joint" for system in self.scale.joint}
        self._seeds_of_twins = {
            "joint": self.scale.joint, "joint-as-long": self.scale.as_long, "joint-terminal": self.scale.terminal,
        }  # fmt: skip

    def of(
        self, systems: Iterable[str], seeds: dict[str, int] | None = None, setting: str | None = None
    ) -> list[RunKey]:
        """(recipe, seed) of each system, of its seeds 0, 1, 2 ...

        seeds: system without its joint training -> number of seeds; by default `own`. A joint twin has at most as many as the
        scale gives it. setting: by default the scale's first.
        """
        start = "-".join(filter(None, (self.name, self.scale.first if setting is None else setting)))
        keys = []
        for system in systems:
            base, training = recipes.split(system)
            wanted = (self.own if seeds is None else seeds)[base]
            there = self._seeds_of_twins.get(training, {base: wanted})[base]
            keys += [(f"{start}-{system}", seed) for seed in range(min(wanted, there))]
        return keys

    def one_of(self, systems: Iterable[str]) -> list[RunKey]:
        """The run of seed 0 of each system in the first setting."""
        return self.of(systems, dict.fromkeys(FOUR, 1))

    def of_tables(self, imagenet: bool) -> list[RunKey]:
        """All systems in all settings on CIFAR-100, its cuts and digits, or on ImageNet-100."""
        return [
            key
            for setting, systems in self.scale.tables.items()
            if setting.startswith("imagenet") == imagenet
            for key in self.of(systems, systems, setting)
        ]

    def sweep(self, systems: Iterable[str]) -> list[RunKey]:
        """The systems of a sweep, with as many seeds as the scale gives sweeps."""
        systems = list(systems)
        return self.of(systems, dict.fromkeys(systems, self.scale.sweep_seeds))

    @property
    def depth(self) -> int:
        """Blocks of the networks of this scale, the class-attention block among them."""
        return recipes.SCALES[self.name]().depth
