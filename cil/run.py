"""Run: everything that one training needs, frozen, and the one door to randomness."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import re
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cil import augment
from cil.attention import ATTENTION
from cil.methods import METHODS

FORMAT = 4  # of run.json
# Settings by the format that brought them, and what a run of an earlier format was trained with.
ADDED: dict[int, dict[str, object]] = {
    2: {"positional_start": "local", "positional_frozen": False, "gate_init": 1.0, "checkpoints": ""},
    3: {"lpa_start": "local"},
    4: {
        "matmul": "ieee", "weights": "", "weights_sha256": "", "input_size": 0, "normalization": "dataset",
        "layer_decay": 1.0, "frozen_blocks": 0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training. Defaults are the paper's CIFAR-100 B10-10 baseline (protocol of arXiv 2304.06971, section 4)."""

    recipe: str = ""  # the name it was made from
    seed: int = 0
    # incremental | joint (per step: a fresh model on tasks 0..t) | joint-terminal (one on all classes) | joint-as-long (the
    # same for as many steps as the incremental run takes in all)
    training: str = "incremental"

    # data
    dataset: str = "cifar100"  # digits | cifar100 | imagenet100 | folder:PATH
    data_dir: str = "data"  # where cifar100 or imagenet100 lies
    image_size: int = 0  # pixels; 0: as the data set has it
    scenario: str = "B10-10"
    class_order: str = "icarl"  # icarl (CIFAR-100) | imagenet100 | alphabetical | reversed (alphabetical)
    num_classes: int = 0  # the first so many of the class order; 0: all
    images_per_class: int = 0  # training images; 0: all

    # model
    method: str = "baseline"  # baseline | dytox
    model: str = "convit"  # the paper's, or timm/NAME, of which what is marked (convit) says nothing
    global_pool: str = ""  # of a timm model: token | avg; empty: its own
    # What a timm model starts from: a file, hub (timm's own), or recipe:NAME, a run beside this one that is trained first.
    weights: str = ""  # empty: from scratch
    weights_sha256: str = ""  # of that file; known once the run is begun
    input_size: int = 0  # pixels to which a timm model scales its images; 0: as they are
    normalization: str = (
        "dataset"  # dataset | model: mean and standard deviation of the pixels that a timm model was trained with
    )
    layer_decay: float = 1.0  # learning rate of a timm model's layer over that of the next deeper one
    frozen_blocks: int = 0  # of a timm model, from the shallow end, with the patch embedding: never trained
    dim: int = 384  # (convit), like all that follows up to extra_heads, but for patch_size and drop_path
    num_heads: int = 12
    depth: int = 6  # depth - 1 self-attention blocks and one task-attention block
    patch_size: int = 4
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    init_std: float = (
        0.02  # of linear layers, tokens and position embedding; networks narrower than the paper's want more
    )
    attention: str = "gpsa"  # gpsa | mhsa: the self-attention blocks that are not LPA
    n_lpa: int = 0  # LPA blocks, from the shallow end; in a timm model cil.attention.localize puts LPA into them
    lpa_start: str = (
        "local"  # local | content: of a timm model's LPA blocks, which then begin as they would without LPA
    )
    locality_strength: float = 1.0
    positional_start: str = (
        "local"  # local | random: GPSA's w and LPA's v of every head, with the spread of the local ones
    )
    positional_frozen: bool = False  # w of GPSA and v of LPA stay as they start
    gate_init: float = 1.0  # of GPSA: the share of positional attention starts at its sigmoid
    lambda_init: float = 0.02
    lambda_init_mode: str = "constant"  # constant (paper) | normal (released code)
    extra_heads: str = "random"  # random | uniform: heads beyond the K x K that have an offset

    # optimisation
    epochs_first: int = 500
    epochs: int = 600
    cosine_epochs_first: int = 0  # length of task 0's schedule, which its epochs may cut short; 0: epochs_first
    schedule_late: bool = False  # every epoch has the learning rate of the one before
    batch_size: int = 256
    lr_first: float = 2.5e-4
    lr: float = 4e-4
    lr_min: float = 1e-5
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    weight_decay: float = 1e-6
    finetune_epochs: int = 20
    finetune_lr: float = 5e-5
    amp: str = "none"  # none | bf16
    matmul: str = "ieee"  # ieee | tf32: products of float32 on CUDA, tf32 with 10 bits of precision
    eval_amp: str = "none"  # none | bf16 | fp16: precision of predictions
    # Steps that a network has taken, like 0,10,30,100: its weights are kept then, too, and are measured. Changes no number.
    checkpoints: str = ""
    frozen_eval: bool = True  # frozen modules are in eval mode, without stochastic depth

    # augmentation
    crop_padding: int = 4
    flip: bool = True
    rand_augment: str = "rand-m9-mstd0.5-inc1"  # empty: none
    mixup: float = 0.8
    smoothing: float = 0.1
    repeats: int = 1  # repeated augmentation: an epoch of n images shows n / repeats of them, so many times each

    # against forgetting
    memory: int = 2000  # exemplars in all
    memory_mode: str = "shared"  # shared | per-process:W, emulated: W processes with a memory each, of that size
    herding_crop: bool = False  # training's random crop in the images that herding compares
    kd: bool = True
    kd_tau: float = 1.0
    kd_rows: str = "old"  # old (LPA release: rows whose own label is of an old task) | all (DyTox)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), CHOICES.get(field.name)
            if choices and value not in choices:
                raise ValueError(
                    f"{field.name}={_short(value)} is none of {', '.join(c or 'nothing' for c in choices)}"
                )
        for names, (least, most, *words) in RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                if not least <= value <= most:  # a NaN is in no range
                    range_ = words[0] if words else f"at least {least:g} and at most {most:g}"
                    raise ValueError(f"{name}={_short(value)} must be {range_}")
        weights = self.depth * self.dim**2 * (4 + 2 * self.mlp_ratio) if self.model == "convit" else 0
        if weights > MOST_WEIGHTS:
            raise ValueError(
                f"dim={self.dim}, depth={self.depth} and mlp_ratio={self.mlp_ratio:g} make a network of {weights:.1g} weights; "
                f"at most {MOST_WEIGHTS:g} are built"
            )
        if self.rand_augment:
            augment.parse(self.rand_augment)
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}")
        if self.depth < 2:
            raise ValueError(
                f"depth={self.depth} must be at least 2: self-attention blocks and one task-attention block"
            )
        if self.attention == "lpa":
            raise ValueError("attention='lpa' is what n_lpa is for: the number of LPA blocks, from the shallow end")
        self.memories, self.checkpoint_steps  # noqa: B018 - say what is wrong with memory_mode and checkpoints
        if self.model != "convit" and not self.model.startswith("timm/"):
            raise ValueError(f"model={self.model!r} is neither convit nor of the form timm/NAME")
        if self.model != "convit" and self.method != "baseline":
            raise ValueError(f"model={self.model} goes with method=baseline: it has no task attention")
        timms = [f"{name}={getattr(self, name)}" for name in OF_TIMM if getattr(self, name) != OF_TIMM[name]]
        if self.model == "convit" and timms:
            raise ValueError(f"for timm models alone, like model=timm/vit_base_patch16_224: {', '.join(timms)}")
        if self.weights_sha256 and not self.weights:
            raise ValueError("weights_sha256 goes with weights")
        if self.lpa_start != "local" and (self.model == "convit" or not self.n_lpa):
            raise ValueError(f"lpa_start={self.lpa_start} is for timm models with n_lpa of at least 1")
        if self.positional_start != "local" and self.model != "convit":
            raise ValueError(f"positional_start={self.positional_start} is for convit; lpa_start is for timm models")
        positional = self.positional_start, self.positional_frozen
        local = self.n_lpa or (self.model == "convit" and self.attention == "gpsa")
        if positional != ("local", False) and not local:
            raise ValueError(
                "positional_start and positional_frozen are for networks with GPSA or LPA, and this has neither"
            )
        if self.gate_init != 1 and (self.model != "convit" or self.attention != "gpsa" or self.n_lpa == self.depth - 1):
            raise ValueError(f"gate_init={self.gate_init} is for networks with GPSA, and this has none")
        if self.model == "convit" and self.global_pool:
            raise ValueError(f"global_pool={self.global_pool} is for timm models; convit has tokens")
        if 0 < self.cosine_epochs_first < self.epochs_first:
            raise ValueError(
                f"cosine_epochs_first={self.cosine_epochs_first} is less than epochs_first={self.epochs_first}"
            )
        if self.model == "convit" and self.n_lpa > self.depth - 1:
            raise ValueError(
                f"n_lpa={self.n_lpa} is more than the {self.depth - 1} self-attention blocks of depth={self.depth}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], format: int = FORMAT) -> Run:
        """The inverse of `to_dict`. A setting that came after `format` is what it was before it was one (ADDED); nothing
        else is silently defaulted.

        Raises ValueError for a missing or unknown key and a value of another type.
        """
        before: dict[str, Any] = {k: v for since, added in ADDED.items() if since > format for k, v in added.items()}
        values = before | values
        names = [f.name for f in dataclasses.fields(cls)]
        missing, unknown = [n for n in names if n not in values], [n for n in values if n not in names]
        if missing or unknown:
            raise ValueError(
                f"the run lacks {missing} and has the unknown {unknown}: it was written by another version"
            )
        for name, kind in typing.get_type_hints(cls).items():
            fits = type(values[name]) is kind or (kind is float and type(values[name]) is int)
            if not fits:
                raise ValueError(f"{name}={_short(values[name])} is not of type {kind.__name__}")
        return cls(**values)

    def change(self, settings: list[str]) -> Run:
        """This run with `key=value` settings, parsed to the type of the field. Raises ValueError naming what is near."""
        types = typing.get_type_hints(type(self))
        changes: dict[str, Any] = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            key = key.replace(".", "_").replace("-", "_")
            if not equals:
                raise ValueError(f"{setting!r} is not key=value")
            if key not in types:
                near = difflib.get_close_matches(key, types, n=3, cutoff=0.5)
                raise ValueError(f"no setting {key!r}; near: {', '.join(near)}" if near else
                                 f"no setting {key!r}; there are: {', '.join(types)}")  # fmt: skip
            changes[key] = _parse(key, text, types[key])
        return dataclasses.replace(self, **changes)

    @property
    def memories(self) -> int:
        """How many processes are emulated that keep a memory each; 1 is one memory shared by all there are."""
        match = re.fullmatch(r"per-process:([1-9]\d{0,5})", self.memory_mode)
        if not match and self.memory_mode != "shared":
            raise ValueError(
                f"memory_mode={_short(self.memory_mode)} is neither shared nor per-process:W, like per-process:2"
            )
        if match and self.batch_size % int(match[1]):
            raise ValueError(f"memory_mode={self.memory_mode} does not divide batch_size={self.batch_size}")
        return int(match[1]) if match else 1

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """`checkpoints` as numbers of steps, ascending."""
        words = self.checkpoints.split(",") if self.checkpoints else []
        steps = [int(word) if re.fullmatch(r"\d{1,9}", word) else -1 for word in words]
        if -1 in steps or steps != sorted(set(steps)):
            raise ValueError(
                f"checkpoints={self.checkpoints!r} is no list of ascending numbers of steps, like 0,10,100"
            )
        return tuple(steps)

    def joint(self, training: str = "joint") -> Run:
        """The joint-learning counterpart: same everything but `training`."""
        return dataclasses.replace(self, training=training)

    def differences(self, other: Run, free: Collection[str] = ()) -> dict[str, tuple[object, object]]:
        """Settings in which the two differ, less those in `free` and those that change no number: name -> (mine, other's)."""
        # The same weights may lie elsewhere; before a run is begun, where they lie is all that is known of them.
        known = self.weights_sha256 and other.weights_sha256
        free = {*free, *CHANGE_NOTHING, "weights" if known else "weights_sha256"}
        names = [f.name for f in dataclasses.fields(self) if f.name not in free]
        both = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in both.items() if pair[0] != pair[1]}

    def without(self, free: Collection[str]) -> Run:
        """This run with the settings in `free`, and those that change no number, at their defaults: runs that differ in
        nothing else are then equal."""
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: defaults[name] for name in (*free, *CHANGE_NOTHING)})

    def is_twin_of(self, other: Run) -> bool:
        """Whether the two are equal in everything that the science depends on, except `training`."""
        return not self.differences(other, {"training"})


CHANGE_NOTHING = ("recipe", "data_dir", "checkpoints")  # settings that no number of training depends on
OF_TIMM = {  # settings that are for timm models alone, and what they are for others
    "weights": "", "input_size": 0, "normalization": "dataset", "layer_decay": 1.0, "frozen_blocks": 0,
}  # fmt: skip
CHOICES = {
    "training": ("incremental", "joint", "joint-terminal", "joint-as-long"),
    "class_order": ("icarl", "imagenet100", "alphabetical", "reversed"),
    "normalization": ("dataset", "model"),
    "method": METHODS,
    "attention": ATTENTION,
    "positional_start": ("local", "random"),
    "lpa_start": ("local", "content"),
    "lambda_init_mode": ("constant", "normal"),
    "extra_heads": ("random", "uniform"),
    "global_pool": ("", "token", "avg"),
    "amp": ("none", "bf16"),
    "matmul": ("ieee", "tf32"),
    "eval_amp": ("none", "bf16", "fp16"),
    "kd_rows": ("old", "all"),
}
# Fields -> the least and the most that they may be, both included; in words where those say it better. More than the most is
# a slip of the finger, and would fill the memory.
RANGES: dict[str, tuple] = {
    "epochs_first epochs": (1, 100_000),
    "warmup_epochs finetune_epochs cosine_epochs_first": (0, 100_000),
    "batch_size": (1, 1_000_000), "repeats": (1, 1000), "crop_padding": (0, 1000), "seed": (0, 2**63 - 1),
    "dim": (1, 65_536), "num_heads": (1, 4096), "depth": (0, 1000), "n_lpa": (0, 1000), "patch_size": (1, 10_000),
    "image_size input_size": (0, 10_000), "frozen_blocks": (0, 1000), "layer_decay": (1e-6, 1),
    "num_classes": (0, 1_000_000), "images_per_class": (0, 10**9), "memory": (0, 10**9),
    "mixup": (0, 1000), "weight_decay lr_min warmup_lr locality_strength": (0, 1e6),
    "lr_first lr finetune_lr kd_tau": (1e-30, 1e30, "above 0 and finite"),
    "mlp_ratio": (1e-3, 1000), "init_std": (1e-9, 1000),
    "drop_path smoothing": (0, 1 - 1e-9, "at least 0 and below 1"),
    "lambda_init gate_init": (-1e6, 1e6, "finite, and between -1e6 and 1e6"),
}  # fmt: skip
MOST_WEIGHTS = 5e9  # of a network that is built


def _parse(key: str, text: str, kind: type) -> object:
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError(f"{key}={text!r} is neither true nor false")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}={_short(text)} is not of type {kind.__name__}") from None


def _short(value: object) -> str:
    """A value for a message: in one line, and not longer than one reads."""
    try:
        text = repr(value) if isinstance(value, str) and value else str(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


@contextlib.contextmanager
def randomness(seed: int, *where: object) -> Iterator[torch.Generator]:
    """Every random draw of a run happens inside one of these, named for its place: `randomness(seed, task, phase, epoch)`.

    Torch's generators of the CPU and of the current GPU are seeded for the body and come back as they were; those of other
    GPUs, with which a process among several has nothing to do, are not touched. Because a place names its stream, a run
    that goes on after an interruption needs no generator state.
    """
    digest = hashlib.sha256(repr((seed, *where)).encode()).digest()
    stream = int.from_bytes(digest[:8], "big")
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.default_generator.manual_seed(stream)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(stream)
        yield torch.default_generator
