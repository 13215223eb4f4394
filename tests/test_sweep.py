"""Sweeps: names, seeds and rows without processes; then real ones, which fail, are killed and go on."""

import dataclasses
import fcntl
import math
import multiprocessing
import os
import signal
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from cil import sweep
from cil.checkpoint import is_locked, open_run
from cil.sweep import places, watch, worker
from cil.tables import SWEEP
from cil.train import train

TINY = [
    "num_classes=4", "images_per_class=6", "dim=8", "num_heads=2", "depth=2",
    "epochs_first=1", "epochs=1", "finetune_epochs=1", "batch_size=8", "memory=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to be in, quick looks, and the signal handlers and threads back as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "POLL", 0.05)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for kind, handler in before.items():
        signal.signal(kind, handler)


def make_jobs(*names, seeds=None, settings=(), out="runs"):
    return sweep.expand(list(names), seeds, [*TINY, *settings], Path(out))


def make_place(jobs, workers=1, threads=1, gpus=(None,)):
    return sweep.Place(Path("runs/.sweep"), "cpu", list(gpus), workers, threads)


class Trained:
    """A submitted job that was trained then and there."""

    paths = SimpleNamespace(stderr=Path("no.log"))

    def __init__(self, job):
        train(job.run, job.path)

    def done(self):
        return True


@pytest.fixture
def trained(monkeypatch):
    """Names and GPUs of the jobs that a sweep submits; they are trained in this process."""
    submitted = []

    def submit(place, job, gpu):
        submitted.append((job.name, gpu))
        return Trained(job)

    monkeypatch.setattr(watch, "submit", submit)
    return submitted


# without a process


def test_names_and_seeds():
    names = ["demo-baseline", "demo-baseline-joint", "demo-baseline-joint-terminal"]
    jobs = make_jobs(*names, seeds=[0, 7], out="o")
    assert [str(job.path) for job in jobs] == [
        "o/demo-baseline-s0", "o/demo-baseline-s7", "o/demo-baseline-s0-joint", "o/demo-baseline-s7-joint",
        "o/demo-baseline-s0-joint-terminal", "o/demo-baseline-s7-joint-terminal",
    ]  # fmt: skip
    assert [(job.run.seed, job.run.training) for job in jobs[1::2]] == [
        (7, "incremental"), (7, "joint"), (7, "joint-terminal")
    ]  # fmt: skip
    assert jobs[2].run.is_twin_of(jobs[0].run) and not jobs[3].run.is_twin_of(jobs[0].run)
    assert all(job.run.dim == 8 for job in jobs)
    assert [str(job.path) for job in make_jobs(*names)] == [f"runs/{name}" for name in names]
    assert sweep.parse_seeds("3, 0,11") == [3, 0, 11]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_jobs("demo-baselin"), "no recipe 'demo-baselin'; there: demo-baseline"),
        (lambda: make_jobs("demo-baseline", "demo-baseline"), "recipe demo-baseline is given twice"),
        (lambda: make_jobs("demo-baseline", settings=["seed=1"]), "there is --seeds"),
        (lambda: make_jobs("demo-baseline", settings=["dimm=1"]), "no setting 'dimm'"),
        (lambda: sweep.parse_seeds("0,x"), "--seeds 0,x is no list of different whole numbers"),
        (lambda: sweep.parse_seeds("0,0"), "--seeds 0,0 is no list of different whole numbers"),
        (lambda: sweep.parse_seeds(""), "is no list"),
        (lambda: sweep.parse_seeds("-1"), "is no list"),
        (lambda: sweep.choose_workers(3, 2, 0, 0, None), "--workers 0 must be at least 1"),
        (lambda: sweep.choose_workers(3, 2, 0, None, 0), "--threads 0 must be at least 1"),
        (lambda: sweep.choose_place("pbs", 1, Path("o"), "cpu", None, None, []), "no executor 'pbs'; there are: local"),
        (lambda: sweep.choose_place("local", 1, Path("o"), "cpu", None, None, ["a=b"]), "goes with --executor slurm"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((6, 2, 0, None, None), (2, 1)),  # a run a core
        ((6, 8, 0, None, 4), (2, 4)),
        ((6, 8, 0, 3, None), (3, 1)),
        ((1, 8, 0, None, None), (1, 1)),
        ((6, 16, 1, None, None), (1, 16)),  # a run a GPU
        ((6, 16, 4, None, None), (4, 4)),
        ((6, 1, 0, 3, None), (3, 1)),
    ],
)
def test_workers_and_threads(arguments, expected):
    assert sweep.choose_workers(*arguments) == expected


def test_gpus_go_round(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-a")
    assert [sweep.visible_gpus(d) for d in ("cpu", "cuda", "cuda:1")] == [[None], ["3", "MIG-a"], ["MIG-a"]]
    jobs, submitted = sweep.planned(make_jobs("demo-baseline", seeds=[0, 1, 2])), []
    monkeypatch.setattr(watch, "submit", lambda place, job, gpu: submitted.append((job.run.seed, gpu)) or True)
    monkeypatch.setattr(
        watch, "look", lambda job, submitted: sweep.state_of(job) | ({"state": "finished"} if submitted else {})
    )
    sweep.sweep(jobs, make_place(jobs, workers=3, gpus=["3", "MIG-a"]), Path("runs"))
    assert submitted == [(0, "3"), (1, "MIG-a"), (2, "3")]


def test_what_is_finished_or_another_run_is_left_alone(trained, capsys):
    jobs = sweep.planned(make_jobs("demo-baseline", seeds=[0, 1, 2]))
    train(jobs[0].run, jobs[0].path)
    train(jobs[0].run, jobs[1].path)
    files = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()}
    table = sweep.sweep(jobs, make_place(jobs), Path("runs"))
    assert trained == [("demo-baseline-s2", None)]
    assert files == {p: p.stat().st_mtime_ns for p in files}
    assert table["state"].tolist() == ["finished", "failed", "finished"]
    assert table["reason"][1].startswith("runs/demo-baseline-s1 holds another run (seed=0 there, 1 asked)")
    assert table["tasks"].tolist() == [2, 0, 2] and table["of"].tolist() == [2, 2, 2]
    expected = sum(open_run("runs/demo-baseline-s2").table("training")["seconds"])
    assert table["seconds"][2] == pytest.approx(expected) and table["steps"][2] == table["of_steps"][2] > 0
    pd.testing.assert_frame_equal(table, SWEEP.read("runs/sweep.csv"))
    said = capsys.readouterr().err
    assert "demo-baseline-s0: finished, 2 of 2 tasks\n" in said and "demo-baseline-s1: failed" in said
    assert " ".join(sweep.format_table(table).split()).endswith(f" demo-baseline-s1: {table['reason'][1]}")


def test_another_sweep_into_the_same_folder_adds_to_the_table(trained):
    for name in ("demo-baseline", "demo-dytox", "demo-baseline"):
        jobs = sweep.planned(make_jobs(name))
        assert len(sweep.sweep(jobs, make_place(jobs), Path("runs"))) == 1
    assert sorted(SWEEP.read("runs/sweep.csv")["run"]) == ["demo-baseline", "demo-dytox"]
    assert len(trained) == 2


def test_scores_are_percent_and_twins_find_each_other(trained):
    names = ["demo-baseline", "demo-baseline-joint", "demo-baseline-joint-terminal"]
    jobs = sweep.planned(make_jobs(*names, seeds=[1]))
    rows = sweep.sweep(jobs, make_place(jobs), Path("runs"))
    run, twin = open_run("runs/demo-baseline-s1"), open_run("runs/demo-baseline-s1-joint")
    assert run.joint_twin == twin.name and twin.twin_of == run.name
    accuracy = run.table("accuracy").set_index(["task", "on_task"])
    right = accuracy.loc[1]["correct"].sum() / accuracy.loc[1]["images"].sum()
    forgotten = accuracy["accuracy"][0, 0] - accuracy["accuracy"][1, 0]
    assert rows["last"][0] == pytest.approx(100 * right) and rows["fgt"][0] == pytest.approx(100 * forgotten)
    assert rows["fgt"].isna().tolist() == [False, True, True]  # joint models forget nothing
    assert rows["avg"].isna().tolist() == [False, False, True] and rows["tasks"].tolist() == [2, 2, 1]


def test_a_run_without_its_data_fails_alone(trained):
    jobs = make_jobs("demo-baseline") + [
        dataclasses.replace(job, run=dataclasses.replace(job.run, dataset="folder:nowhere"))
        for job in make_jobs("demo-baseline-joint")
    ]
    table = sweep.sweep(sweep.planned(jobs), make_place(jobs), Path("runs"))
    assert table["state"].tolist() == ["finished", "failed"] and "nowhere" in table["reason"][1]
    assert not Path("runs/demo-baseline-joint").exists()


def test_a_run_that_another_process_trains_is_waited_for(trained, capsys):
    jobs = sweep.planned(make_jobs("demo-baseline", seeds=[0, 1]))
    jobs[0].path.mkdir(parents=True)
    with open(jobs[0].path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep.state_of(jobs[0])["state"] == "running elsewhere"
        seen = []
        threading.Timer(0.5, lambda: (seen.extend(trained), fcntl.flock(file, fcntl.LOCK_UN))).start()
        table = sweep.sweep(jobs, make_place(jobs), Path("runs"))
    assert seen == [("demo-baseline-s1", None)]  # the other went ahead, this one not while it was locked
    assert table["state"].tolist() == ["finished", "finished"] and len(trained) == 2
    assert "demo-baseline-s0: running elsewhere" in capsys.readouterr().err


def test_status_remembers_what_only_the_sweep_knew():
    jobs = sweep.planned(make_jobs("demo-baseline", seeds=[0, 1, 2]))
    assert sweep.status(jobs, Path("runs"))["state"].tolist() == ["waiting"] * 3 and not Path("runs").exists()
    train(jobs[1].run, jobs[1].path)
    rows = {job.name: sweep.state_of(job) | {"state": "failed", "reason": "why"} for job in jobs[:2]}
    SWEEP.write(sweep.as_table(rows), "runs/sweep.csv")
    table = sweep.status(jobs, Path("runs"))
    assert table["state"].tolist() == ["failed", "finished", "waiting"] and table["reason"].tolist() == ["why", "", ""]


def test_time_left_is_dealt_out_like_the_runs():
    jobs = [SimpleNamespace(name=name) for name in "abcde"]

    def row(recipe, state, steps, of_steps, seconds):
        return {"recipe": recipe, "state": state, "steps": steps, "of_steps": of_steps, "seconds": seconds}

    rows = {
        "a": row("x", "running", 50, 100, 100.0),  # 50 steps of 2 s left
        "b": row("y", "running", 10, 20, 10.0),  # 10 steps of 1 s
        "c": row("x", "waiting", 0, 100, 0.0),  # 200 s as its recipe, after b
        "d": row("z", "waiting", 0, 30, 0.0),  # 30 x 110 s / 60 steps = 55 s as all, after a
        "e": row("y", "finished", 0, 20, 0.0),
    }
    assert sweep.seconds_left(jobs, rows, 2) == pytest.approx(max(10 + 200, 100 + 55))
    assert sweep.seconds_left(jobs, {n: r | {"steps": 0, "seconds": 0.0} for n, r in rows.items()}, 2) is None


TRACE = "10%|# | 1/9 Traceback (most recent call last):\n  File x\n    y\n"


@pytest.mark.parametrize(
    ("text", "state", "reason"),
    [
        (f"warning\n{TRACE}ValueError: the loss is nan\n", "failed", "the loss is nan"),
        (f"{TRACE}X: y\n\nDuring this:\n{TRACE}OSError: full\nmore\n", "failed", "OSError: full"),
        ("10%|# | 1/9", "failed", "killed by signal 9 (out of memory?)"),
        ("Fatal Python error: Segmentation fault\n\nThread 1", "failed", "Segmentation fault"),
        (f"{TRACE}KeyboardInterrupt\n", "failed", "interrupted; the same command goes on"),
        (f"{TRACE}ValueError: another process is training in x\n", "running elsewhere", ""),
    ],
)
def test_why_a_job_ended(text, state, reason):
    Path("log.err").write_text(text)
    submitted = SimpleNamespace(paths=SimpleNamespace(stderr=Path("log.err")), done=lambda: True)
    row = sweep.look(sweep.planned(make_jobs("demo-baseline"))[0], submitted)
    assert row["state"] == state and row["reason"].startswith(reason)
    assert row["reason"].endswith("(log: log.err)") == (state == "failed")


def test_a_job_starts_with_its_threads_and_deaf_to_the_terminal(monkeypatch):
    seen = {}

    class Executor:
        def __init__(self, folder):
            assert not folder.exists()  # an old job's files are gone
            folder.mkdir()

        def update_parameters(self, timeout_min):
            assert timeout_min > 60 * 24 * 365

        def submit(self, function, *arguments):
            seen["threads"] = [os.environ[name] for name in places.THREAD_VARIABLES]
            seen["deaf"] = {signal.SIGINT, signal.SIGHUP} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
            seen["call"] = (function, *arguments)
            return SimpleNamespace(job_id="5")

    monkeypatch.setattr(places.submitit, "LocalExecutor", Executor)
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    (job,) = make_jobs("demo-baseline")
    (Path("runs/.sweep") / job.name).mkdir(parents=True)
    sweep.submit(make_place([job], threads=3), job, "1")
    assert seen["threads"] == ["3"] * 3 and seen["deaf"] and os.environ["OMP_NUM_THREADS"] == "9"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGHUP}
    assert seen["call"] == (sweep.train_job, job.run, job.path, "cpu", 3, "1", os.getpid())


@pytest.mark.parametrize(("gpu", "device"), [(None, "cpu"), ("1", "cuda")])
def test_a_job_sets_threads_and_gpu(monkeypatch, gpu, device):
    seen = []
    monkeypatch.setattr(
        worker, "train", lambda run, path, device, report: seen.extend([device, torch.get_num_threads()])
    )
    monkeypatch.setattr(worker.faulthandler, "enable", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (job,) = make_jobs("demo-baseline")
    sweep.train_job(job.run, job.path, "cpu", 3, gpu, None)
    assert seen == [device, 3] and os.environ["CUDA_VISIBLE_DEVICES"] == (gpu or "")


# Slurm, with commands of our own


@pytest.fixture
def slurm(monkeypatch):
    """sbatch that keeps the script, and sacct that says what is in the file `sacct`."""
    monkeypatch.setenv("PATH", f"{Path.cwd() / 'bin'}:{os.environ['PATH']}")
    Path("bin").mkdir()
    script = {"sbatch": 'cp "$1" batch.sh; echo Submitted batch job 77', "srun": "", "sacct": "cat sacct"}
    for name, line in script.items():
        path = Path("bin", name)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_gets_its_parameters_and_a_job_is_found_again(slurm):
    (job,) = make_jobs("demo-baseline")
    place = sweep.choose_place("slurm", 5, Path("runs"), "cuda", None, 4, ["partition=gpu", "time=60"])
    assert (place.workers, place.threads, place.gpus) == (5, 4, [None])  # all at once
    assert sweep.adopted(place, [job]) == {}
    sweep.submit(place, job, None)
    lines = Path("batch.sh").read_text().splitlines()
    for option in ("partition=gpu", "time=60", "cpus-per-task=4", "gpus-per-node=1", "job-name=demo-baseline"):
        assert f"#SBATCH --{option}" in lines
    Path("sacct").write_text("JobID|State|NodeList\n77|PENDING|\n")
    (found,) = sweep.adopted(place, [job]).values()
    assert found.job_id == "77" and sweep.look(job, found)["state"] == "waiting"
    found.paths.stdout.touch()
    assert sweep.look(job, found)["state"] == "running"
    assert "scancel 77" in sweep.leave(place, {job.name: found})
    Path("sacct").write_text("JobID|State|NodeList\n77|TIMEOUT|\n")
    found.watcher.update()
    assert sweep.adopted(place, [job]) == {} and sweep.look(job, found)["reason"].startswith("Slurm: TIMEOUT")


@pytest.mark.parametrize(
    ("options", "words"), [(["partitoin=x"], "partitoin"), (["time=1-00"], "minutes"), (["x"], "KEY=VALUE")]
)
def test_slurm_options_that_do_not_fit(slurm, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        sweep.choose_place("slurm", 1, Path("runs"), "cpu", None, None, options)
    assert "\n" not in str(caught.value)


def test_slurm_without_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"^--executor slurm needs sbatch and srun, and they are not here$"):
        sweep.choose_place("slurm", 1, Path("runs"), "cpu", None, None, [])


# with processes


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_other(capsys):
    good, bad = make_jobs("demo-baseline", "demo-baseline-joint")
    bad = dataclasses.replace(bad, run=dataclasses.replace(bad.run, lr_first=1e30, epochs_first=9, warmup_epochs=0))
    jobs = sweep.planned([good, bad])
    table = sweep.sweep(jobs, make_place(jobs, workers=2), Path("runs"))
    assert table["state"].tolist() == ["finished", "failed"]
    assert table["reason"][1].startswith("the loss is nan in task 0") and "nan" not in table["reason"][0]
    log = table["reason"][1].rpartition("(log: ")[2].removesuffix(")")
    assert log.startswith("runs/.sweep/demo-baseline-joint/") and "ValueError: the loss is nan" in Path(log).read_text()
    assert not math.isnan(table["last"][0]) and math.isnan(table["last"][1])
    pd.testing.assert_frame_equal(table, SWEEP.read("runs/sweep.csv"))
    assert sweep.status(jobs, Path("runs"))["reason"].tolist() == table["reason"].tolist()
    assert "demo-baseline-joint: failed" in capsys.readouterr().err


def run_sweep(jobs):
    os.setpgrp()  # as a terminal does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background command starts with it ignored
    try:
        sweep.sweep(jobs, make_place(jobs), Path("runs"))
    except KeyboardInterrupt:
        os._exit(7)


@pytest.mark.slow
def test_killed_or_interrupted_it_takes_its_jobs_along_and_goes_on():
    (job,) = jobs = sweep.planned(make_jobs("demo-baseline", settings=["epochs_first=100000"]))
    endings = {
        "kill -9": (lambda process: process.kill(), -signal.SIGKILL),
        "Ctrl-C": (lambda process: os.killpg(process.pid, signal.SIGINT), 7),
    }
    steps = [0]
    for how, (end, code) in endings.items():
        process = multiprocessing.get_context("fork").Process(target=run_sweep, args=(jobs,))
        process.start()
        until = time.monotonic() + 120
        while not is_locked(job.path) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        end(process)
        process.join(60)
        assert process.exitcode == code, how
        while is_locked(job.path) and time.monotonic() < until:
            time.sleep(0.05)
        assert sweep.state_of(job)["state"] == "waiting", how
        steps.append(max(int(path.stem) for path in (job.path / "resume").iterdir()))
    assert 0 < steps[1] < steps[2]  # what there was was saved each time, and the second went on from the first
    assert SWEEP.read("runs/sweep.csv")["state"].tolist() == ["waiting"]
