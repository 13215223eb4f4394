"""The worker: what a process of a sweep does, here or on a node of the cluster."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

import torch
from submitit.core.utils import DelayedSubmission

from cil.device import resolve
from cil.progress import training
from cil.run import Run
from cil.session import Progress
from cil.train import train


def train_job(run: Run, path: Path, device: str, threads: int, gpu: str | None, parent: int | None) -> None:
    """Train `run` in a process of the sweep; on SIGTERM, or when the process `parent` was killed, save and end.

    gpu: what CUDA_VISIBLE_DEVICES becomes, or None to train on `device`. Raises ValueError as `train` and `resolve` do.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # submitit ignores it
    faulthandler.enable()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"], device = gpu, "cuda"
    else:
        device = resolve(device)
    torch.set_num_threads(threads)
    told = Path(os.environ.get("SUBMITIT_FOLDER", "."), "told")  # a second SIGTERM would not wait for the step to end
    with training(path.name) as shown:

        def report(progress: Progress) -> None:
            shown(progress)
            try:
                os.kill(parent or os.getpid(), 0)  # asks only whether it is there
            except OSError:
                if not told.exists():
                    told.touch()
                    signal.raise_signal(signal.SIGTERM)

        train(run, path, device, report)


# A job with this attribute is put back into Slurm's queue before its time is up.
setattr(train_job, "checkpoint", lambda *arguments: DelayedSubmission(train_job, *arguments))  # noqa: B010
