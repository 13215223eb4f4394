"""The run directory: the only contract between trainer and instrument.

run.json              the resolved Run, class order, pixel statistics, versions, git state, twin
start.safetensors     of a run that starts from weights: the backbone with them, before task 0
task_00.safetensors   the network after each task
task_00_step_000100.safetensors   inside a task, after so many steps of the network (setting checkpoints)
accuracy.csv, training.csv, memory/task_00.csv     cil.tables
resume/               only while unfinished: the last two states inside a task, by their number of steps
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pandas as pd
from filelock import FileLock, Timeout
from safetensors.torch import save

from cil.data import Dataset
from cil.device import processor
from cil.files import atomically, check_run, git_state, read_json, versions, write_json
from cil.methods import METHODS
from cil.models import Incremental, IncrementalTimm, create_model
from cil.opened import accuracy_of, check_description
from cil.run import FORMAT, Run, randomness
from cil.scenario import Scenario, class_order
from cil.tables import ACCURACY, AFTER, MEMORY, TRAINING, Table
from cil.tensors import load_weights, read_safetensors
from cil.weights import load_backbone
from cil.weights import read as read_weights

# Which numbers training gives: runs of two trainers are never compared, and one does not go on with the other's.
# 1: AdamW step by step, stochastic depth drawn on the device. 2: fused AdamW, all draws on the CPU (cil.draws).
TRAINER = 2
START = "start.safetensors"
LOCK = ".lock"  # the file in a run directory that a trainer holds locked
LOCK_WAIT = 0.2  # seconds for which a trainer tries; whoever only asks whether it is locked holds it for much less
TABLES: dict[str, Table] = {"accuracy": ACCURACY, "training": TRAINING}


@dataclass(frozen=True)
class RunDir:
    """A run on disk. `path` holds run.json; everything that rebuilds its networks without the data set is here."""

    path: Path
    run: Run
    image_size: tuple[int, int]
    class_order: list[int]
    classes: list[str]  # names, in class order
    mean: tuple[float, ...]
    std: tuple[float, ...]
    versions: dict[str, str]
    git: str | None
    joint_twin: str | None  # name of the sibling directory with the joint counterpart
    twin_of: str | None
    trainer: int = TRAINER  # whose numbers these are
    device: str = ""  # the processor that it was begun on

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))  # also of "."

    @property
    def scenario(self) -> Scenario:
        return Scenario(self.run.scenario, len(self.classes))

    @property
    def planned_tasks(self) -> list[int]:
        """Tasks that a model is trained for: all, or the last one alone for joint training on all classes at once."""
        tasks = list(range(len(self.scenario)))
        return tasks[-1:] if self.run.training in ("joint-terminal", "joint-as-long") else tasks

    @property
    def tasks(self) -> list[int]:
        """Finished tasks."""
        return [t for t in self.planned_tasks if self.weights_path(t).is_file()]

    @property
    def finished(self) -> bool:
        """Whether all planned tasks are there, with their accuracy."""
        return self.tasks == self.planned_tasks and (self.path / "accuracy.csv").is_file()

    def require(self, tasks: Iterable[int] = ()) -> None:
        """Raises ValueError, always in the same words, unless there is a finished task and all of `tasks` are finished."""
        if not self.tasks:
            raise ValueError(f"{self.path} has no finished task yet; locality-probe train goes on with it")
        missing = sorted(set(tasks) - set(self.tasks))
        if missing:
            raise ValueError(f"no task {missing[0]} in {self.path}; there: {', '.join(map(str, self.tasks))}")

    def weights_path(self, task: int, at_step: int = AFTER) -> Path:
        """Of the network after `task`, or inside it after `at_step` steps."""
        inside = "" if at_step == AFTER else f"_step_{at_step:06d}"
        return self.path / f"task_{task:02d}{inside}.safetensors"

    def checkpoints(self, task: int) -> list[int]:
        """The numbers of steps, ascending, at which the network was kept inside `task`."""
        names = (re.fullmatch(rf"task_{task:02d}_step_(\d+)\.safetensors", p.name) for p in self.path.glob("task_*"))
        return sorted(int(match[1]) for match in names if match)

    def new_model(self, task: int) -> Incremental:
        """The network before it is trained: of task 0, or for joint training of `task` with all its classes.

        From the run's seed, and from the weights that it starts from. Raises ValueError where those are not there any more.
        """
        model = self.untrained(task)
        if self.run.weights:
            if not (self.path / START).is_file():
                raise ValueError(
                    f"{self.path / START} is not there, from which the run starts: bring it back, or train anew"
                )
            load_weights(cast(IncrementalTimm, model).backbone, read_safetensors(self.path / START), self.path / START)
        return model

    def untrained(self, task: int) -> Incremental:
        """`new_model` with all of it from the run's seed."""
        joint = self.run.training != "incremental"
        with randomness(self.run.seed, "init", task if joint else 0):
            model = create_model(self.run, self.image_size)
            model.grow(len(self.scenario[: task + 1].labels) if joint else len(self.scenario[0].labels))
        return model

    def grow(self, model: Incremental, task: int) -> None:
        """Add `task` to an incremental network, with the run's own draws."""
        with randomness(self.run.seed, "grow", task):
            model.grow(len(self.scenario[task].labels), divergence=METHODS[self.run.method].divergence > 0)

    def model(self, task: int, at_step: int = AFTER) -> Incremental:
        """The network after `task`, or inside it after `at_step` steps, in eval mode on the CPU.

        Raises ValueError for a task or checkpoint that is not there, truncated or foreign weights, and weights that are not
        finite.
        """
        if at_step == AFTER:
            self.require([task])
        if at_step != AFTER and at_step not in self.checkpoints(task):
            there = ", ".join(map(str, self.checkpoints(task))) or "none"
            raise ValueError(f"no checkpoint at step {at_step} of task {task} in {self.path}; there: {there}")
        path = self.weights_path(task, at_step)
        state, model = read_safetensors(path), self.grown_model(task)
        load_weights(model, state, path)
        return model.eval()

    def grown_model(self, task: int) -> Incremental:
        """A network of the shape that it has after `task`; its weights mean nothing yet."""
        model = self.untrained(task)
        if self.run.training == "incremental":
            with randomness(self.run.seed, "shape"):  # the caller's random numbers stay as they are
                for later in range(1, task + 1):
                    model.grow(len(self.scenario[later].labels))
        return model

    def table(self, name: str) -> pd.DataFrame | None:
        """accuracy or training, or None before the first row."""
        path = self.path / f"{name}.csv"
        return TABLES[name].read(path) if path.exists() else None

    def written(self, name: str) -> pd.DataFrame:
        """accuracy or training, of what has been trained. Raises ValueError where the table, or a row of it, is not there."""
        return accuracy_of(self) if name == "accuracy" else TABLES[name].read(self.path / f"{name}.csv")

    def extend(self, name: str, rows: pd.DataFrame) -> None:
        """Append rows to a table."""
        old = self.table(name)
        TABLES[name].write(rows if old is None else pd.concat([old, rows]), self.path / f"{name}.csv")

    def size_on_disk(self) -> int:
        """Bytes that the finished run will take, and at its largest the two states beside it."""
        sizes = [4 * sum(v.numel() for v in self.grown_model(t).state_dict().values()) for t in self.planned_tasks]
        times = len(self.planned_tasks) if self.run.training == "joint" else 1  # of which each starts at step 0
        return sum(sizes) + (bool(self.run.weights) + 2 * 3 + times * len(self.run.checkpoint_steps)) * sizes[-1]

    def memory(self, task: int) -> pd.DataFrame | None:
        """Exemplars after `task`, or None."""
        path = self.memory_path(task)
        return MEMORY.read(path) if path.exists() else None

    def memory_path(self, task: int) -> Path:
        return self.path / "memory" / f"task_{task:02d}.csv"

    def save_memory(self, task: int, memory: pd.DataFrame) -> None:
        """Write the exemplars after `task`."""
        self.memory_path(task).parent.mkdir(exist_ok=True)
        MEMORY.write(memory, self.memory_path(task))

    def save_task(self, task: int, model: Incremental) -> None:
        """Write the weights that count for `task`; from then on the task is finished."""
        self._save_weights(self.weights_path(task), model)
        shutil.rmtree(self.resume_folder, ignore_errors=True)

    @property
    def resume_folder(self) -> Path:
        """Of the states inside the task that is under way (cil.resume); there only while there is one."""
        return self.path / "resume"

    def save_checkpoint(self, task: int, at_step: int, model: Incremental) -> None:
        """Write the weights inside `task`, without the divergence head, which is for training alone."""
        self._save_weights(self.weights_path(task, at_step), model)

    def _save_weights(self, path: Path, model: Incremental) -> None:
        state = {
            k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("div_head.")
        }
        atomically(path, lambda part: part.write_bytes(save(state)))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory against a second trainer. Raises ValueError when there is one.

        The lock is the operating system's: it ends with the process that holds it, however that ends.
        """
        held = FileLock(self.path / LOCK, timeout=LOCK_WAIT)
        try:
            held.acquire(poll_interval=LOCK_WAIT / 10)
        except Timeout:
            raise ValueError(f"another process is training in {self.path}") from None
        try:
            yield
        finally:
            held.release()


def is_locked(path: Path) -> bool:
    """Whether a process trains in the run directory `path`, without disturbing it.

    Who asks holds the lock for an instant: a trainer that starts then waits for that, and so does another who asks. A
    directory that this process may not write to counts as not locked.
    """
    if not (path / LOCK).is_file():
        return False
    try:
        with FileLock(path / LOCK, timeout=LOCK_WAIT / 4).acquire(poll_interval=LOCK_WAIT / 40):
            return False
    except Timeout:
        return True
    except PermissionError:
        return False


def describe(path: str | Path, run: Run, dataset: Dataset, device: str = "cpu") -> RunDir:
    """The run directory that `run` would have, without writing anything. Raises ValueError where run and data do not fit."""
    path, name = Path(path), os.path.basename(os.path.abspath(path))
    order = class_order(run.class_order, len(dataset.classes))
    if run.num_classes > len(order):
        raise ValueError(f"num_classes={run.num_classes}, but {run.dataset} has {len(order)}")
    order = order[: run.num_classes or None]
    incremental, suffix = run.training == "incremental", "-" + run.training
    directory = RunDir(
        path, run, dataset.image_size, order, [dataset.classes[c] for c in order], dataset.mean, dataset.std,
        versions(), git_state(),
        joint_twin=f"{name}-joint" if incremental else None,
        twin_of=name.removesuffix(suffix) if not incremental and name.endswith(suffix) else None, device=processor(device),
    )  # fmt: skip
    directory.untrained(directory.planned_tasks[0])  # whatever does not fit together says so here
    return directory


def create(path: str | Path, run: Run, dataset: Dataset, device: str = "cpu", weights: Path | None = None) -> RunDir:
    """Start a run directory, or open the one that is there if it holds the same run.

    weights: the file that a new run starts from. Raises ValueError if the directory holds another run, or one that another
    trainer has begun and not finished, and for weights that do not fit.
    """
    path = Path(path)
    if (path / "run.json").exists():
        return open_same(path, run)
    if path.exists() and (not path.is_dir() or any(not p.name.startswith(".") for p in path.iterdir())):
        raise ValueError(f"{path} is not empty and holds no run.json; choose another --out")
    directory = describe(path, run, dataset, device)
    start = None if weights is None else _start(directory, weights)
    path.mkdir(parents=True, exist_ok=True)
    if start is not None:
        atomically(path / START, lambda part: part.write_bytes(start))
    content = {"format": FORMAT, "run": run.to_dict()}
    content |= {k: v for k, v in vars(directory).items() if k not in ("path", "run")}
    write_json(path / "run.json", content)
    return directory


def _start(directory: RunDir, weights: Path) -> bytes:
    """The backbone of a run with the weights that it starts from, as a safetensors file."""
    model = cast(IncrementalTimm, directory.untrained(directory.planned_tasks[0]))
    load_backbone(model.backbone, read_weights(weights), model.added)
    return save({name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()})


def open_same(path: str | Path, run: Run) -> RunDir:
    """Open the run directory of `run`. Raises ValueError if it holds another run, or one that another trainer has begun and
    not finished."""
    there = open_run(path)
    differ = there.run.differences(run)
    if differ:
        what = ", ".join(f"{n}={mine} there, {asked} asked" for n, (mine, asked) in sorted(differ.items()))
        raise ValueError(f"{path} holds another run ({what}); choose another --out")
    if there.trainer != TRAINER and not there.finished:
        raise ValueError(
            f"{path} was begun by an earlier version (trainer {there.trainer}), whose numbers differ from this one's "
            f"(trainer {TRAINER}): finish it with that version ({there.git or 'unknown commit'}), or choose another --out"
        )
    return there


def open_run(path: str | Path) -> RunDir:
    """Open a run directory. Raises ValueError when it is not there, no run, or of another version."""
    path = check_run(path)
    content = read_json(path / "run.json")
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path / 'run.json'} is damaged: it is not the JSON that a run writes")
    version = content.pop("format")
    if type(version) is not int or version not in range(1, FORMAT + 1):
        raise ValueError(f"{path} was written in format {version}; this version reads formats 1 to {FORMAT}")
    if version == 1:
        content = {"trainer": 1, "device": ""} | content
    names = ["run", *(f.name for f in dataclasses.fields(RunDir) if f.name not in ("path", "run"))]
    missing, unknown = [n for n in names if n not in content], [n for n in content if n not in names]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has the unknown {', '.join(unknown)}"
        raise ValueError(f"{path / 'run.json'} {wrong}: it was written by another version")
    try:
        if not isinstance(content["run"], dict):
            raise ValueError("run holds no settings")
        check_description(content)
        run = Run.from_dict(content.pop("run"), version)
        for field in ("image_size", "mean", "std"):
            content[field] = tuple(content[field])
        directory = RunDir(path, run, **content)
        _ = directory.scenario  # a scenario that is none says so here
        return directory
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'run.json'} does not fit this version: {error}") from None
