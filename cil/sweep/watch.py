"""The watch: start what is not finished, turn by turn, look at how each run stands, and show it until all are over."""

from __future__ import annotations

import heapq
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import submitit
from tqdm import tqdm

from cil import checkpoint
from cil.evaluate import scores
from cil.sweep.jobs import Job
from cil.sweep.places import Place, adopted, submit
from cil.sweep.table import Row, as_table, format_table, read_rows
from cil.tables import SWEEP

WIDE = 1000  # columns of the table in place, whose lines are cut at the terminal's width
POLL = 1.0  # seconds between two looks at the runs
SAY_EVERY = 30.0  # seconds between two lines about the time left, on no terminal
LEAVE = 30.0  # seconds that interrupted runs have to save their state while the sweep waits for them
OVER = ("finished", "failed")


def state_of(job: Job, ours: bool = False) -> Row:
    """The row of a job as its directory shows it; `ours`: this sweep has a process for it."""
    row = {"run": job.name, "recipe": job.run.recipe, "seed": job.run.seed, "state": "running" if ours else "waiting"}
    row |= {"tasks": 0, "of": job.tasks, "steps": 0, "of_steps": job.steps}
    row |= {"last": math.nan, "avg": math.nan, "fgt": math.nan, "seconds": 0.0, "reason": ""}
    try:
        if (job.path / "run.json").is_file():
            directory = checkpoint.open_same(job.path, job.run)
            row |= {"tasks": len(directory.tasks), "of": len(directory.planned_tasks)}
            epochs = directory.table("training")
            if epochs is not None:
                row |= {"steps": int(epochs["steps"].sum()), "seconds": float(epochs["seconds"].sum())}
            if directory.finished:
                found = scores(directory.written("accuracy"), job.run.training)
                percent = {name.lower(): 100 * value for name, value in found.items()}
                return row | {k: v for k, v in percent.items() if k in row} | {"state": "finished"}
    except ValueError as error:
        return row | {"state": "failed", "reason": str(error)}
    if not ours and checkpoint.is_locked(job.path):
        return row | {"state": "running elsewhere"}
    return row | ({"state": "failed", "reason": job.problem} if job.problem else {})


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
    live, gpu_of = adopted(place, jobs), dict[str, str | None]()
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

    left: dict[str, list[float]] = {"running": [], "running elsewhere": [], "waiting": []}
    everything = list(rows.values())
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


class Display:
    """Shows the rows when they change: in a file, and on standard error as a table in one place, or as lines on no terminal."""

    def __init__(self, path: Path):
        self.path, self.said = path, time.monotonic()
        self.rows: dict[str, Row] = {}
        self.lines: list[str] = []
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
        """Print one line for each change of state or tasks, and the summary now and then."""
        for name, row in rows.items():
            before = self.rows.get(name, {"state": "waiting", "tasks": 0})
            if (row["state"], row["tasks"]) != (before["state"], before["tasks"]):
                words = f"{name}: {row['state']}, {row['tasks']} of {row['of'] or '?'} tasks {row['reason']}"
                print(words.rstrip(), file=sys.stderr, flush=True)
        if time.monotonic() - self.said > SAY_EVERY:
            self.said = time.monotonic()
            print(summary, file=sys.stderr, flush=True)

    def redraw(self, rows: dict[str, Row], summary: str) -> None:
        """Print the table in place of the last one; where it is too high, without the runs that wait or have finished."""
        columns, height = shutil.get_terminal_size()
        shown = as_table(rows)
        if len(shown) + 3 > height:
            shown = shown[~shown["state"].isin(["waiting", "finished"])]
        lines = [line[: columns - 1] for line in (summary, *format_table(shown, WIDE).splitlines())][: height - 1]
        if lines != self.lines:
            self.clear()
            print("\n".join(lines), file=sys.stderr, flush=True)
            self.lines = lines

    def clear(self) -> None:
        if self.lines:
            print(f"\x1b[{len(self.lines)}F\x1b[J", end="", file=sys.stderr, flush=True)
        self.lines = []
