"""Places: where the jobs of a sweep run, how many at once, with how many threads; and how a job is started there."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import torch
from submitit.core.utils import environment_variables

from cil.device import cores
from cil.sweep.jobs import Job
from cil.sweep.worker import train_job

FOREVER = 60 * 24 * 365 * 10  # minutes; submitit's local executor kills what takes longer, by default after 2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Place:
    """Where jobs run. slurm: parameters for sbatch, or None for processes of this machine, which end with the sweep."""

    folder: Path  # of submitit's files and logs, one folder per run
    device: str
    gpus: list[str | None]
    workers: int
    threads: int
    slurm: dict[str, Any] | None = None

    def __str__(self) -> str:
        gpus = ", ".join(filter(None, self.gpus))
        where = f"{self.device} {gpus}".rstrip()
        how = "through Slurm" if self.slurm is not None else "here"
        return f"{how}, {self.workers} at once on {where}, threads of each: {self.threads}; logs in {self.folder}"


def choose_workers(jobs: int, cores: int, gpus: int, workers: int | None, threads: int | None) -> tuple[int, int]:
    """Returns (runs at once, threads of each).

    By default each GPU has one run, with its share of the cores. Without a GPU each core has one run with one thread: that
    is fastest for networks of this size, and the numbers of a run then do not depend on how many cores there are.

    Raises ValueError for less than one of either.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    workers = min(jobs, workers or gpus or max(1, cores // (threads or 1)))
    return workers, threads or (max(1, cores // workers) if gpus else 1)


def visible_gpus(device: str) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for a run at each place that `device` offers; [None] where it is no CUDA device."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return [None]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names: list[str | None] = [*shown.split(",")] if shown else [str(i) for i in range(torch.cuda.device_count())]
    return [names[int(index)]] if index else names


def local_place(jobs: int, folder: Path, device: str, workers: int | None, threads: int | None) -> Place:
    gpus = visible_gpus(device)
    chosen = choose_workers(jobs, cores(), sum(gpu is not None for gpu in gpus), workers, threads)
    return Place(folder, device, gpus, *chosen)


def slurm_place(jobs: int, folder: Path, device: str, workers: int | None, threads: int | None, **given: Any) -> Place:
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise ValueError("--executor slurm needs sbatch and srun, and they are not here")
    workers, threads = choose_workers(jobs, 1, 0, workers or jobs, threads or given.get("cpus_per_task"))
    gpu = {"gpus_per_node": 1} if device.startswith("cuda") else {}
    slurm = {"time": 24 * 60, "cpus_per_task": threads} | gpu | given
    if not isinstance(slurm["time"], int):
        raise ValueError(f"--slurm time={slurm['time']} is no number of minutes")
    try:
        submitit.SlurmExecutor(folder).update_parameters(**slurm)
    except ValueError as error:  # a line that says it, then one for each parameter that there is
        raise ValueError(f"--slurm: {str(error).splitlines()[0]}") from None
    return Place(folder, device, [None], workers, threads, slurm)


EXECUTORS = {"local": local_place, "slurm": slurm_place}


def choose_place(
    executor: str, jobs: int, out: Path, device: str, workers: int | None, threads: int | None, slurm: list[str]
) -> Place:
    """Where that many jobs run. Raises ValueError for an unknown executor and for options that do not fit it."""
    if executor not in EXECUTORS:
        raise ValueError(f"no executor {executor!r}; there are: {', '.join(EXECUTORS)}")
    if slurm and executor != "slurm":
        raise ValueError("--slurm goes with --executor slurm")
    pairs = [setting.partition("=") for setting in slurm]
    if bad := [key for key, _, value in pairs if not value]:
        raise ValueError(f"--slurm {bad[0]} is not KEY=VALUE")
    given = {key: int(value) if value.isdecimal() else value for key, _, value in pairs}
    return EXECUTORS[executor](jobs, out / ".sweep", device, workers, threads, **given)


def submit(place: Place, job: Job, gpu: str | None) -> submitit.Job:
    """Start a job, in a new folder: submitit names files by process id, which an earlier job may have had, too."""
    folder = place.folder / job.name
    shutil.rmtree(folder, ignore_errors=True)
    local, named = place.slurm is None, {"job_name": job.name}
    executor = (submitit.LocalExecutor if local else submitit.SlurmExecutor)(folder)
    executor.update_parameters(**({"timeout_min": FOREVER} if place.slurm is None else named | place.slurm))
    # A terminal sends Ctrl-C to all its processes, and submitit would kill its job a second later. Children inherit what
    # is blocked, so the signal is the sweep's alone; nothing is lost, it comes when it is let in again.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        with environment_variables(**dict.fromkeys(THREAD_VARIABLES, place.threads)):
            arguments = (job.run, job.path, place.device, place.threads, gpu, os.getpid() if local else None)
            submitted = executor.submit(train_job, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    (folder / "job_id").write_text(submitted.job_id)
    return submitted


def adopted(place: Place, jobs: list[Job]) -> dict[str, submitit.Job]:
    """Jobs by name that an earlier sweep left in Slurm and that are not over."""
    if place.slurm is None:
        return {}
    ids = {job.name: place.folder / job.name / "job_id" for job in jobs}
    found: dict[str, submitit.Job] = {
        name: submitit.SlurmJob(id.parent, id.read_text()) for name, id in ids.items() if id.is_file()
    }
    return {name: submitted for name, submitted in found.items() if not submitted.done(force_check=True)}
