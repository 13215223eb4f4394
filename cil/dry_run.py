"""What a run will do, how long it will take and what it leaves on disk, told before it is trained."""

from __future__ import annotations

import copy
import statistics
import time

import torch

from cil import checkpoint
from cil.augment import normalize
from cil.checkpoint import RunDir
from cil.data import Dataset
from cil.memory import budget_per_class
from cil.run import Run
from cil.schedule import Phase, learning_rate, memory_size, plan, total_steps
from cil.train import Learner, freeze, frozen_parts, in_class_order, load_dataset

MEASURED_STEPS = 3  # after one to warm up


def describe_plan(run: Run, device: str = "cpu") -> str:
    """What --dry-run prints: tasks, images, steps, memory, learning rates; time from a few measured steps; disk."""
    dataset = load_dataset(run)
    directory = checkpoint.describe("run", run, dataset)
    dataset = in_class_order(dataset, directory)
    phases = plan(directory, dataset)
    lines = [
        f"{'task':>4} {'classes':>7} {'phase':>8} {'images':>7} {'epochs':>6} {'steps':>8} {'learning rate':>18} "
        f"{'exemplars a class':>18}"
    ]
    for phase in phases:
        seen = len(directory.scenario[: phase.task + 1].labels)
        rates = [learning_rate(run, phase, epoch) for epoch in range(phase.epochs)] or [0.0]
        lines.append(
            f"{phase.task:>4} {seen:>7} {phase.name:>8} {phase.images:>7} {phase.epochs:>6} "
            f"{phase.steps * phase.epochs:>8} {max(rates):>8.1e}, {rates[-1]:.1e} {exemplars_in(directory, phase):>18}"
        )
    images = sum(phase.images_drawn for phase in phases)
    parameters = sum(p.numel() for p in directory.grown_model(directory.planned_tasks[-1]).parameters())
    incremental = run.training == "incremental"
    kept = run.memories * memory_size(directory, dataset, len(directory.scenario) - 1) if incremental else 0
    lines += [
        f"{total_steps(phases)} steps at batch {run.batch_size}, {images} images; {kept} exemplars at the end, "
        f"memory {run.memory_mode}; {parameters} parameters",
        f"{run.training} training on {run.dataset}, {run.scenario}, {len(directory.class_order)} classes",
        f"estimated time: {duration(estimate(directory, dataset, phases, device))} on {device} with "
        f"{torch.get_num_threads()} threads, from {MEASURED_STEPS} measured steps of each kind",
        f"disk: {directory.size_on_disk() / 1e6:.1f} MB at its largest",
    ]
    return "\n".join(lines)


def exemplars_in(directory: RunDir, phase: Phase) -> str:
    """Of each old class while the phase is trained, or of every class in fine-tuning."""
    if directory.run.training != "incremental" or (phase.name == "fit" and not phase.task):
        return "-"
    last = phase.task if phase.name == "finetune" else phase.task - 1
    classes = len(directory.scenario[: last + 1].labels)
    return f"{budget_per_class(directory.run.memory, classes)} of {classes}"


def estimate(directory: RunDir, dataset: Dataset, phases: list[Phase], device: str) -> float:
    """Seconds for the whole run: training, prediction after each task, herding; loading the data is left out.

    Steps of the first and the last phase of each kind are measured, and an image of a phase between costs their mean.
    """
    kinds = {}
    for phase in phases:
        kinds.setdefault((phase.name, phase.task > 0), []).append(phase)
    seconds = 0.0
    for same in kinds.values():
        ends = {phase.task: phase for phase in (same[0], same[-1])}.values()
        cost = statistics.mean(seconds_per_image(directory, dataset, phase, device) for phase in ends)
        seconds += cost * sum(phase.images_drawn for phase in same)
    predicted = [directory.scenario[: t + 1].select(dataset.test.labels) for t in directory.planned_tasks]
    herded = (dataset.train.labels >= 0).sum() if directory.run.training == "incremental" else 0
    forward = seconds_of_prediction(directory, dataset, device)
    return seconds + forward * (sum(map(len, predicted)) + int(herded))


def seconds_per_image(directory: RunDir, dataset: Dataset, phase: Phase, device: str) -> float:
    """Of training in `phase`, median of a few steps of a batch that is small on a CPU; nothing is learned from it."""
    run, scenario = directory.run, directory.scenario
    model = directory.grown_model(phase.task).to(device)
    teacher = None
    if run.training == "incremental" and phase.task and phase.name == "fit":
        teacher = copy.deepcopy(directory.grown_model(phase.task - 1)).to(device).eval()
    freeze(model, frozen_parts(directory, phase))
    learner = Learner(directory, dataset, model, teacher, phase.task, device)
    # As many old images as the memory would bring, to let the teacher work as it will.
    new = scenario[phase.task].select(dataset.train.labels)
    if run.training != "incremental":
        new = scenario[: phase.task + 1].select(dataset.train.labels)
    old = (
        scenario[: phase.task].select(dataset.train.labels) if phase.task and run.training == "incremental" else new[:0]
    )
    indices = torch.cat([new, old[: max(0, phase.images - len(new))]])
    size = min(run.batch_size, len(indices), run.batch_size if device.startswith("cuda") else 32)
    taken = []
    for step in range(1 + MEASURED_STEPS):
        batch = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(step))[:size]]
        (x,) = dataset.train.batches([batch], [batch])
        began = time.perf_counter()
        learner.step(x, dataset.train.labels[batch], ("estimate", step))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) / size


@torch.no_grad()
def seconds_of_prediction(directory: RunDir, dataset: Dataset, device: str) -> float:
    """Of one image."""
    model = directory.grown_model(directory.planned_tasks[-1]).to(device).eval()
    (x,) = dataset.test.batches([torch.arange(min(32, len(dataset.test.labels)))])
    taken = []
    for _ in range(1 + MEASURED_STEPS):
        began = time.perf_counter()
        model(normalize(x.to(device), dataset.mean, dataset.std)).argmax(1).cpu()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) / len(x)


def duration(seconds: float) -> str:
    """Two figures of what a person would say."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
