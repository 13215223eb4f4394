"""train(run, out): class after class, read from top to bottom."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from cil import augment, checkpoint, data, draws, parallel, start
from cil.checkpoint import RunDir
from cil.data import Dataset
from cil.device import repeatable
from cil.evaluate import accuracy_rows, batch_size
from cil.fit import fit
from cil.memory import budget_per_class, remember
from cil.models import Incremental, pretrained_config
from cil.opened import check_memory
from cil.run import Run, randomness
from cil.scenario import relabel
from cil.schedule import exemplars, finetune_phase, joint_phase, main_phase, remarks, with_memory
from cil.session import Report, Session


def train(
    run: Run, out: str | Path, device: str = "cpu", report: Report = lambda progress: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> RunDir:  # fmt: skip
    """Train `run` into the directory `out`, or go on with it where it was; a finished run returns at once.

    warn: is told what is odd about a run that is begun. Under torchrun (parallel.processes), all processes call this. Raises
    ValueError for a run that does not fit its data, or an `out` that holds something else or that another process trains in.
    """
    dataset, session = load_dataset(run), Session(device, report)
    run, weights = start.settle(run, Path(out), lambda other, there: train(other, there, device, report, warn))
    directory = parallel.once(checkpoint.create, out, run, dataset, device, weights)
    dataset = in_class_order(dataset, directory).to(device)
    with repeatable(device, run.matmul), session.interruptible(), contextlib.ExitStack() as locked:
        parallel.once(locked.enter_context, directory.lock())
        finished = directory.tasks
        if not finished and not directory.resume_folder.exists():
            for sentence in remarks(directory, dataset):
                warn(sentence)
        if finished:
            directory.written("accuracy")
        model = None
        for task in (task for task in directory.planned_tasks if task not in finished):
            if run.training == "incremental":
                if task:
                    check_memory(directory, task - 1, dataset.train.labels)
                before = directory.model(task - 1).to(device) if task and task - 1 in finished else model
                model = learn_increment(directory, dataset, before, task, session)
            else:
                model = learn_jointly(directory, dataset, task, session)
            rows = accuracy_rows(
                model, dataset.test, directory.scenario, task, dataset.mean, dataset.std, device, run.eval_amp
            )
            parallel.once(finish_task, directory, task, model, rows)
    return directory


def learn_increment(
    directory: RunDir, dataset: Dataset, model: Incremental | None, task: int, session: Session
) -> Incremental:
    """One task of class-incremental learning: grow, fit with the teacher's help, remember, fine-tune."""
    run, scenario, labels = directory.run, directory.scenario, dataset.train.labels
    new = scenario[task].select(labels)
    if model is None:
        teacher, memory, model = None, None, directory.new_model(0).to(session.device)
    else:
        teacher, memory = copy.deepcopy(model).eval().requires_grad_(False), directory.memory(task - 1)
        directory.grow(model, task)

    model = fit(directory, dataset, model, main_phase(directory, task, with_memory(new, memory)), teacher, session)
    model.div_head = None  # only the main phase has it

    m = budget_per_class(run.memory, scenario[: task + 1].labels.stop)
    if directory.memory(task) is None and m > 0:
        parts = []
        for process in range(run.memories):
            features = herding_features(directory, dataset, model, task, new, process, session.device)
            parts.append(remember(memory, features, labels[new], new, m, process))
        parallel.once(directory.save_memory, task, pd.concat(parts))
    if task and m > 0 and run.finetune_epochs:
        balanced = finetune_phase(directory, task, exemplars(directory.memory(task)))
        model = fit(directory, dataset, model, balanced, None, session)
    return model


def learn_jointly(directory: RunDir, dataset: Dataset, task: int, session: Session) -> Incremental:
    """The joint counterpart at `task`: a fresh model on all classes of tasks 0..task, and nothing else."""
    indices = directory.scenario[: task + 1].select(dataset.train.labels)
    model = directory.new_model(task).to(session.device)
    return fit(directory, dataset, model, joint_phase(directory, dataset, task, indices[None]), None, session)


@torch.no_grad()
def herding_features(
    directory: RunDir, dataset: Dataset, model: Incremental, task: int, indices: Tensor, process: int, device: str
) -> Tensor:
    """What herding compares: the tokens that the heads read, concatenated, under the test transform: [n, T * dim].

    With herding_crop, under training's random crop, for each emulated process another.
    """
    model.eval()
    run, place = directory.run, (task, "herding", process)
    batches, features = indices.split(batch_size(device)), []
    with randomness(run.seed, *place) as generator:
        seeds = torch.randint(2**62, (len(indices),), generator=generator).split(batch_size(device))
    mine, my_seeds = parallel.share(batches), parallel.share(seeds)
    for x, seed in zip(dataset.train.batches(mine, my_seeds if run.herding_crop else None), my_seeds, strict=True):
        if run.herding_crop and run.crop_padding:
            with randomness(run.seed, *place, int(seed[0])) as generator:
                offset = draws.crop_offsets(len(x), run.crop_padding, generator)
                x = augment.crop(x, offset.to(x.device), run.crop_padding)
        x = augment.normalize(x.to(device), dataset.mean, dataset.std)
        features.append(model.forward_features(x).flatten(1))
    return torch.cat(parallel.join([rows.cpu() for rows in features], len(batches)))


def load_dataset(run: Run) -> Dataset:
    """The run's images with original labels."""
    dataset = data.load(run.dataset, run.data_dir, run.image_size)
    if run.normalization == "dataset":
        return dataset
    config = pretrained_config(run.model)
    return replace(dataset, mean=tuple(config.mean), std=tuple(config.std))


def in_class_order(dataset: Dataset, directory: RunDir) -> Dataset:
    """Labels become positions in the class order; -1 marks images that the run leaves out."""
    run, order = directory.run, directory.class_order
    train, test = (relabel(s.labels, order, len(order)) for s in (dataset.train, dataset.test))
    if run.images_per_class:
        with randomness(run.seed, "images_per_class") as generator:
            shuffled = torch.randperm(len(train), generator=generator)
        for label in range(len(order)):
            mine = shuffled[train[shuffled] == label]
            train[mine[run.images_per_class :]] = -1
    return replace(dataset, train=dataset.train.with_labels(train), test=dataset.test.with_labels(test))


def finish_task(directory: RunDir, task: int, model: Incremental, rows: pd.DataFrame) -> None:
    """Accuracy, then weights: with them the task is finished."""
    old = directory.table("accuracy")
    if old is None or task not in set(old["task"]):
        directory.extend("accuracy", rows)
    directory.save_task(task, model)
