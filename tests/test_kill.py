"""kill -9 for real: a process that trains is killed again and again, and started again with the same arguments."""

import multiprocessing
import random
import time

import torch
from safetensors.torch import load_file

from cil import train as module
from cil.train import train


def victim(run, out):
    torch.set_num_threads(1)  # as in the undisturbed run: the order of sums depends on it
    module.SAVE_EVERY = 0.0
    train(run, out)


def test_killed_run_ends_with_the_weights_of_an_undisturbed_one(toy_runs, toy, tmp_path):
    context, out = multiprocessing.get_context("spawn"), tmp_path / "toy"
    delays = random.Random(0)
    killed = 0
    for _ in range(4):
        process = context.Process(target=victim, args=(toy, out))
        process.start()
        while process.is_alive() and not (out / "run.json").exists():
            time.sleep(0.01)
        began = time.monotonic()
        weights = len(list(out.glob("task_*")))
        # Some time after it has gone on: a state or a task that was not there before.
        while process.is_alive() and len(list(out.glob("task_*"))) == weights and time.monotonic() - began < 20:
            time.sleep(0.005)
            if (out / "resume/state.pt").exists() and delays.random() < 0.05:
                break
        killed += process.is_alive()
        process.kill()
        process.join()
    train(toy, out)
    assert killed >= 3
    for task in range(3):
        first, second = (load_file(root / "toy" / f"task_0{task}.safetensors") for root in (toy_runs, tmp_path))
        assert all(first[k].equal(second[k]) for k in first)
    for table in ("accuracy.csv", "memory/task_00.csv", "memory/task_01.csv", "memory/task_02.csv"):
        assert (toy_runs / "toy" / table).read_text() == (out / table).read_text()
    assert not list(out.rglob("*.part")) and not (out / "resume").exists()
