"""train(run, out): class after class, read from top to bottom."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from cil import augment, checkpoint, data, draws, losses, parallel
from cil.checkpoint import RunDir
from cil.data import Dataset
from cil.device import ieee_float32
from cil.draws import Draws
from cil.evaluate import accuracy_rows, batch_size
from cil.memory import budget_per_class, remember
from cil.methods import METHODS
from cil.models import Incremental, drop_path_calls
from cil.run import Run, randomness
from cil.scenario import relabel
from cil.schedule import (
    Phase,
    epoch_batches,
    exemplars,
    finetune_phase,
    joint_phase,
    learning_rate,
    main_phase,
    plan,
    steps_before,
    total_steps,
    with_memory,
)
from cil.tables import TRAINING

SAVE_EVERY = 20.0  # seconds between two states, what a kill costs; more where saving would take 2 % of the time


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


@dataclass
class Session:
    """Where and how a run is trained; nothing that its result depends on.

    Ctrl-C and SIGTERM raise KeyboardInterrupt, inside an epoch after the step that is under way: then it is saved first.
    A second Ctrl-C does not wait. (Under torchrun, one Ctrl-C arrives as SIGINT and as SIGTERM.)
    """

    device: str
    report: Report
    in_epoch: bool = False
    asked: int = field(default=0, init=False)  # the signal

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        def handle(number: int, frame: object) -> None:
            if not self.in_epoch or number == self.asked == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = number

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) is not signal.SIG_IGN]
        before = {kind: signal.signal(kind, handle) for kind in kinds}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(run: Run, out: str | Path, device: str = "cpu", report: Report = lambda progress: None) -> RunDir:
    """Train `run` into the directory `out`, or go on with it where it was; a finished run returns at once.

    Under torchrun (parallel.processes), all processes call this. Raises ValueError for a run that does not fit its data,
    or an `out` that holds something else or that another process trains in.
    """
    ieee_float32()
    dataset, session = load_dataset(run), Session(device, report)
    directory = parallel.once(checkpoint.create, out, run, dataset, device)
    dataset = in_class_order(dataset, directory)
    with session.interruptible(), contextlib.ExitStack() as locked:
        parallel.once(locked.enter_context, directory.lock())
        finished = directory.tasks
        model = directory.model(finished[-1]).to(device) if finished else None
        for task in directory.planned_tasks[len(finished) :]:
            if run.training == "incremental":
                model = learn_increment(directory, dataset, model, task, session)
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
    if task == 0:
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


def fit(
    directory: RunDir, dataset: Dataset, model: Incremental, phase: Phase, teacher: nn.Module | None, session: Session
) -> Incremental:
    """Epochs of one phase, from the saved state if there is one for it; a phase that is already over is left as it is."""
    run, labels, scenario = directory.run, dataset.train.labels, directory.scenario
    saved = directory.load_resume(phase.task)
    if saved and phase.name == "fit" and saved["phase"] == "finetune":
        return model  # its result is in the state that fine-tuning goes on from
    freeze(model, frozen_parts(directory, phase), run.frozen_eval)
    learner = Learner(directory, dataset, model, teacher, phase.task, session.device)
    first_epoch, first_step, sums, seconds = 0, 0, torch.zeros(2, dtype=torch.float64), 0.0
    if saved and saved["phase"] == phase.name:
        model.load_state_dict(saved["model"])
        learner.optimizer.load_state_dict(saved["optimizer"])
        first_epoch, first_step, sums, seconds = (saved[k] for k in ("epoch", "step", "sums", "seconds"))
    phases = plan(directory, dataset)
    before, total = steps_before(phases, phase), total_steps(phases)
    older = before if run.training == "incremental" else 0  # steps that this network has behind it
    wanted = set(run.checkpoint_steps)
    rows, last_saved, pause = [], time.monotonic(), SAVE_EVERY

    def save(epoch: int, step: int) -> None:
        nonlocal rows, last_saved, pause
        began = time.monotonic()
        append_training(directory, rows)
        state = {"model": model.state_dict(), "optimizer": learner.optimizer.state_dict()}
        state |= {
            "task": phase.task,
            "phase": phase.name,
            "epoch": epoch,
            "step": step,
            "sums": sums,
            "seconds": seconds,
        }
        directory.save_resume(before + epoch * phase.steps + step, state)
        rows, last_saved = [], time.monotonic()
        pause = max(SAVE_EVERY, 50 * (last_saved - began))

    def keep(steps: int) -> None:
        if steps in wanted and parallel.rank() == 0:
            directory.save_checkpoint(phase.task, steps, model)

    if not older and (first_epoch, first_step) == (0, 0):
        keep(0)
    session.in_epoch = True
    for epoch in range(first_epoch, phase.epochs):
        batches, seeds = epoch_batches(run, phase, epoch)
        learner.set_learning_rate(learning_rate(run, phase, epoch))
        mine = [parallel.rows(len(batch)) for batch in batches[first_step:]]
        images = dataset.train.batches(
            [batch[m] for batch, m in zip(batches[first_step:], mine, strict=True)],
            [seed[m] for seed, m in zip(seeds[first_step:], mine, strict=True)],
        )
        began = time.perf_counter() - seconds
        for step, x in enumerate(images, first_step):
            place = phase.task, phase.name, epoch, step
            loss, hits = learner.step(x, labels[batches[step]], place)
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} in task {phase.task}, {phase.name} epoch {epoch}, step {step}, at learning rate "
                    f"{learner.learning_rate:.3g}; the last good state: {directory.last_good()}"
                )
            sums += torch.tensor([loss, hits], dtype=torch.float64)
            taken, drawn = epoch * phase.steps + step + 1, len(batches[step])
            keep(older + taken)
            done = before + taken
            at = phase.task, len(scenario), phase.name, epoch, phase.epochs
            session.report(Progress(*at, loss, hits, done, total, drawn))
            seconds, here = time.perf_counter() - began, (epoch, step + 1)
            if step + 1 == phase.steps:
                means = (sums / phase.steps).tolist()
                rows.append((*place[:3], phase.steps, phase.steps * drawn, *means, learner.learning_rate, seconds))
                here, seconds = (epoch + 1, 0), 0.0
                sums.zero_()
            stop, over = parallel.anywhere(session.asked > 0), here == (phase.epochs, 0)
            if parallel.rank() == 0 and (stop or over or time.monotonic() - last_saved > pause):
                save(*here)
            if stop:
                raise KeyboardInterrupt
        first_step = 0
    session.in_epoch = False
    model.requires_grad_(True)
    return model.eval()


class Learner:
    """One optimiser step after another on one task, `step` being all that happens to a batch."""

    def __init__(
        self, directory: RunDir, dataset: Dataset, model: Incremental, teacher: nn.Module | None, task: int, device: str
    ):
        run, scenario = directory.run, directory.scenario
        self.run, self.dataset, self.model, self.teacher, self.device = run, dataset, model, teacher, device
        self.num_classes = len(scenario[: task + 1].labels)
        self.num_old = scenario[task].labels.start if run.training == "incremental" else 0
        self.divergence = METHODS[run.method].divergence
        self.drop_paths = drop_path_calls(model, directory.image_size)
        groups = param_groups_weight_decay(model, run.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, x: Tensor, y: Tensor, place: tuple) -> tuple[float, float]:
        """x: this process's images, uint8 [b, 3, H, W]; y: labels of the whole batch [B]; place: names the random draws.

        Returns the loss and the accuracy of the whole batch.
        """
        run = self.run
        distilled = y < self.num_old if run.kd_rows == "old" else None  # None: all
        taught = self.teacher is not None and run.kd and (distilled is None or bool(distilled.any()))
        with parallel.batch(len(y)), randomness(run.seed, *place) as generator:
            calls = [(path.p, shape) for path, shape in self.drop_paths]
            drawn = draws.of_step(run, len(y), calls, generator).to(self.device)
            x, own = x.to(self.device), parallel.own(y).to(self.device)
            x, targets = augmented(run, x, own, self.num_classes, self.dataset, drawn)
            for (path, _), kept in zip(self.drop_paths, drawn.drop_path, strict=True):
                path.kept.append(kept)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=run.amp == "bf16"):
                mine = parallel.own(distilled) if distilled is not None else None
                old_logits = teach(self.teacher, x, mine, self.num_old) if taught else None
                features = self.model.forward_features(x)
                logits = self.model.forward_head(features)
                div_logits = self.model.div_head(features[:, -1]) if self.model.div_head is not None else None
            # From here on, the whole batch: the loss does not depend on how many processes shared it.
            logits, targets = parallel.gather(logits.float()), parallel.gather(targets)
            old_logits = parallel.gather(old_logits.float()) if taught else None
            distilled = distilled.to(self.device) if distilled is not None else None
            bce, kd = losses.auto_kd(logits, targets, old_logits, distilled, run.kd_tau)
            loss = bce + kd
            if div_logits is not None:
                div_logits = parallel.gather(div_logits.float())
                loss = loss + self.divergence * losses.divergence(div_logits, targets, self.num_old)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        parallel.sum_gradients(self.model)
        self.optimizer.step()
        hits = (logits.argmax(1) == targets.argmax(1)).float().mean()
        return tuple(torch.stack([loss.detach(), hits]).tolist())


def augmented(
    run: Run, x: Tensor, y: Tensor, num_classes: int, dataset: Dataset, drawn: Draws
) -> tuple[Tensor, Tensor]:
    """uint8 [b, 3, H, W], labels [b] -> what the network sees [b, 3, H, W], soft targets [b, C]."""
    if drawn.crop is not None:
        x = augment.crop(x, drawn.crop, run.crop_padding)
    if drawn.flip is not None:
        x = augment.flip(x, drawn.flip)
    if drawn.operations:
        x = augment.rand_augment(x, drawn.operations)
    x = augment.normalize(x, dataset.mean, dataset.std)
    return augment.mixup(x, y, num_classes, drawn.lam, run.smoothing)


@torch.no_grad()
def teach(teacher: nn.Module, x: Tensor, rows: Tensor | None, num_old: int) -> Tensor:
    """The teacher's logits [B, num_old]. It sees only `rows` [B], None for all; the others are zero."""
    if rows is None:
        return teacher(x)
    logits = x.new_zeros(len(x), num_old)
    rows = rows.to(x.device)
    if rows.any():
        logits[rows] = teacher(x[rows]).float()
    return logits


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
                x = augment.crop(x, draws.crop_offsets(len(x), run.crop_padding, generator), run.crop_padding)
        x = augment.normalize(x.to(device), dataset.mean, dataset.std)
        features.append(model.forward_features(x).flatten(1).cpu())
    return torch.cat(parallel.join(features, len(batches)))


def frozen_parts(directory: RunDir, phase: Phase) -> Callable[[str], bool]:
    """Whether a parameter name is frozen in this phase (cil.methods)."""
    method = METHODS[directory.run.method]
    if phase.name == "finetune":
        return lambda name: not is_part(name, method.finetuned)
    if directory.run.training != "incremental":
        return lambda name: False
    old = [part.format(old=t) for part in method.frozen for t in range(phase.task)]
    return lambda name: is_part(name, old)


def is_part(name: str, parts: list[str] | tuple[str, ...]) -> bool:
    """Whether a parameter is one of `parts` or lies in one: heads.1.fc in heads.1, heads.10.fc not."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def freeze(model: nn.Module, frozen: Callable[[str], bool], frozen_eval: bool = True) -> None:
    """Gradients off where `frozen(name)`; modules whose parameters are all frozen go to eval mode, the others train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
    model.train()
    for module in model.modules() if frozen_eval else ():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


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
    return replace(dataset, train=dataset.train.with_labels(train), test=dataset.test.with_labels(test))


def finish_task(directory: RunDir, task: int, model: Incremental, rows: pd.DataFrame) -> None:
    """Accuracy, then weights: with them the task is finished."""
    old = directory.table("accuracy")
    if old is None or task not in set(old["task"]):
        directory.extend("accuracy", rows)
    directory.save_task(task, model)


def append_training(directory: RunDir, rows: list[tuple]) -> None:
    """Add epochs to training.csv; an epoch that is run again after an interruption replaces its row."""
    new = pd.DataFrame(rows, columns=list(TRAINING.columns))
    old = directory.table("training")
    if len(new) or old is None:
        both = new if old is None else pd.concat([old, new])
        TRAINING.write(both.drop_duplicates(list(TRAINING.keys), keep="last"), directory.path / "training.csv")
