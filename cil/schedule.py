"""What is trained when, on which images, at which learning rate: phases, their order, their batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cil import draws
from cil.checkpoint import RunDir
from cil.data import Dataset
from cil.memory import budget_per_class
from cil.run import Run


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one optimiser: the whole task, or balanced fine-tuning on the memory.

    indices: training images [W, n], a row for each memory (Run.memories). cosine: epochs of the schedule, 0 for none.
    """

    name: str
    task: int
    indices: Tensor
    epochs: int
    peak_lr: float
    batch_size: int
    cosine: int = 0

    @property
    def images(self) -> int:
        """Of an epoch."""
        return self.indices.shape[1]

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch: whole batches only, at least one."""
        return max(1, self.images // self.batch_size)

    @property
    def images_drawn(self) -> int:
        """Images that all its steps see, each as often as it is seen."""
        return min(self.batch_size, self.images) * self.steps * self.epochs


def main_phase(directory: RunDir, task: int, indices: Tensor) -> Phase:
    """Training on a task's images; the run's first task, also if it is all classes at once, has its own budget."""
    run, first = directory.run, task == directory.planned_tasks[0]
    epochs, lr = (run.epochs_first, run.lr_first) if first else (run.epochs, run.lr)
    cosine = run.cosine_epochs_first if first and run.cosine_epochs_first else epochs
    return Phase("fit", task, indices, epochs, lr, run.batch_size, cosine)


def joint_phase(directory: RunDir, dataset: Dataset, task: int, indices: Tensor) -> Phase:
    """The joint counterpart at `task`. joint-as-long: as many epochs as fit into all steps of its incremental twin."""
    phase = main_phase(directory, task, indices)
    if directory.run.training != "joint-as-long":
        return phase
    twin = replace(directory, run=replace(directory.run, training="incremental"))
    epochs = max(1, round(total_steps(plan(twin, dataset)) / phase.steps))
    return replace(phase, epochs=epochs, cosine=epochs)


def finetune_phase(directory: RunDir, task: int, exemplars: Tensor) -> Phase:
    """Balanced fine-tuning on the memory, at a constant learning rate."""
    run = directory.run
    return Phase("finetune", task, exemplars, run.finetune_epochs, run.finetune_lr, run.batch_size)


def exemplars(memory: pd.DataFrame) -> Tensor:
    """Image indices of each memory [W, m]; one in which herding found fewer goes round.

    Sorted: which images are kept is less easily changed by rounding than the order in which herding picked them.
    """
    rows = [np.sort(part["image"].to_numpy()) for _, part in memory.groupby("process")]
    return torch.from_numpy(np.stack([np.resize(row, max(map(len, rows))) for row in rows]))


def with_memory(new: Tensor, memory: pd.DataFrame | None) -> Tensor:
    """A task's own images [n] and those of each memory: [W, n + m]."""
    if memory is None:
        return new[None]
    kept = exemplars(memory)
    return torch.cat([new.expand(len(kept), -1), kept], dim=1)


def epoch_batches(run: Run, phase: Phase, epoch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """An epoch's batches of image indices [b], and a seed for the crop of each image [b].

    With several memories, the images go round the processes that are emulated, each of which reads its own memory.
    """
    n, order = phase.images, phase.indices
    drawn, seeds = draws.of_epoch(run, phase.task, phase.name, epoch, n)
    order = order[torch.arange(n) % len(order), drawn]
    return order.split(phase.batch_size)[: phase.steps], seeds.split(phase.batch_size)[: phase.steps]


def learning_rate(run: Run, phase: Phase, epoch: int) -> float:
    """Linear warm-up from warmup_lr, then a cosine over the schedule down to lr_min; constant in fine-tuning."""
    if not phase.cosine:
        return phase.peak_lr
    epoch = max(0, epoch - run.schedule_late)
    if epoch < run.warmup_epochs:
        return run.warmup_lr + epoch * (phase.peak_lr - run.warmup_lr) / run.warmup_epochs
    return run.lr_min + 0.5 * (phase.peak_lr - run.lr_min) * (1 + math.cos(math.pi * epoch / phase.cosine))


def plan(directory: RunDir, dataset: Dataset) -> list[Phase]:
    """Every phase of the run in order, with its number of images. dataset: in class order."""
    run, scenario = directory.run, directory.scenario
    sizes = [len(task.select(dataset.train.labels)) for task in scenario]
    phases = []
    for task in directory.planned_tasks:
        if run.training != "incremental":
            phases.append(joint_phase(directory, dataset, task, _any(sum(sizes[: task + 1]))))
            continue
        kept = memory_size(directory, dataset, task - 1) if task else 0
        phases.append(main_phase(directory, task, _any(sizes[task] + kept)))
        kept = memory_size(directory, dataset, task)
        if task and kept and run.finetune_epochs:
            phases.append(finetune_phase(directory, task, _any(kept)))
    return phases


def _any(n: int) -> Tensor:
    return torch.arange(n)[None]


def memory_size(directory: RunDir, dataset: Dataset, task: int) -> int:
    """Exemplars in each memory after `task`."""
    classes = directory.scenario[: task + 1].labels
    m = budget_per_class(directory.run.memory, len(classes))
    available = torch.bincount(dataset.train.labels[dataset.train.labels >= 0], minlength=classes.stop)
    return int(available[: classes.stop].clamp(max=m).sum())


def total_steps(phases: list[Phase]) -> int:
    return sum(phase.steps * phase.epochs for phase in phases)


def steps_before(phases: list[Phase], phase: Phase) -> int:
    """Steps of the run before `phase`."""
    here = next(i for i, p in enumerate(phases) if (p.name, p.task) == (phase.name, phase.task))
    return total_steps(phases[:here])


def remarks(directory: RunDir, dataset: Dataset) -> list[str]:
    """What is odd about a run and may be a slip: sentences. dataset: in class order."""
    run, sentences = directory.run, []
    seen = [len(directory.scenario[: task + 1].labels) for task in directory.planned_tasks]
    if run.training == "incremental" and 0 < run.memory < seen[-1]:
        task = next(task for task, classes in enumerate(seen) if run.memory < classes)
        sentences.append(
            f"memory={run.memory} is less than one exemplar for each of {seen[task]} classes: from task {task} on none is "
            f"kept, and there is no fine-tuning; memory={seen[-1]} keeps one of each class to the end"
        )
    short = [phase for phase in plan(directory, dataset) if phase.images < run.batch_size]
    if short:
        sentences.append(
            f"batch_size={run.batch_size} is more than the {short[0].images} images of task {short[0].task} ({short[0].name}): "
            "an epoch is then one step on all of them"
        )
    return sentences
