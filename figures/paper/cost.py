"""What a plan costs, in steps, images and hours, and which data it lacks."""

from __future__ import annotations

from pathlib import Path

import torch

from cil import checkpoint, data, sweep, text
from cil.data import Dataset, ImageSet, Source
from cil.device import processor
from cil.dry_run import duration, estimate
from cil.run import Run
from cil.schedule import plan as phases_of
from cil.schedule import total_steps
from cil.sweep import Job
from cil.train import in_class_order, load_dataset
from figures.paper.plan import Work
from figures.paper.study import Study


def describe(work: Work, missing: list[tuple[str, Path]], to_train: list[Job], place: sweep.Place, device: str) -> str:
    """The plan: for each figure and table its runs, and the steps, images and hours that are still to be spent on them.

    missing, to_train: what `work` says of itself.
    """
    each = cost_of(to_train, work.study, place.threads, device)
    costs = {job.path: cost for job, cost in zip(to_train, each, strict=True)}
    rows = []
    for name in work.names:
        paths = {work.jobs[recipe, seed].path for recipe, seed, _ in work.of[name]}
        to_spend = [costs[path] for path in paths if path in costs]
        steps, images, seconds = (sum(part) for part in zip(*to_spend, strict=True)) if to_spend else (0, 0, 0.0)
        rows.append([name, f"{len(paths)}", f"{len(to_spend)}", f"{steps:,}", f"{images:,}", duration(seconds)])
    total = sum(seconds for *_, seconds in costs.values())
    at_once = max(1, min(place.workers, len(to_train)))
    to_measure = len({path for _, path in missing}) - len(to_train)
    words = f"{len(to_train)} runs to train (figures share them), {to_measure} trained ones to measure"
    header = [work.scale, "runs", "missing", "steps", "images", "one by one"]
    return text.block(
        f"The plan of {work.scale}:",
        text.table(header, rows),
        text.prose(f"{words}; training takes about {duration(total / at_once)} {place}"),
    )


def cost_of(jobs: list[Job], study: Study, threads: int, device: str) -> list[tuple[int, int, float]]:
    """(steps, images, seconds) of each run: at the pace of runs that are in the study and were trained on such a processor,
    or else of a few measured steps.

    Without the data, counts are those of the published sets, and images are made up; decoding of files is not counted.
    """
    paces, costs, here = {}, [], processor(device)
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
            costs.append((total_steps(phases), images, images * paces[kind]))
    finally:
        torch.set_num_threads(before)
    return costs


def nominal(run: Run) -> Dataset:
    """A stand-in with the published numbers of images, all of them one; data sets that come with the product are real."""
    published = source_of(run.dataset).nominal
    if published is None:
        return load_dataset(run)
    train, test, size = published
    one = torch.randint(256, (1, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def images(a_class: int) -> ImageSet:
        return ImageSet(one.expand(100 * a_class, -1, -1, -1), torch.arange(100).repeat_interleave(a_class))

    return Dataset(images(train), images(test), [str(c) for c in range(100)], data.CIFAR100_MEAN, data.CIFAR100_STD)


def lacking(jobs: list[Job]) -> list[str]:
    """For each data set that the jobs need and that is not there, what was looked for and how to get it."""
    words = []
    for run in {(job.run.dataset, job.run.image_size): job.run for job in jobs}.values():
        try:
            load_dataset(run)
        except ValueError as error:
            words.append(f"{error}\n{source_of(run.dataset).how_to_get}".rstrip())
    return words


def source_of(dataset: str) -> Source:
    """All that is to be said of a data set, `folder:PATH` among them."""
    return data.DATASETS[dataset.partition(":")[0]]
