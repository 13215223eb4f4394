"""The plan of a scale: which measurements of which runs each figure and table rests on, the jobs that train the runs,
and what of it is still missing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cil import checkpoint, recipes, sweep
from cil.files import git_state
from cil.run import Run
from cil.sweep import Job
from figures.paper.artifacts import ARTIFACTS, planned_order
from figures.paper.scales import BOTH, SCALES, RunKey, Runs
from figures.paper.study import Study

Need = tuple[str, int, str]  # recipe, seed, kind of measurement


def needs(name: str) -> dict[str, list[Need]]:
    """What each figure and table of a scale rests on, and the claims and the report: on all of it, and on some runs more."""
    runs = Runs(name)
    wanted = {artifact: ARTIFACTS[artifact].planned(name) for artifact in planned_order()}
    whole = [need for of_artifact in wanted.values() for need in of_artifact]
    whole = list(dict.fromkeys([*whole, *of_viewer(runs), *of_claims(runs)]))
    return wanted | {"claims": whole, "report": whole}


def of_viewer(runs: Runs) -> list[Need]:
    """What the report's viewer of attention shows: one run of the baseline, of its joint twin and of the baseline with LPA."""
    return _measured(runs.one_of(["baseline", runs.twins["baseline"], "baseline-lpa"]), "attention", "nonlocality")


def of_claims(runs: Runs) -> list[Need]:
    """What only the claims rest on: joint training on all classes at once, controls, and D_loc in further settings."""
    scale = runs.scale
    terminal = runs.of(f"{system}-joint-terminal" for system in scale.terminal)
    as_long = [f"{system}-joint-as-long" for system in scale.controls if system in scale.as_long]
    controls = runs.of([*scale.controls, *as_long], scale.controls)
    further = [
        key for setting, seeds in scale.tables.items() if scale.controls for key in runs.of(BOTH, seeds, setting)
    ]
    return [
        *_measured(terminal, "nonlocality", "accuracy"), *_measured(controls, "nonlocality", "accuracy"),
        *_measured(further, "nonlocality"),
    ]  # fmt: skip


def _measured(keys: list[RunKey], *kinds: str) -> list[Need]:
    return [(*key, kind) for kind in kinds for key in keys]


def jobs_of(wanted: Iterable[Need], out: Path, data_dir: str) -> dict[RunKey, Job]:
    """(recipe, seed) -> the run that serves it: runs of equal settings are one, under the name that comes first."""
    same: dict[Run, Job] = {}
    jobs = {}
    for recipe, seed in dict.fromkeys((recipe, seed) for recipe, seed, _ in wanted):
        run = recipes.find(recipe).change([f"data_dir={data_dir}"])
        (job,) = sweep.expand([recipe], [seed], [f"data_dir={data_dir}"], out)
        jobs[recipe, seed] = same.setdefault(replace(run, recipe="", seed=seed), job)
    return jobs


def all_jobs(scale: str, out: Path, data_dir: str) -> dict[RunKey, Job]:
    """Of all that the scale has, so that a run has one name, whatever is asked for, and its turn."""
    jobs, order = jobs_of(needs(scale)["report"], out / "runs", data_dir), SCALES[scale].order

    def turn(job: Job) -> int:
        name = job.run.recipe.removeprefix(f"{scale}-")
        place = next((i for i, pattern in enumerate(order) if re.fullmatch(pattern, name)), len(order))
        return 1000 * place + job.run.seed if order else 0

    return {key: replace(job, turn=turn(job)) for key, job in jobs.items()}


def check(scale: str, only: Iterable[str]) -> None:
    """Raises ValueError for an unknown scale, and for a name that it has no figure or table for."""
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}; there are: {', '.join(SCALES)}")
    there = needs(scale)
    if unknown := [name for name in only if name not in there]:
        raise ValueError(f"no {unknown[0]!r} at scale {scale}; there are: {', '.join(there)}")


@dataclass(frozen=True)
class Work:
    """What was asked for: `names` of figures and tables at a scale, into `out`.

    of: name -> what it rests on; jobs: the run that serves each recipe and seed of the scale.
    """

    scale: str
    names: list[str]
    out: Path
    data_dir: str
    of: dict[str, list[Need]]
    jobs: dict[RunKey, Job]
    study: Study

    def missing(self) -> list[tuple[str, Path]]:
        """(kind, run directory) of each measurement that was asked for and is not in the study yet."""
        done = self.study.done()
        needed = dict.fromkeys(need for name in self.names for need in self.of[name])
        measurements = dict.fromkeys((kind, self.jobs[recipe, seed].path) for recipe, seed, kind in needed)
        return [(kind, path) for kind, path in measurements if (path.name, kind) not in done]

    def to_train(self) -> list[Job]:
        """The runs that lack a measurement and are not finished."""
        still_open = {path for _, path in self.missing()}
        return [
            job for job in dict.fromkeys(self.jobs.values()) if job.path in still_open and not is_finished(job.path)
        ]

    def stamp(self) -> str:
        """What the drawings are made of: the measurements, what was asked for, the code."""
        measured = self.study.folder / "measurements.csv"
        content = measured.read_bytes() if measured.is_file() else b""
        return hashlib.sha256(content + json.dumps([self.names, git_state()]).encode()).hexdigest()


def plan_work(scale: str, only: list[str], out: Path, data_dir: str) -> Work:
    """The work of the names in `only`, or of everything that the scale has."""
    of = needs(scale)
    return Work(scale, only or [*of], out, data_dir, of, all_jobs(scale, out, data_dir), Study(out / "tables"))


def is_finished(path: Path) -> bool:
    """Whether a run directory has all its tasks."""
    return (path / "run.json").is_file() and checkpoint.open_run(path).finished
