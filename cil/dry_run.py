"""What a run will do, how long it will take and what it leaves on disk, told before it is trained."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch

from cil import checkpoint, start, text
from cil.augment import normalize
from cil.checkpoint import RunDir
from cil.data import Dataset
from cil.device import processor, repeatable
from cil.evaluate import batch_size
from cil.fit import Learner, freeze, frozen_parts
from cil.memory import budget_per_class
from cil.run import Run
from cil.schedule import Phase, learning_rate, memory_size, plan, remarks, total_steps
from cil.train import in_class_order, load_dataset

MEASURED_STEPS = 5  # after one to warm up, if they take no longer than
ENOUGH = 4.0  # seconds
STEPS_ON_GPU = 10  # between two readings, for the host is ahead of a GPU as in training
BUSY = 1.25  # times its CPU time that a step takes where other work is in the way


class Stopwatch:
    """Times work, and tells by how much more time it took than the processor was given to it."""

    def __init__(self) -> None:
        self.wall, self.cpu = 0.0, 0.0  # of the fastest turns of all work

    def fastest(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest of a few turns: what disturbs a turn makes it slower, never faster."""
        work()
        turns: list[tuple[float, float]] = []
        while len(turns) < MEASURED_STEPS and (sum(wall for wall, _ in turns) < ENOUGH or not turns):
            wall, cpu = time.perf_counter(), time.thread_time()
            work()
            turns.append((time.perf_counter() - wall, time.thread_time() - cpu))
        wall, cpu = (min(taken) for taken in zip(*turns, strict=True))
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu
        return wall

    @property
    def slowdown(self) -> float:
        """Time over CPU time of the thread that computes: about 1 on a quiet machine."""
        return self.wall / max(self.cpu, 1e-9)


def describe_plan(run: Run, device: str = "cpu", echo: Callable[[str], None] = print) -> None:
    """What --dry-run prints: tasks, images, steps, memory, learning rates, disk; then, from a few measured steps, the time."""
    dataset = load_dataset(run)
    directory = checkpoint.describe("run", run, dataset)
    dataset = in_class_order(dataset, directory)
    phases = plan(directory, dataset)
    header = ["task", "classes", "phase", "images", "epochs", "steps", "learning rate", "exemplars\nper class"]
    rows = []
    for phase in phases:
        seen = len(directory.scenario[: phase.task + 1].labels)
        rates = [learning_rate(run, phase, epoch) for epoch in range(phase.epochs)] or [0.0]
        counts = (phase.images, phase.epochs, phase.steps * phase.epochs)
        rates_words = f"{max(rates):.1e}, {rates[-1]:.1e}"
        rows.append(
            [f"{phase.task}", f"{seen}", phase.name, *map(str, counts), rates_words, exemplars_in(directory, phase)]
        )
    images = sum(phase.images_drawn for phase in phases)
    parameters = sum(p.numel() for p in directory.grown_model(directory.planned_tasks[-1]).parameters())
    incremental = run.training == "incremental"
    kept = run.memories * memory_size(directory, dataset, len(directory.scenario) - 1) if incremental else 0
    lines = [
        f"{total_steps(phases)} steps at batch {run.batch_size}, {images} images; {kept} exemplars at the end, "
        f"memory {run.memory_mode}; {parameters} parameters",
        f"{run.training} training on {run.dataset}, {run.scenario}, {len(directory.class_order)} classes",
        f"disk: {directory.size_on_disk() / 1e6:.1f} MB at its largest",
    ]
    if run.weights.startswith(start.RECIPE):
        lines.append(f"starts from {start.first(run).recipe} beside it, which is trained first if it is not there")
    elif run.weights:
        lines.append(f"starts from {'timm' if run.weights == 'hub' else run.weights}: weights of {run.model}")
    lines += remarks(directory, dataset)
    echo("\n".join([text.table(header, rows, left=0), *map(text.prose, lines)]))
    watch, threads = Stopwatch(), torch.get_num_threads()
    seconds = estimate(directory, dataset, phases, device, watch)
    on_cpu = torch.device(device).type == "cpu"
    where = f"cpu with {threads} thread{'s' * (threads > 1)}" if on_cpu else processor(device)
    echo(text.prose(f"estimated time: {duration(seconds)} on {where}, from the fastest of a few steps of each kind"))
    if on_cpu and watch.slowdown > BUSY:
        alone = seconds_of_one_core(directory, dataset, phases, device)
        words = f"this machine is busy: the steps took {watch.slowdown:.1f} times their CPU time"
        echo(text.prose(f"{words}; on one core of its own, with --threads 1, it would need about {duration(alone)}"))


def seconds_of_one_core(directory: RunDir, dataset: Dataset, phases: list[Phase], device: str) -> float:
    """The CPU time that the run needs with one thread: what other work there is does not change it much."""
    threads, watch = torch.get_num_threads(), Stopwatch()
    torch.set_num_threads(1)
    try:
        return estimate(directory, dataset, phases, device, watch) / watch.slowdown
    finally:
        torch.set_num_threads(threads)


def exemplars_in(directory: RunDir, phase: Phase) -> str:
    """Of each old class while the phase is trained, or of every class in fine-tuning."""
    if directory.run.training != "incremental" or (phase.name == "fit" and not phase.task):
        return "-"
    last = phase.task if phase.name == "finetune" else phase.task - 1
    classes = len(directory.scenario[: last + 1].labels)
    return f"{budget_per_class(directory.run.memory, classes)} of {classes}"


def estimate(
    directory: RunDir, dataset: Dataset, phases: list[Phase], device: str, watch: Stopwatch | None = None
) -> float:
    """Seconds for the whole run: training, prediction after each task, herding; loading the data is left out.

    Steps of the first and the last phase of each kind are measured, and an image of a phase between costs their mean.
    """
    watch, dataset = watch or Stopwatch(), dataset.to(device)
    kinds: dict = {}
    for phase in phases:
        kinds.setdefault((phase.name, phase.task > 0), []).append(phase)
    seconds = 0.0
    for same in kinds.values():
        ends = {phase.task: phase for phase in (same[0], same[-1])}.values()
        cost = statistics.mean(seconds_per_image(directory, dataset, phase, device, watch) for phase in ends)
        seconds += cost * sum(phase.images_drawn for phase in same)
    predicted = [directory.scenario[: t + 1].select(dataset.test.labels) for t in directory.planned_tasks]
    herded = (dataset.train.labels >= 0).sum() if directory.run.training == "incremental" else 0
    forward = seconds_of_prediction(directory, dataset, device, watch)
    return seconds + forward * (sum(map(len, predicted)) + int(herded))


def seconds_per_image(directory: RunDir, dataset: Dataset, phase: Phase, device: str, watch: Stopwatch) -> float:
    """Of training in `phase`, by the fastest of a few steps of a batch that is small on a CPU; nothing is learned from it."""
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
    batch = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:size]]
    (x,) = dataset.train.arrivals([batch], [batch])

    together = STEPS_ON_GPU if device.startswith("cuda") else 1

    def steps() -> None:
        for _ in range(together):
            learner.step(x, dataset.train.labels[batch], ("estimate", 0))
        learner.sums.cpu()  # waits for the device

    with repeatable(device, run.matmul):
        return watch.fastest(steps) / (together * size)


@torch.no_grad()
def seconds_of_prediction(directory: RunDir, dataset: Dataset, device: str, watch: Stopwatch) -> float:
    """Of one image."""
    model = directory.grown_model(directory.planned_tasks[-1]).to(device).eval()
    (x,) = dataset.test.batches([torch.arange(min(batch_size(device), len(dataset.test.labels)))])
    return watch.fastest(lambda: model(normalize(x.to(device), dataset.mean, dataset.std)).argmax(1).cpu()) / len(x)


def duration(seconds: float) -> str:
    """Two figures of what a person would say."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
