"""fit: one phase of training, step by step, from the last saved state if there is one; Learner: what a step is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil import augment, draws, losses, parallel, resume
from cil.checkpoint import RunDir
from cil.data import Dataset
from cil.device import excuse, send
from cil.draws import Draws
from cil.graphs import Replay
from cil.methods import METHODS
from cil.models import Incremental, drop_path_calls
from cil.run import Run, randomness
from cil.schedule import Phase, epoch_batches, learning_rate, plan, steps_before, total_steps
from cil.session import Progress, Session
from cil.tables import TRAINING

READ_EVERY = 50  # steps on a GPU, which loss and accuracy stay on meanwhile; a CPU has nothing to wait for
# On a GPU, of images in an operation of RandAugment and of rows to distil: rounded up, so that few graphs are captured.
PLACES, ROWS = 32, 64
SAVE_EVERY = 20.0  # seconds between two states, what a kill costs; more where saving would take 2 % of the time


def fit(
    directory: RunDir, dataset: Dataset, model: Incremental, phase: Phase, teacher: nn.Module | None, session: Session
) -> Incremental:
    """Train `model` in place for the epochs of one phase, and return it in eval mode.

    A phase that was interrupted goes on from its saved state; one that is already over is left as it is. Raises ValueError
    for a loss that is not finite, OSError when a state cannot be written, KeyboardInterrupt after a signal.
    """
    run, labels = directory.run, dataset.train.labels
    state = resume.load(directory, phase.task)
    if state and phase.name == "fit" and state["phase"] == "finetune":
        return model  # the result of this phase is in the state that fine-tuning goes on from
    freeze(model, frozen_parts(directory, phase), run.frozen_eval)
    learner = Learner(directory, dataset, model, teacher, phase.task, session.device)
    at = Position()
    if state and state["phase"] == phase.name:
        model.load_state_dict(state["model"])
        learner.optimizer.load_state_dict(state["optimizer"])
        at = Position.of(state)
    phases = plan(directory, dataset)
    before, total = steps_before(phases, phase), total_steps(phases)
    keeper = Keeper(directory, phase, learner, before)
    if at == Position() and keeper.wants_checkpoint(0):
        keeper.keep_checkpoint(0)
    every = 1 if torch.device(session.device).type == "cpu" else READ_EVERY
    alone = parallel.size() == 1  # otherwise all processes read at the same steps
    session.in_epoch = True
    while at.epoch < phase.epochs:
        epoch, began = at.epoch, time.perf_counter() - at.seconds
        learner.set_learning_rate(learning_rate(run, phase, epoch))
        learner.sums.copy_(at.sums)
        # Image indices [B], and what of this process's images is sent: their indices or pixels.
        for batch, x in rest_of_epoch(run, dataset, phase, at):
            learner.step(x, labels[batch], (phase.task, phase.name, epoch, at.step))
            at.step += 1
            taken = at.steps_taken(phase)
            wanted = keeper.wants_checkpoint(taken)
            hurry = alone and (session.asked or keeper.is_due)
            if taken % every and at.step < phase.steps and not (wanted or hurry):
                continue
            # Here alone the host waits for the device; nothing is saved that was not looked at.
            loss, hits, steps = at.read(learner.sums)
            if not math.isfinite(loss):
                which = f"step {at.step - 1}" if steps == 1 else f"one of steps {at.step - steps} to {at.step - 1}"
                raise ValueError(
                    f"the loss is {loss} in task {phase.task}, {phase.name} epoch {epoch}, {which}, at learning rate "
                    f"{learner.learning_rate:.3g}; the last good state: {resume.last_good(directory)}"
                )
            if wanted:
                keeper.keep_checkpoint(taken)
            where = phase.task, len(directory.scenario), phase.name, epoch, phase.epochs
            images = len(batch) * steps
            session.report(Progress(*where, loss, hits, before + taken, total, images, steps, directory.name))
            at.seconds = time.perf_counter() - began
            if at.step == phase.steps:
                keeper.add_epoch(at, phase.steps * len(batch), learner.learning_rate)
                at = Position(epoch + 1)
            stop = parallel.anywhere(session.asked > 0)
            if stop or at.epoch == phase.epochs or keeper.is_due:
                keeper.save(at)
            if stop:
                raise KeyboardInterrupt
    session.in_epoch = False
    model.requires_grad_(True)
    return model.eval()


@dataclass
class Position:
    """Where in a phase training stands: before the step `step` of the epoch `epoch`, both from 0.

    What a saved state holds of it are its fields, under their names.
    """

    epoch: int = 0
    step: int = 0
    # Of the steps that this epoch has behind it: the sums of their losses and accuracies [2], and their time.
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64), compare=False)
    seconds: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """The position that a saved state was written at."""
        return cls(**{f.name: state[f.name] for f in fields(cls)})

    def __post_init__(self) -> None:
        self.steps_read = self.step  # up to where `sums` go

    def read(self, sums: Tensor) -> tuple[float, float, int]:
        """Take over the device's `sums`; mean loss and accuracy of the steps since the last reading, and their number."""
        now, steps = sums.to("cpu", torch.float64, copy=True), self.step - self.steps_read
        loss, accuracy = ((now - self.sums) / steps).tolist()
        self.sums, self.steps_read = now, self.step
        return loss, accuracy, steps

    def steps_taken(self, phase: Phase) -> int:
        """Steps of the phase up to here."""
        return self.epoch * phase.steps + self.step


def rest_of_epoch(run: Run, dataset: Dataset, phase: Phase, at: Position) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the epoch from `at` on: indices of the whole batch [B], and what is sent of this process's rows."""
    batches, seeds = (whole[at.step :] for whole in epoch_batches(run, phase, at.epoch))
    rows = [parallel.rows(len(batch)) for batch in batches]
    images = dataset.train.arrivals(
        [batch[r] for batch, r in zip(batches, rows, strict=True)],
        [seed[r] for seed, r in zip(seeds, rows, strict=True)],
    )
    return zip(batches, images, strict=True)


class Keeper:
    """What a phase leaves in the run directory while it is trained: states, rows of training.csv, weights between tasks.

    before: steps of the run before the phase. Process 0 alone writes.
    """

    def __init__(self, directory: RunDir, phase: Phase, learner: Learner, before: int):
        self.directory, self.phase, self.learner, self.before = directory, phase, learner, before
        # Steps that this network has behind it: a joint network starts with its phase.
        self.network_before = before if directory.run.training == "incremental" else 0
        self.wanted = set(directory.run.checkpoint_steps)
        self.rows: list[tuple] = []  # of training.csv, of epochs that ended after the last state
        self.last_saved, self.pause = time.monotonic(), SAVE_EVERY

    def wants_checkpoint(self, taken: int) -> bool:
        """Whether the run asks for the weights after so many steps of the phase (setting `checkpoints`)."""
        return (taken > 0 or not self.network_before) and self.network_before + taken in self.wanted

    def keep_checkpoint(self, taken: int) -> None:
        """Keep the weights after so many steps of the phase."""
        if parallel.rank() == 0:
            self.directory.save_checkpoint(self.phase.task, self.network_before + taken, self.learner.model)

    def add_epoch(self, at: Position, images: int, lr: float) -> None:
        """The row of an epoch whose last step was taken; it is written with the next state."""
        means = (at.sums / self.phase.steps).tolist()
        epoch = self.phase.task, self.phase.name, at.epoch
        self.rows.append((*epoch, self.phase.steps, images, *means, lr, at.seconds))

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next state."""
        return time.monotonic() - self.last_saved > self.pause

    def save(self, at: Position) -> None:
        """Write the state at this position, and the rows of the epochs before it. Raises OSError as resume.save does."""
        if parallel.rank() != 0:
            return
        began = time.monotonic()
        append_training(self.directory, self.rows)
        state: dict[str, Any] = {
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
        }
        state |= {"task": self.phase.task, "phase": self.phase.name} | {f.name: getattr(at, f.name) for f in fields(at)}
        resume.save(self.directory, self.before + at.steps_taken(self.phase), state)
        self.rows, self.last_saved = [], time.monotonic()
        self.pause = max(SAVE_EVERY, 50 * (self.last_saved - began))


class Outputs(nn.Module):
    """What a step computes with the network: images [b, 3, H, W] -> its logits [b, C] and those of its divergence head."""

    def __init__(self, model: Incremental):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(x)
        logits = self.model.forward_head(features)
        return (logits,) if self.model.div_head is None else (logits, self.model.div_head(features[:, -1]))


class Learner:
    """One optimiser step after another on one task, `step` being all that happens to a batch."""

    def __init__(
        self, directory: RunDir, dataset: Dataset, model: Incremental, teacher: nn.Module | None, task: int, device: str
    ):
        run, scenario = directory.run, directory.scenario
        self.run, self.dataset, self.model, self.teacher, self.device = run, dataset, model, teacher, device
        self.outputs = parallel.summing(Outputs(model))
        self.num_classes = len(scenario[: task + 1].labels)
        self.num_old = scenario[task].labels.start if run.training == "incremental" else 0
        self.divergence = METHODS[run.method].divergence
        self.drop_paths = drop_path_calls(model, directory.image_size)
        precise = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.sums = torch.zeros(2, dtype=precise, device=device)  # of loss and accuracy, of the steps taken so far
        augment.make_constants(dataset.mean, dataset.std, str(self.sums.device))
        groups, self.learning_rate = model.parameter_groups(run.weight_decay), run.lr
        self.optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        graphs = torch.device(device).type == "cuda" and torch.cuda.is_available() and parallel.size() == 1
        self.replay = Replay(model.parameters(), self.sums) if graphs else None

    def set_learning_rate(self, lr: float) -> None:
        self.learning_rate = lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def step(self, x: Tensor, y: Tensor, place: tuple) -> None:
        """x: this process's images, as dataset.train.arrivals gives them; y: labels of the whole batch [B]; place: names the
        random draws. On a GPU one copy goes there and nothing comes back: loss and accuracy are added to `sums`.
        """
        run, on_cpu = self.run, torch.device(self.device).type == "cpu"
        distilled = y < self.num_old if run.kd_rows == "old" else None  # None: all
        taught = self.teacher is not None and run.kd and (distilled is None or bool(distilled.any()))
        with parallel.batch(len(y)), randomness(run.seed, *place) as generator:
            calls = [(path.p, shape) for path, shape in self.drop_paths]
            drawn = draws.of_step(run, len(y), calls, generator, 1 if on_cpu else PLACES)
            if drawn.lam is not None and not on_cpu:
                drawn = drawn._replace(lam=torch.tensor(drawn.lam))
            mine, whole = None, None  # the rows to distil, of this process's images and of all
            if distilled is not None:
                mine, whole = (Rows.where(rows, 1 if on_cpu else ROWS) for rows in (parallel.own(distilled), distilled))
            self.learn((x, parallel.own(y), taught, mine, whole, drawn))
        self.optimizer.step()

    def learn(self, parts: tuple) -> None:
        """`attempt` on these parts once they are sent, with gradients that were not there before."""
        if self.replay is not None:
            self.replay(self.attempt, parts)
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.attempt(*send(parts, self.device))

    def attempt(self, *parts: Any) -> None:
        """`on_device`, a second time where something in it has no deterministic kernel."""
        try:
            self.on_device(*parts)
        except RuntimeError as error:
            excuse(error)
            self.optimizer.zero_grad(set_to_none=True)
            self.on_device(*parts)

    def on_device(
        self, x: Tensor, y: Tensor, taught: bool, mine: Rows | None, whole: Rows | None, drawn: Draws
    ) -> None:
        """From what was sent to gradients and `sums`: everything of a step that happens on the device, but the optimiser."""
        run = self.run
        x = self.dataset.train.pixels(x)
        x, targets = augmented(run, x, y, self.num_classes, self.dataset, drawn)
        for path, _ in self.drop_paths:
            path.kept.clear()  # what work that failed has left
        for (path, _), kept in zip(self.drop_paths, drawn.drop_path, strict=True):
            path.kept.append(kept)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=run.amp == "bf16"):
            teacher = self.teacher if taught else None
            old_logits = None if teacher is None else teach(teacher, x, mine, self.num_old)
            logits, *div_logits = self.outputs(x)
        # From here on, the whole batch: the loss does not depend on how many processes shared it.
        logits, targets = parallel.gather(logits.float()), parallel.gather(targets)
        old_logits = parallel.gather(old_logits.float()) if old_logits is not None else None
        which, weights = whole or (None, None)
        bce, kd = losses.auto_kd(logits, targets, old_logits, which, run.kd_tau, weights)
        loss = bce + kd
        for of_head in div_logits:
            seen = parallel.gather(of_head.float())
            loss = loss + self.divergence * losses.divergence(seen, targets, self.num_old)
        loss.backward()
        hits = (logits.argmax(1) == targets.argmax(1)).float().mean()
        self.sums += torch.stack([loss.detach(), hits])


def augmented(
    run: Run, x: Tensor, y: Tensor, num_classes: int, dataset: Dataset, drawn: Draws
) -> tuple[Tensor, Tensor]:
    """uint8 [b, 3, H, W], labels [b] -> what the network sees [b, 3, H, W], soft targets [b, C]."""
    if drawn.crop is not None:
        x = augment.crop(x, drawn.crop, run.crop_padding)
    if drawn.flip is not None:
        x = augment.flip(x, drawn.flip)
    if drawn.operations is not None:
        x = augment.rand_augment(x, drawn.operations)
    x = augment.normalize(x, dataset.mean, dataset.std)
    return augment.mixup(x, y, num_classes, drawn.lam, run.smoothing)


class Rows(NamedTuple):
    """Some rows of a batch, and fillers."""

    which: Tensor  # int64 [k]
    weights: Tensor | None  # float32 [k], 0 for a filler and 1 for the others; None: there are no fillers

    @classmethod
    def where(cls, chosen: Tensor, multiple: int) -> Rows:
        """The rows where `chosen`, bool [B], and row 0 as often as makes k a multiple."""
        index = chosen.nonzero().squeeze(1)
        if multiple == 1:
            return cls(index, None)
        fillers = -len(index) % multiple if len(index) else multiple
        return cls(F.pad(index, (0, fillers)), F.pad(torch.ones(len(index)), (0, fillers)))


@torch.no_grad()
def teach(teacher: nn.Module, x: Tensor, rows: Rows | None, num_old: int) -> Tensor:
    """The teacher's logits [B, num_old]. It sees only `rows`, None for all; the others are zero."""
    if rows is None:
        return teacher(x)
    logits = x.new_zeros(len(x), num_old)
    if len(rows.which):
        logits[rows.which] = teacher(x[rows.which]).float()
    return logits


def frozen_parts(directory: RunDir, phase: Phase) -> Callable[[str], bool]:
    """Whether a parameter name is frozen in this phase (cil.methods, and the setting positional_frozen)."""
    run, method = directory.run, METHODS[directory.run.method]
    if phase.name == "finetune":
        return lambda name: not is_part(name, method.finetuned)
    old = (
        [part.format(old=t) for part in method.frozen for t in range(phase.task)]
        if run.training == "incremental"
        else []
    )
    return lambda name: is_part(name, old) or (run.positional_frozen and name.endswith(".pos_weight"))


def is_part(name: str, parts: list[str] | tuple[str, ...]) -> bool:
    """Whether a parameter is one of `parts` or lies in one: heads.1.fc in heads.1, heads.10.fc not."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def freeze(model: nn.Module, frozen: Callable[[str], bool], frozen_eval: bool = True) -> None:
    """Gradients off where `frozen(name)`, and where the model keeps a parameter as it is; modules whose parameters are all
    frozen go to eval mode, the others train."""
    kept: frozenset[str] = getattr(model, "kept", frozenset())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (name in kept or frozen(name)))
    model.train()
    for module in model.modules() if frozen_eval else ():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def append_training(directory: RunDir, rows: list[tuple]) -> None:
    """Add epochs to training.csv; an epoch that is run again after an interruption replaces its row."""
    new = pd.DataFrame(rows, columns=list(TRAINING.columns))
    old = directory.table("training")
    if len(new) or old is None:
        both = new if old is None else pd.concat([old, new])
        TRAINING.write(both.drop_duplicates(list(TRAINING.keys), keep="last"), directory.path / "training.csv")
