"""States inside a task, from which an interrupted run goes on: RUN/resume/STEP.state, the last two.

A state is what torch.save writes, followed by its SHA-256 [32 bytes]; STEP is the number of steps of the run. What is in
one is said by the keys in cil.fit.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from cil.checkpoint import RunDir
from cil.files import atomically

KEYS = {"model", "optimizer", "task", "phase", "epoch", "step", "sums", "seconds"}  # of a state, as cil.fit has them


def save(directory: RunDir, step: int, state: dict[str, object]) -> None:
    """Keep `state` after so many steps of the run, with its SHA-256, and the state before it.

    Raises OSError that says that the last state is as it was, when the disk is full, say.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    folder = directory.resume_folder
    folder.mkdir(exist_ok=True)
    try:
        digest = hashlib.sha256(content).digest()
        atomically(folder / f"{step:09d}.state", lambda part: part.write_bytes(content + digest))
    except OSError as error:
        why = f"{error.strerror or error}; the state before it and finished tasks {directory.tasks} are as they were"
        raise OSError(error.errno, why, str(folder)) from None
    there = states(directory)
    here = next(n for n, path in enumerate(there) if int(path.stem) == step)
    for other in there[:here] + there[here + 2 :]:  # those of later steps were torn, or this would not be now
        other.unlink()


def load(directory: RunDir, task: int) -> dict[str, Any] | None:
    """The newest whole state inside `task`, or None. A state that is torn counts as not there."""
    for path in states(directory):
        content = path.read_bytes()
        content, digest = content[:-32], content[-32:]
        if hashlib.sha256(content).digest() != digest:
            continue
        try:
            state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
            continue  # whole, and nothing that a trainer wrote
        if isinstance(state, dict) and state.keys() >= KEYS and state["task"] == task:
            return state
    return None


def states(directory: RunDir) -> list[Path]:
    """The files of the states, newest first."""
    named = (path for path in directory.resume_folder.glob("*.state") if re.fullmatch(r"\d{9,}", path.stem))
    return sorted((path for path in named if path.is_file()), reverse=True)


def last_good(directory: RunDir) -> str:
    """What training goes on from, in words."""
    there = states(directory)
    return str(there[0]) if there else f"finished tasks {directory.tasks} of {directory.path}"
