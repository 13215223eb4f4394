"""The paper with one command: train what is missing, measure it, draw, judge, report. Interrupted, it goes on.

What is there is told by the study's tables alone (locality_probe.study): a run that is measured need not be kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cil import checkpoint, data, recipes
from cil.data import Dataset, ImageSet
from cil.device import processor
from cil.dry_run import duration, estimate
from cil.files import git_state
from cil.progress import counter
from cil.run import Run
from cil.schedule import plan as phases_of
from cil.schedule import total_steps
from cil.train import in_class_order, load_dataset
from figures import claims, paper, report
from locality_probe import sweep
from locality_probe.study import Measuring, Sizes, Study, measure_all
from locality_probe.sweep import Job

BOTH = ("baseline", "baseline-lpa")
FOUR = (*BOTH, "dytox", "dytox-lpa")


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
# Images of a class for training and testing, pixels: to plan without the data.
NOMINAL = {"cifar100": (500, 100, 32), "imagenet100": (1300, 50, 224)}
HOW_TO_GET = {
    "cifar100": "CIFAR-100: name its folder with --data, or fetch it: locality-probe train small-b10-10-baseline "
    "--data data --download",
    "imagenet100": "ImageNet-100: the first 100 synsets of ILSVRC-2012 as train/<wnid>/ and val/<wnid>/, from "
    "image-net.org; name their folder with --data",
}

Need = tuple[str, int, str]  # recipe, seed, kind of measurement


def needs(name: str) -> dict[str, list[Need]]:
    """What each figure and table of a scale rests on."""
    scale = SCALES[name]
    own = scale.tables[scale.first]
    seeds_of_twins = {"joint": scale.joint, "joint-as-long": scale.as_long, "joint-terminal": scale.terminal}

    def of(systems: Iterable[str], kinds: str, seeds: dict[str, int], setting: str = scale.first) -> list[Need]:
        start = "-".join(filter(None, (name, setting)))
        return [
            (f"{start}-{system}", seed, kind)
            for kind in kinds.split()
            for system in systems
            for base, training in [recipes.split(system)]
            for seed in range(min(seeds[base], seeds_of_twins.get(training, seeds)[base]))
        ]

    twins = {system: f"{system}-joint" for system in scale.joint}
    plain, pair = ["baseline", twins["baseline"]], [*BOTH, *(twins[s] for s in BOTH)]
    one, sweeps = dict.fromkeys(FOUR, 1), scale.sweep_seeds
    lambdas = [f"baseline-lambda-{value:g}" for value in scale.lambdas]
    layers = [f"baseline-nlpa-{n}" for n in range(recipes.SCALES[name]().depth)]
    tables = {
        kind: [need for setting, systems in scale.tables.items() if setting.startswith("imagenet") == (kind == "table2")
               for need in of(systems, "accuracy", systems, setting)]
        for kind in ("table1", "table2")
    }  # fmt: skip
    found = {
        "fig1": of([*BOTH, twins["baseline"]], "accuracy", own),
        "fig2": of(plain, "attention", one) + of(plain, "nonlocality", one),
        "fig3": of(plain, "attention", one),
        "fig4": of(plain, "nonlocality", own),
        "fig5": of(BOTH, "transfer nonlocality", own),
        "fig6": of(pair, "nonlocality", own),
        "fig7": of(BOTH, "spectrum", own),
        "fig8": of(lambdas, "accuracy", dict.fromkeys(lambdas, sweeps)),
        "fig9": of(layers, "accuracy", dict.fromkeys(layers, sweeps)),
        "gap": of([*twins, *twins.values()], "nonlocality", own),
        "steps": of([*pair, *(f"{system}-joint-as-long" for system in BOTH)], "nonlocality", own),
        "curves": tables["table1"] + tables["table2"] + of(twins.values(), "accuracy", own),
        **tables,
    }
    viewer = of(["baseline", twins["baseline"], "baseline-lpa"], "attention nonlocality", one)
    more = of([f"{system}-joint-terminal" for system in scale.terminal], "nonlocality accuracy", own)
    systems = [*scale.controls, *(f"{system}-joint-as-long" for system in scale.controls if system in scale.as_long)]
    more += of(systems, "nonlocality accuracy", scale.controls)
    more += [
        need
        for setting in scale.tables
        if scale.controls
        for need in of(BOTH, "nonlocality", scale.tables[setting], setting)
    ]
    # Whatever is measured of a run, its accuracy and its row of RUNS belong to it.
    found = {a: list(dict.fromkeys([*w, *((r, s, "accuracy") for r, s, _ in w)])) for a, w in found.items()}
    whole = list(dict.fromkeys(need for wanted in (*found.values(), viewer, more) for need in wanted))
    return found | {"claims": whole, "report": whole}


def jobs_of(wanted: Iterable[Need], out: Path, data_dir: str) -> dict[tuple[str, int], Job]:
    """(recipe, seed) -> the run that serves it: runs of equal settings are one, under the name that comes first."""
    same, found = {}, {}
    for recipe, seed in dict.fromkeys((recipe, seed) for recipe, seed, _ in wanted):
        run = recipes.find(recipe).change([f"data_dir={data_dir}"])
        (job,) = sweep.expand([recipe], [seed], [f"data_dir={data_dir}"], out)
        found[recipe, seed] = same.setdefault(replace(run, recipe="", seed=seed), job)
    return found


def all_jobs(scale: str, out: Path, data_dir: str) -> dict[tuple[str, int], Job]:
    """Of all that the scale has, so that a run has one name, whatever is asked for, and its turn."""
    jobs, order = jobs_of(needs(scale)["report"], out / "runs", data_dir), SCALES[scale].order

    def turn(job: Job) -> int:
        name = job.run.recipe.removeprefix(f"{scale}-")
        place = next((i for i, pattern in enumerate(order) if re.fullmatch(pattern, name)), len(order))
        return 1000 * place + job.run.seed if order else 0

    return {key: replace(job, turn=turn(job)) for key, job in jobs.items()}


def reproduce(
    scale: str, only: Iterable[str], out: Path, data_dir: str, device: str, place: sweep.Place, dry_run: bool = False,
    echo: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Everything that is missing of a scale, or of the figures and tables in `only`, into `out`.

    place: where runs are trained; device: of this machine, which measures them. out/runs: run directories; out/tables: the
    study; out/figures, out/report.html. Raises ValueError as `check` does, for data that are not there, and at the end for
    runs and measurements that failed.
    """
    check(scale, only)
    of, study = needs(scale), Study(out / "tables")
    names = list(only) or [*of]
    wanted = list(dict.fromkeys(need for name in names for need in of[name]))
    jobs = all_jobs(scale, out, data_dir)

    def missing() -> list[tuple[str, Path]]:
        done = study.done()
        all_ = dict.fromkeys((kind, jobs[recipe, seed].path) for recipe, seed, kind in wanted)
        return [(kind, path) for kind, path in all_ if (path.name, kind) not in done]

    def measure() -> list[str]:
        here = [(kind, path) for kind, path in missing() if is_finished(path)]
        if not here:
            return []
        echo(f"measuring: {len(here)} measurements of {len({path for _, path in here})} runs")
        # A cluster trains all runs at once; this machine measures as many as it has room for.
        workers = min(place.workers, sweep.choose_place("local", len(here), out, device, None, None, []).workers)
        with counter(len(here), "measurements") as shown:
            return measure_all(study, here, SCALES[scale].sizes, data_dir, device, workers, shown)

    to_do = missing()
    open_ = {path for _, path in to_do}
    to_train = [job for job in dict.fromkeys(jobs.values()) if job.path in open_ and not is_finished(job.path)]
    if not to_do and not dry_run and stamp(study, names) == read_stamp(out):
        echo(f"nothing to do: {out / 'report.html' if 'report' in names else out / 'figures'} is up to date")
        return
    echo(describe(scale, names, of, jobs, open_, to_train, study, place, device))
    absent = lacking(to_train)
    if dry_run:
        for words in absent:
            echo(f"data: {words}")
        return
    failed = measure()
    if absent:
        raise ValueError("\n".join(absent))
    if to_train:
        with Measuring(study, SCALES[scale].sizes, data_dir, device, 1) as measuring:

            def watch(finished: list[Job]) -> None:
                for kind, path in missing() if finished else []:
                    if path in {job.path for job in finished}:
                        measuring.ask(kind, path)
                measuring.collect()

            table = sweep.sweep(sweep.planned(to_train), place, out, watch)
        failed += measuring.failed
        failed += [f"{row.run}: {row.reason}" for row in table.itertuples() if row.state == "failed"]
    if (out / "tables/runs.csv").is_file():
        tables = paper.load(out / "tables")
        built = paper.build(tables, None if "report" in names else [n for n in names if n in paper.ARTIFACTS])
        judged = claims.judge(tables)
        paper.write({name: built[name] for name in names if name in built}, tables, out / "figures", echo)
        if "claims" in names:
            paper.write_claims(judged, out / "figures", echo)
        if "report" in names:
            echo(f"wrote {report.write(tables, built, judged, out / 'report.html')}")
    if failed:
        raise ValueError("\n".join(["not everything could be made; the same command tries again:", *failed]))
    (out / ".drawn").write_text(stamp(study, names))


def check(scale: str, only: Iterable[str]) -> None:
    """Raises ValueError for an unknown scale, and for a name that it has no figure or table for."""
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}; there are: {', '.join(SCALES)}")
    there = needs(scale)
    if unknown := [name for name in only if name not in there]:
        raise ValueError(f"no {unknown[0]!r} at scale {scale}; there are: {', '.join(there)}")


def is_finished(path: Path) -> bool:
    """Whether a run directory has all its tasks."""
    if not (path / "run.json").is_file():
        return False
    directory = checkpoint.open_run(path)
    return directory.tasks == directory.planned_tasks and directory.table("accuracy") is not None


def stamp(study: Study, names: list[str]) -> str:
    """What the drawings were made of: the measurements, what was asked for, the code."""
    measured = study.folder / "measurements.csv"
    content = measured.read_bytes() if measured.is_file() else b""
    return hashlib.sha256(content + json.dumps([names, git_state()]).encode()).hexdigest()


def read_stamp(out: Path) -> str:
    return (out / ".drawn").read_text() if (out / ".drawn").is_file() else ""


def lacking(jobs: list[Job]) -> list[str]:
    """For each data set that the jobs need and that is not there, what was looked for and how to get it."""
    found = []
    for run in {(job.run.dataset, job.run.image_size): job.run for job in jobs}.values():
        try:
            load_dataset(run)
        except ValueError as error:
            found.append(f"{error}\n{HOW_TO_GET.get(run.dataset, '')}".rstrip())
    return found


def describe(
    scale: str, names: list[str], of: dict[str, list[Need]], jobs: dict[tuple[str, int], Job], open_: set[Path],
    to_train: list[Job], study: Study, place: sweep.Place, device: str,
) -> str:  # fmt: skip
    """The plan: for each figure and table its runs, and the steps, images and hours that are still to be spent on them."""
    costs = {
        job.path: cost for job, cost in zip(to_train, cost_of(to_train, study, place.threads, device), strict=True)
    }
    lines = [f"{scale}: {'':<8} {'runs':>5} {'missing':>8} {'steps':>12} {'images':>14} {'one by one':>14}"]
    for name in names:
        paths = {jobs[recipe, seed].path for recipe, seed, _ in of[name]}
        mine = [costs[path] for path in paths if path in costs]
        steps, images, seconds = (sum(part) for part in zip(*mine, strict=True)) if mine else (0, 0, 0.0)
        lines.append(
            f"{name:<{len(scale) + 10}} {len(paths):>5} {len(mine):>8} {steps:>12,} {images:>14,} {duration(seconds):>14}"
        )
    total = sum(seconds for *_, seconds in costs.values())
    at_once = max(1, min(place.workers, len(to_train)))
    lines.append(
        f"{len(to_train)} runs to train (figures share them), {len(open_) - len(to_train)} trained ones to measure; "
        f"training takes about {duration(total / at_once)} {place}"
    )
    return "\n".join(lines)


def cost_of(jobs: list[Job], study: Study, threads: int, device: str) -> list[tuple[int, int, float]]:
    """(steps, images, seconds) of each run: at the pace of runs that are in the study and were trained on such a processor,
    or else of a few measured steps.

    Without the data, counts are those of the published sets, and images are made up; decoding of files is not counted.
    """
    paces, found, here = {}, [], processor(device)
    rows, before = study.read("runs.csv"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for job in jobs:
            run = job.run
            dataset = nominal(run)
            directory = checkpoint.describe(job.path, run, dataset)
            ordered = in_class_order(dataset, directory)
            phases = phases_of(directory, ordered)
            images = sum(phase.images_drawn for phase in phases)
            kind = run.dataset, run.method, run.training
            known = rows[(rows["method"] == run.method) & (rows["training"] == run.training) & (rows["device"] == here)]
            if kind not in paces and len(known):
                paces[kind] = known["seconds"].sum() / known["images"].sum()
            elif kind not in paces:
                paces[kind] = estimate(directory, ordered, phases, device) / images
            found.append((total_steps(phases), images, images * paces[kind]))
    finally:
        torch.set_num_threads(before)
    return found


def nominal(run: Run) -> Dataset:
    """A stand-in with the published numbers of images, all of them one; data sets that come with the product are real."""
    if run.dataset not in NOMINAL:
        return load_dataset(run)
    train, test, size = NOMINAL[run.dataset]
    one = torch.randint(256, (1, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def images(a_class: int) -> ImageSet:
        return ImageSet(one.expand(100 * a_class, -1, -1, -1), torch.arange(100).repeat_interleave(a_class))

    return Dataset(images(train), images(test), [str(c) for c in range(100)], data.CIFAR100_MEAN, data.CIFAR100_STD)
