"""sweep(jobs, executor, out): runs through submitit, as many at once as there is room for, and one table of them all."""

from __future__ import annotations

import dataclasses
import faulthandler
import fcntl
import heapq
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import submitit
import torch
from submitit.core.utils import DelayedSubmission, environment_variables
from tqdm import tqdm

from cil import checkpoint, recipes
from cil.evaluate import scores
from cil.run import Run
from cil.schedule import plan, total_steps
from cil.train import Progress, in_class_order, load_dataset, train
from locality_probe.progress import training
from locality_probe.tables import SWEEP

POLL = 1.0  # seconds between two looks at the runs
SAY_EVERY = 30.0  # seconds between two lines about the time left, on no terminal
LEAVE = 30.0  # seconds that interrupted runs have to save their state while the sweep waits for them
FOREVER = 60 * 24 * 365 * 10  # minutes; submitit's local executor kills what takes longer, by default after 2
OVER = ("finished", "failed")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Row = dict[str, object]  # of SWEEP


@dataclass(frozen=True)
class Job:
    """One run of a sweep and its place. tasks and steps are the planned ones; `problem` says why it cannot be run.

    turn: runs of a smaller one are started first, and of the same turn the longest first.
    """

    run: Run
    path: Path
    tasks: int = 0
    steps: int = 0
    problem: str = ""
    turn: int = 0

    @property
    def name(self) -> str:
        return self.path.name


def parse_seeds(text: str) -> list[int]:
    """'0,1,2' -> [0, 1, 2]. Raises ValueError for what is no seed, and for one that is given twice."""
    seeds = [int(word) if word.strip().isdecimal() else -1 for word in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text} is no list of different whole numbers from 0, like 0,1,2")
    return seeds


def expand(names: list[str], seeds: list[int] | None, settings: list[str], out: Path) -> list[Job]:
    """Each recipe with each seed in out/BASE-sSEED[-TRAINING], like -joint, or without seeds in out/RECIPE.

    The kind of training stays last in the name, because that is how a run's joint twin is found.
    Raises ValueError for a recipe that is unknown or given twice, and for settings that do not fit.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"recipe {name} is given twice")
    for key in (setting.partition("=")[0] for setting in settings):
        if key in ("seed", "training", "recipe"):
            raise ValueError(f"--set {key} does not go with a sweep: there is --seeds, and NAME-joint is a recipe")
    jobs = []
    for name in names:
        run = recipes.find(name).change(settings)
        suffix = "" if run.training == "incremental" else f"-{run.training}"
        base = name.removesuffix(suffix)
        jobs += [Job(dataclasses.replace(run, seed=s), out / f"{base}-s{s}{suffix}") for s in seeds or []]
        jobs += [Job(run, out / name)] if seeds is None else []
    return jobs


def planned(jobs: list[Job]) -> list[Job]:
    """The jobs with their tasks and steps, or what is wrong with them; each data set is loaded once."""
    datasets, found = {}, []
    for job in jobs:
        key = (job.run.dataset, job.run.data_dir, job.run.image_size)
        try:
            datasets[key] = datasets.get(key) or load_dataset(job.run)
            directory = checkpoint.describe(job.path, job.run, datasets[key])
            steps = total_steps(plan(directory, in_class_order(datasets[key], directory)))
            found.append(dataclasses.replace(job, tasks=len(directory.planned_tasks), steps=steps))
        except ValueError as error:
            found.append(dataclasses.replace(job, problem=str(error)))
    return found


def choose_workers(jobs: int, cores: int, gpus: int, workers: int | None, threads: int | None) -> tuple[int, int]:
    """(runs at once, threads of each). By default a run a GPU with its share of the cores; without one, a run a core with one
    thread, which for networks of this size is fastest, and a run's numbers do not depend on how many there are.

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
    names = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    return [names[int(index)]] if index else names


def state_of(job: Job, ours: bool = False) -> Row:
    """The row of a job as its directory shows it; `ours`: this sweep has a process for it."""
    row = {"run": job.name, "recipe": job.run.recipe, "seed": job.run.seed, "state": "running" if ours else "waiting"}
    row |= {"tasks": 0, "of": job.tasks, "steps": 0, "of_steps": job.steps}
    row |= {"last": math.nan, "avg": math.nan, "fgt": math.nan, "seconds": 0.0, "reason": ""}
    try:
        if (job.path / "run.json").is_file():
            directory = checkpoint.create(job.path, job.run, None)  # opens it, or says that it holds another run
            row |= {"tasks": len(directory.tasks), "of": len(directory.planned_tasks)}
            epochs, accuracy = directory.table("training"), directory.table("accuracy")
            if epochs is not None:
                row |= {"steps": int(epochs["steps"].sum()), "seconds": float(epochs["seconds"].sum())}
            if directory.tasks == directory.planned_tasks and accuracy is not None:
                percent = {name.lower(): 100 * value for name, value in scores(accuracy, job.run.training).items()}
                return row | {k: v for k, v in percent.items() if k in row} | {"state": "finished"}
    except ValueError as error:
        return row | {"state": "failed", "reason": str(error)}
    if not ours and is_locked(job.path):
        return row | {"state": "running elsewhere"}
    return row | ({"state": "failed", "reason": job.problem} if job.problem else {})


def is_locked(path: Path) -> bool:
    """Whether a process trains in the directory. The lock that asks is a shared one, so that two who ask never collide."""
    try:
        with open(path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def train_job(run: Run, path: Path, device: str, threads: int, gpu: str | None, parent: int | None) -> None:
    """What a process of the sweep does: train; save and leave on SIGTERM, or when the process `parent` is gone unsaid."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # submitit ignores it
    faulthandler.enable()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"], device = gpu, "cuda"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
train_job.checkpoint = lambda *arguments: DelayedSubmission(train_job, *arguments)


@dataclass(frozen=True)
class Place:
    """Where jobs run. slurm: parameters for sbatch, or None for processes of this machine, which end with the sweep."""

    folder: Path  # of submitit's files and logs, a folder a run
    device: str
    gpus: list[str | None]
    workers: int
    threads: int
    slurm: dict[str, object] | None = None

    def __str__(self) -> str:
        where = f"{self.device} {', '.join(self.gpus)}" if self.gpus[0] else self.device
        how = "through Slurm" if self.slurm is not None else "here"
        return f"{how}, {self.workers} at once on {where}, threads of each: {self.threads}; logs in {self.folder}"


def local_place(jobs: int, folder: Path, device: str, workers: int | None, threads: int | None) -> Place:
    gpus, cores = visible_gpus(device), len(os.sched_getaffinity(0))
    return Place(folder, device, gpus, *choose_workers(jobs, cores, sum(g is not None for g in gpus), workers, threads))


def slurm_place(
    jobs: int, folder: Path, device: str, workers: int | None, threads: int | None, **given: int | str
) -> Place:
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
    local = place.slurm is None
    executor = (submitit.LocalExecutor if local else submitit.SlurmExecutor)(folder)
    executor.update_parameters(**({"timeout_min": FOREVER} if local else {"job_name": job.name} | place.slurm))
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
    ids = {} if place.slurm is None else {job.name: place.folder / job.name / "job_id" for job in jobs}
    found = {name: submitit.SlurmJob(id.parent, id.read_text()) for name, id in ids.items() if id.is_file()}
    return {name: submitted for name, submitted in found.items() if not submitted.done(force_check=True)}


def leave(place: Place, live: dict[str, submitit.Job]) -> str:
    """Have local jobs save their state and end, for at most LEAVE seconds; what there is to say then."""
    if place.slurm is not None:
        ids = " ".join(submitted.job_id for submitted in live.values())
        return f"{len(live)} jobs go on in Slurm, and the same command watches them; to end them: scancel {ids}\n"
    for submitted in live.values():
        if not submitted.done():
            (submitted.paths.folder / "told").touch()
            os.kill(int(submitted.job_id), signal.SIGTERM)  # submitit's controller, which passes it on
    until = time.monotonic() + LEAVE
    while (left := [name for name in live if not live[name].done()]) and time.monotonic() < until:
        time.sleep(0.1)
    return f"still in a step, and saved after it: {', '.join(left)}\n" if left else ""


def sweep(
    jobs: list[Job], place: Place, out: Path, watch: Callable[[list[Job]], None] = lambda finished: None
) -> pd.DataFrame:
    """Run what is not finished, turn by turn; returns its rows of SWEEP, which are in out/sweep.csv all the time.

    watch: is called at every look at the runs with those that have finished since the last one.

    A run that fails does not stop the others. Raises KeyboardInterrupt on Ctrl-C, SIGTERM and SIGHUP, after `leave`.
    """
    for kind in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) is not signal.SIG_IGN:  # as under nohup
            signal.signal(kind, signal.default_int_handler)
    place.folder.mkdir(parents=True, exist_ok=True)
    rows, show = {job.name: state_of(job) for job in jobs}, Display(out / "sweep.csv")
    jobs = sorted(jobs, key=lambda job: (job.turn, -job.steps))
    watch([job for job in jobs if rows[job.name]["state"] == "finished"])
    live, gpu_of = adopted(place, jobs), {}
    try:
        while any(row["state"] not in OVER for row in rows.values()):
            began, finished = time.monotonic(), []
            for job in jobs:
                if rows[job.name]["state"] in OVER:
                    continue
                rows[job.name] = look(job, live.get(job.name))
                if rows[job.name]["state"] in (*OVER, "running elsewhere"):
                    live.pop(job.name, None)
                finished += [job] * (rows[job.name]["state"] == "finished")
                if rows[job.name]["state"] == "waiting" and job.name not in live and len(live) < place.workers:
                    gpu_of[job.name] = min(place.gpus, key=[gpu_of.get(name) for name in live].count)
                    live[job.name] = submit(place, job, gpu_of[job.name])
                    rows[job.name] |= {"state": "running"}
            watch(finished)
            show(rows, seconds_left(jobs, rows, place.workers))
            time.sleep(max(POLL, 5 * (time.monotonic() - began)))  # looking takes time from the runs
        show(rows, None)
    except KeyboardInterrupt:
        words = leave(place, live)
        show(rows | {job.name: state_of(job) for job in jobs if rows[job.name]["state"] not in OVER}, None)
        print(words, end="", file=sys.stderr)
        raise
    finally:
        show.clear()
    return as_table(rows)


def look(job: Job, submitted: submitit.Job | None) -> Row:
    """The row of a job now: what its directory shows, and how it is with the job that was submitted for it."""
    if submitted is None:
        return state_of(job)
    slurm, log = isinstance(submitted, submitit.SlurmJob), submitted.paths.stderr
    if not submitted.done():
        queued = slurm and not submitted.paths.stdout.exists()
        return state_of(job, ours=True) | {"state": "waiting" if queued else "running"}
    row = state_of(job)
    if row["state"] != "waiting":
        return row
    reason = last_words(log) or (f"Slurm: {submitted.state}" if slurm else "killed by signal 9 (out of memory?)")
    reason = {"KeyboardInterrupt": "interrupted; the same command goes on with it"}.get(reason, reason)
    if "another process is training" in reason:
        return row | {"state": "running elsewhere"}
    return row | {"state": "failed", "reason": f"{reason} (log: {os.path.relpath(log)})"}


def last_words(log: Path) -> str:
    """The exception at the end of a log, or nothing."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    for mark in ("Traceback (most recent call last):\n", "Fatal Python error: "):
        _, found, rest = text.rpartition(mark)
        if found:
            return next((line.removeprefix("ValueError: ") for line in rest.splitlines() if line[:1].strip()), "")
    return ""


def seconds_left(jobs: list[Job], rows: dict[str, Row], workers: int) -> float | None:
    """Estimate: the steps left of each run at its own pace, or its recipe's, or that of all, dealt out to workers in order.

    None as long as no step is known.
    """

    def pace(some: list[Row]) -> float:
        return sum(row["seconds"] for row in some) / max(1, sum(row["steps"] for row in some))

    left, everything = {"running": [], "running elsewhere": [], "waiting": []}, list(rows.values())
    for row in (rows[job.name] for job in jobs):
        alike = [other for other in everything if other["recipe"] == row["recipe"]]
        each = pace([row]) or pace(alike) or pace(everything)
        if not each:
            return None
        left.setdefault(row["state"], []).append(each * max(0, row["of_steps"] - row["steps"]))
    ends = left["running"] + [0.0] * (workers - len(left["running"]))
    heapq.heapify(ends)
    for seconds in left["waiting"]:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends + left["running elsewhere"])


def status(jobs: list[Job], out: Path) -> pd.DataFrame:
    """The rows of SWEEP without running anything; what only the last sweep knew, that and why a run failed, is from it."""
    before = read_rows(out / "sweep.csv")
    rows = {job.name: state_of(job) for job in jobs}
    for name, row in rows.items():
        then = before.get(name, row)
        if (row["state"], then["state"]) in (("waiting", "failed"), ("running elsewhere", "running")):
            row |= {"state": then["state"], "reason": then["reason"]}
    return as_table(rows)


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a sweep.csv by run; none where there is no file."""
    return {row["run"]: row for row in SWEEP.read(path).to_dict("records")} if path.is_file() else {}


def as_table(rows: dict[str, Row]) -> pd.DataFrame:
    return SWEEP.check(pd.DataFrame(list(rows.values())))


def format_table(table: pd.DataFrame) -> str:
    """The rows for people, and below them why those that failed did."""
    lines = [("run", "state", "tasks", "steps", "Last", "Avg", "Fgt", "seconds")]
    for row in table.itertuples():
        share = f"{row.steps / row.of_steps:.0%}" if row.of_steps else ""
        values = ["" if math.isnan(value) else f"{value:.2f}" for value in (row.last, row.avg, row.fgt)]
        lines.append((row.run, row.state, f"{row.tasks}/{row.of or '?'}", share, *values, f"{row.seconds:.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = [str.ljust, str.ljust, *[str.rjust] * 6]
    text = ["  ".join(a(c, w) for a, c, w in zip(align, line, widths, strict=True)) for line in lines]
    return "\n".join(text + [f"{row.run}: {row.reason}" for row in table.itertuples() if row.reason])


class Display:
    """Tells rows when they change: to a file, and to standard error, in place or on no terminal a line a change."""

    def __init__(self, path: Path):
        self.path, self.rows, self.lines, self.said = path, {}, [], time.monotonic()
        self.others = read_rows(path)  # of earlier sweeps into the same folder

    def __call__(self, rows: dict[str, Row], left: float | None) -> None:
        if rows != self.rows:
            SWEEP.write(as_table(self.others | rows), self.path)
        states = [row["state"] for row in rows.values()]
        summary = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        summary += f"; about {tqdm.format_interval(left)} left" if left and left >= 1 else ""
        (self.redraw if sys.stderr.isatty() else self.say)(rows, summary)
        self.rows = dict(rows)

    def say(self, rows: dict[str, Row], summary: str) -> None:
        """A line a change of state or tasks, and the summary now and then."""
        for name, row in rows.items():
            before = self.rows.get(name, {"state": "waiting", "tasks": 0})
            if (row["state"], row["tasks"]) != (before["state"], before["tasks"]):
                words = f"{name}: {row['state']}, {row['tasks']} of {row['of'] or '?'} tasks {row['reason']}"
                print(words.rstrip(), file=sys.stderr, flush=True)
        if time.monotonic() - self.said > SAY_EVERY:
            self.said = time.monotonic()
            print(summary, file=sys.stderr, flush=True)

    def redraw(self, rows: dict[str, Row], summary: str) -> None:
        """The table in the place of the last one; where it is too high, without what does not move."""
        columns, height = shutil.get_terminal_size()
        shown = as_table(rows)
        if len(shown) + 3 > height:
            shown = shown[~shown["state"].isin(["waiting", "finished"])]
        lines = [line[: columns - 1] for line in (summary, *format_table(shown).splitlines())][: height - 1]
        if lines != self.lines:
            self.clear()
            print("\n".join(lines), file=sys.stderr, flush=True)
            self.lines = lines

    def clear(self) -> None:
        if self.lines:
            print(f"\x1b[{len(self.lines)}F\x1b[J", end="", file=sys.stderr, flush=True)
        self.lines = []
