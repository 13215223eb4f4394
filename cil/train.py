"""train(run, out): class after class, read from top to bottom."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from cil import augment, checkpoint, data, losses
from cil.checkpoint import RunDir
from cil.data import Dataset, ImageSet
from cil.evaluate import accuracy_rows, normalized_batches
from cil.memory import budget_per_class, remember
from cil.methods import METHODS
from cil.models import IncrementalViT
from cil.run import Run, randomness
from cil.scenario import relabel
from cil.tables import MEMORY, TRAINING

SAVE_EVERY = 20.0  # seconds between two resume states; an interruption costs at most this and one epoch


@dataclass(frozen=True)
class Progress:
    """What `report` gets after every step; `done` and `total` count steps of the whole run."""

    task: int
    tasks: int
    phase: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    done: int
    total: int
    images: int  # in this step


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one optimiser: the whole task, or balanced fine-tuning on the memory."""

    name: str
    task: int
    indices: Tensor
    epochs: int
    peak_lr: float
    batch_size: int

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch: whole batches only, at least one."""
        return max(1, len(self.indices) // self.batch_size)


def main_phase(directory: RunDir, task: int, indices: Tensor) -> Phase:
    """Training on a task's images; the run's first task, also if it is all classes at once, has its own budget."""
    run, first = directory.run, task == directory.planned_tasks[0]
    epochs, lr = (run.epochs_first, run.lr_first) if first else (run.epochs, run.lr)
    return Phase("fit", task, indices, epochs, lr, run.batch_size)


def finetune_phase(directory: RunDir, task: int, exemplars: Tensor) -> Phase:
    """Balanced fine-tuning on the memory, at a constant learning rate."""
    run = directory.run
    return Phase("finetune", task, exemplars, run.finetune_epochs, run.finetune_lr, run.batch_size)


def train(run: Run, out: str | Path, device: str = "cpu", report: Report = lambda progress: None) -> RunDir:
    """Train `run` into the directory `out`, or go on with it where it was; a finished run returns at once.

    Raises ValueError for a run that does not fit its data, or an `out` that holds something else.
    """
    dataset = load_dataset(run)
    directory = checkpoint.create(out, run, dataset)
    dataset = in_class_order(dataset, directory)
    with directory.lock():
        tasks = directory.planned_tasks
        finished = directory.tasks
        model = directory.model(finished[-1]).to(device) if finished else None
        for task in tasks[len(finished) :]:
            if run.training == "incremental":
                model = learn_increment(directory, dataset, model, task, device, report)
            else:
                model = learn_jointly(directory, dataset, task, device, report)
            rows = accuracy_rows(model, dataset.test, directory.scenario, task, dataset.mean, dataset.std, device)
            old = directory.table("accuracy")
            if old is None or task not in set(old["task"]):
                directory.extend("accuracy", rows)
            directory.save_task(task, model)
    return directory


def learn_increment(
    directory: RunDir, dataset: Dataset, model: IncrementalViT | None, task: int, device: str, report: Report
) -> IncrementalViT:
    """One task of class-incremental learning: grow, fit with the teacher's help, remember, fine-tune."""
    run, scenario, labels = directory.run, directory.scenario, dataset.train.labels
    new = scenario[task].select(labels)
    if task == 0:
        teacher, memory, model = None, None, directory.new_model(0).to(device)
    else:
        teacher, memory = copy.deepcopy(model).eval().requires_grad_(False), directory.memory(task - 1)
        directory.grow(model, task)
    indices = new if memory is None else torch.cat([new, torch.tensor(memory["image"].to_numpy())])

    model = fit(directory, dataset, model, main_phase(directory, task, indices), teacher, device, report)
    model.div_head = None  # only the main phase has it

    m = budget_per_class(run.memory, scenario[: task + 1].labels.stop)
    if directory.memory(task) is None and m > 0:
        features = token_features(model, dataset, new, device)
        memory = remember(memory, features, labels[new], new, m)
        directory.memory_path(task).parent.mkdir(exist_ok=True)
        MEMORY.write(memory, directory.memory_path(task))
    if task and m > 0 and run.finetune_epochs:
        exemplars = torch.tensor(directory.memory(task)["image"].to_numpy())
        model = fit(directory, dataset, model, finetune_phase(directory, task, exemplars), None, device, report)
    return model


def learn_jointly(directory: RunDir, dataset: Dataset, task: int, device: str, report: Report) -> IncrementalViT:
    """The joint counterpart at `task`: a fresh model on all classes of tasks 0..task, the same epochs, nothing else."""
    indices = directory.scenario[: task + 1].select(dataset.train.labels)
    model = directory.new_model(task).to(device)
    return fit(directory, dataset, model, main_phase(directory, task, indices), None, device, report)


def fit(
    directory: RunDir, dataset: Dataset, model: IncrementalViT, phase: Phase, teacher: nn.Module | None, device: str,
    report: Report,
) -> IncrementalViT:  # fmt: skip
    """Epochs of one phase, from the saved state if there is one for it; a phase that is already over is left as it is."""
    run, method = directory.run, METHODS[directory.run.method]
    saved = directory.load_resume()
    saved = saved if saved and saved["task"] == phase.task else None
    if saved and phase.name == "fit" and saved["phase"] == "finetune":
        return model  # its result is in the state that fine-tuning goes on from
    images, labels = dataset.train.images, dataset.train.labels
    scenario = directory.scenario
    num_classes = len(scenario[: phase.task + 1].labels)
    num_old = 0 if run.training != "incremental" or not phase.task else scenario[phase.task].labels.start

    freeze(model, frozen_parts(directory, phase))
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(model, run.weight_decay), lr=run.lr, betas=(0.9, 0.999), eps=1e-8
    )
    first = 0
    if saved and saved["phase"] == phase.name:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    rows, last_saved = [], time.monotonic()
    done, total = steps_before(directory, dataset, phase), total_steps(directory, dataset)

    for epoch in range(first, phase.epochs):
        began, sums = time.perf_counter(), torch.zeros(2, dtype=torch.float64)
        lr = learning_rate(run, phase, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with randomness(run.seed, phase.task, phase.name, epoch) as generator:
            order = phase.indices[torch.randperm(len(phase.indices), generator=generator)]
            for step in range(phase.steps):
                batch = order[step * phase.batch_size : (step + 1) * phase.batch_size]
                y = labels[batch]
                x, targets = augmented(run, images[batch].to(device), y.to(device), num_classes, dataset, generator)
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=run.amp == "bf16"):
                    old_logits, distilled = teach(run, teacher, x, (y < num_old).to(device))
                    features = model.forward_features(x)
                    logits = model.forward_head(features)
                    div_logits = model.div_head(features[:, -1]) if model.div_head is not None else None
                bce, kd = losses.auto_kd(logits, targets, old_logits, distilled, run.kd_tau)
                loss = bce + kd
                if div_logits is not None:
                    loss = loss + method.divergence * losses.divergence(div_logits, targets, num_old)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(
                        f"the loss is {value} in task {phase.task}, {phase.name} epoch {epoch}, step {step}, at learning "
                        f"rate {lr:.3g}; finished tasks in {directory.path}: {directory.tasks}"
                    )
                hits = (logits.argmax(1) == targets.argmax(1)).float().mean().item()
                sums += torch.tensor([value, hits], dtype=torch.float64)
                report(
                    Progress(
                        phase.task, len(scenario), phase.name, epoch, phase.epochs, value, hits,
                        done + epoch * phase.steps + step + 1, total, len(batch),
                    )
                )  # fmt: skip
        mean = (sums / phase.steps).tolist()
        seconds = time.perf_counter() - began
        images_drawn = phase.steps * min(phase.batch_size, len(phase.indices))
        rows.append((phase.task, phase.name, epoch, phase.steps, images_drawn, *mean, lr, seconds))
        if time.monotonic() - last_saved > SAVE_EVERY or epoch == phase.epochs - 1:
            append_training(directory, rows)
            rows, last_saved = [], time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            directory.save_resume({"task": phase.task, "phase": phase.name, "epoch": epoch + 1, **state})
    model.requires_grad_(True)
    return model.eval()


def augmented(
    run: Run, x: Tensor, y: Tensor, num_classes: int, dataset: Dataset, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """uint8 [B, 3, H, W], labels [B] -> what the network sees [B, 3, H, W], soft targets [B, C]."""
    if run.crop_padding:
        x = augment.random_crop(x, run.crop_padding, generator)
    if run.flip:
        x = augment.random_flip(x, generator)
    if run.rand_augment:
        x = augment.rand_augment(x, run.rand_augment, generator)
    x = augment.normalize(x, dataset.mean, dataset.std)
    return augment.mixup(x, y, num_classes, run.mixup, run.smoothing, generator)


@torch.no_grad()
def teach(run: Run, teacher: nn.Module | None, x: Tensor, is_old: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's logits [B, C_old] and which rows [B] are distilled; (None, None) where its output is not used."""
    if teacher is None or not run.kd or (run.kd_rows == "old" and not is_old.any()):
        return None, None
    return teacher(x), is_old if run.kd_rows == "old" else None


@torch.no_grad()
def token_features(model: IncrementalViT, dataset: Dataset, indices: Tensor, device: str) -> Tensor:
    """What herding compares: the task-attention block's tokens, concatenated, under the test transform: [n, T * dim]."""
    model.eval()
    batches = normalized_batches(dataset.train.images[indices], dataset.mean, dataset.std, device)
    return torch.cat([model.forward_features(x).flatten(1).cpu() for x in batches])


def frozen_parts(directory: RunDir, phase: Phase) -> Callable[[str], bool]:
    """Whether a parameter name is frozen in this phase (cil.methods)."""
    method = METHODS[directory.run.method]
    if phase.name == "finetune":
        return lambda name: not name.startswith(method.finetuned)
    if directory.run.training != "incremental":
        return lambda name: False
    old = tuple(prefix.format(old=t) for prefix in method.frozen for t in range(phase.task))
    return lambda name: name.startswith(old)


def freeze(model: nn.Module, frozen: Callable[[str], bool]) -> None:
    """Gradients off where `frozen(name)`; modules whose parameters are all frozen go to eval mode, the others train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def learning_rate(run: Run, phase: Phase, epoch: int) -> float:
    """Linear warm-up from warmup_lr, then a cosine over all epochs of the task down to lr_min; constant in fine-tuning."""
    if phase.name == "finetune":
        return phase.peak_lr
    if epoch < run.warmup_epochs:
        return run.warmup_lr + epoch * (phase.peak_lr - run.warmup_lr) / run.warmup_epochs
    return run.lr_min + 0.5 * (phase.peak_lr - run.lr_min) * (1 + math.cos(math.pi * epoch / phase.epochs))


def load_dataset(run: Run) -> Dataset:
    """The run's images with original labels."""
    return data.load(run.dataset, run.data_dir, run.image_size)


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
    return Dataset(
        ImageSet(dataset.train.images, train), ImageSet(dataset.test.images, test), dataset.classes, dataset.mean, dataset.std
    )  # fmt: skip


def plan(directory: RunDir, dataset: Dataset) -> list[Phase]:
    """Every phase of the run in order, with its number of images; what --dry-run prints. dataset: in class order."""
    run, scenario = directory.run, directory.scenario
    sizes = [len(task.select(dataset.train.labels)) for task in scenario]
    phases = []
    for task in directory.planned_tasks:
        if run.training != "incremental":
            phases.append(main_phase(directory, task, torch.arange(sum(sizes[: task + 1]))))
            continue
        kept = memory_size(directory, dataset, task - 1) if task else 0
        phases.append(main_phase(directory, task, torch.arange(sizes[task] + kept)))
        kept = memory_size(directory, dataset, task)
        if task and kept and run.finetune_epochs:
            phases.append(finetune_phase(directory, task, torch.arange(kept)))
    return phases


def describe_plan(run: Run) -> str:
    """What --dry-run prints: tasks, images, memory, epochs, steps, learning rates."""
    dataset = load_dataset(run)
    directory = checkpoint.describe("run", run, dataset)
    dataset = in_class_order(dataset, directory)
    lines = [f"{'task':>4} {'classes':>7} {'phase':>8} {'images':>7} {'epochs':>6} {'steps':>8} {'peak lr':>8}"]
    phases = plan(directory, dataset)
    for phase in phases:
        classes = len(directory.scenario[: phase.task + 1].labels)
        lines.append(
            f"{phase.task:>4} {classes:>7} {phase.name:>8} {len(phase.indices):>7} {phase.epochs:>6} "
            f"{phase.steps * phase.epochs:>8} {phase.peak_lr:>8.1e}"
        )
    steps = sum(p.steps * p.epochs for p in phases)
    parameters = sum(p.numel() for p in directory.grown_model(directory.planned_tasks[-1]).parameters())
    kept = 0 if run.training != "incremental" else memory_size(directory, dataset, len(directory.scenario) - 1)
    lines.append(
        f"{steps} steps at batch {run.batch_size}; {kept} exemplars at the end; {parameters} parameters; "
        f"{run.training} training on {run.dataset}, {run.scenario}, {len(directory.class_order)} classes"
    )
    return "\n".join(lines)


def memory_size(directory: RunDir, dataset: Dataset, task: int) -> int:
    """Exemplars kept after `task`."""
    classes = directory.scenario[: task + 1].labels
    m = budget_per_class(directory.run.memory, len(classes))
    return sum(min(m, int((dataset.train.labels == label).sum())) for label in classes)


def total_steps(directory: RunDir, dataset: Dataset) -> int:
    return sum(p.steps * p.epochs for p in plan(directory, dataset))


def steps_before(directory: RunDir, dataset: Dataset, phase: Phase) -> int:
    phases = plan(directory, dataset)
    here = next(i for i, p in enumerate(phases) if (p.name, p.task) == (phase.name, phase.task))
    return sum(p.steps * p.epochs for p in phases[:here])


def append_training(directory: RunDir, rows: list[tuple]) -> None:
    """Add epochs to training.csv; an epoch that is run again after an interruption replaces its row."""
    new = pd.DataFrame(rows, columns=list(TRAINING.columns))
    old = directory.table("training")
    both = new if old is None else pd.concat([old, new])
    TRAINING.write(both.drop_duplicates(list(TRAINING.keys), keep="last"), directory.path / "training.csv")
