"""Jobs: which runs a sweep is made of, where each is written, and how many steps it will take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cil import checkpoint, recipes
from cil.data import Dataset
from cil.run import Run
from cil.schedule import plan, total_steps
from cil.train import in_class_order, load_dataset


@dataclass(frozen=True)
class Job:
    """One run of a sweep and its place. tasks and steps are the planned ones; `problem` says why it cannot be run.

    turn: runs of a smaller one are started first, and of the same turn the longest first.
    """

    run: Run
    path: Path
    tasks: int = 0
    steps: int = 0
    problem: str = ""
    turn: int = 0

    @property
    def name(self) -> str:
        return self.path.name


def parse_seeds(text: str) -> list[int]:
    """'0,1,2' -> [0, 1, 2]. Raises ValueError for what is no seed, and for one that is given twice."""
    seeds = [int(word) if word.strip().isdecimal() and len(word) < 19 else -1 for word in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text[:60]} is no list of different whole numbers from 0, like 0,1,2")
    return seeds


def expand(names: list[str], seeds: list[int] | None, settings: list[str], out: Path) -> list[Job]:
    """Each recipe with each seed in out/BASE-sSEED[-TRAINING], like -joint, or without seeds in out/RECIPE.

    The kind of training stays last in the name, because that is how a run's joint twin is found.
    Raises ValueError for a recipe that is unknown or given twice, and for settings that do not fit.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"recipe {name} is given twice")
    for key in (setting.partition("=")[0] for setting in settings):
        if key in ("seed", "training", "recipe"):
            raise ValueError(f"--set {key} does not go with a sweep: there is --seeds, and NAME-joint is a recipe")
    jobs = []
    for name in names:
        run = recipes.find(name).change(settings)
        suffix = "" if run.training == "incremental" else f"-{run.training}"
        base = name.removesuffix(suffix)
        jobs += [Job(dataclasses.replace(run, seed=s), out / f"{base}-s{s}{suffix}") for s in seeds or []]
        jobs += [Job(run, out / name)] if seeds is None else []
    return jobs


def planned(jobs: list[Job]) -> list[Job]:
    """The jobs with their tasks and steps, or what is wrong with them; each data set is loaded once."""
    datasets: dict[tuple, Dataset] = {}
    found = []
    for job in jobs:
        key = (job.run.dataset, job.run.data_dir, job.run.image_size)
        try:
            datasets[key] = datasets.get(key) or load_dataset(job.run)
            directory = checkpoint.describe(job.path, job.run, datasets[key])
            steps = total_steps(plan(directory, in_class_order(datasets[key], directory)))
            found.append(dataclasses.replace(job, tasks=len(directory.planned_tasks), steps=steps))
        except ValueError as error:
            found.append(dataclasses.replace(job, problem=str(error)))
    return found
