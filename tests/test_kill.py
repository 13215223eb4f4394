"""Nothing is lost: processes that train are killed, stopped, or run out of disk, and started again with the same arguments.

What comes out is bit-equal to the undisturbed run: weights, memory, accuracy.
"""

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cil import evaluate, fit, memory, resume
from cil.checkpoint import RunDir, open_run
from cil.fit import Learner
from cil.train import train

FORK = multiprocessing.get_context("fork")  # torch is loaded already, and on one thread it may be forked


def assert_equal(first: Path, second: Path) -> None:
    for task in range(3):
        name = f"task_{task:02d}"
        a, b = (load_file(root / f"{name}.safetensors") for root in (first, second))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert (first / f"memory/{name}.csv").read_text() == (second / f"memory/{name}.csv").read_text()
    assert (first / "accuracy.csv").read_text() == (second / "accuracy.csv").read_text()
    steps = ["task", "phase", "epoch", "steps", "images", "loss", "accuracy", "lr"]
    a, b = (open_run(root).table("training")[steps] for root in (first, second))
    assert a.equals(b)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, condition, act=die):
    """Replace owner.name by one that first acts, on the calls that fulfil the condition."""
    real = getattr(owner, name)

    def replaced(*args, **kwargs):
        if condition(*args, **kwargs):
            act(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, replaced)


def nth(n, condition=lambda *args, **kwargs: True):
    """Holds for the n-th call (from 0) for which `condition` does."""
    left = [n]

    def holds(*args, **kwargs):
        if condition(*args, **kwargs):
            left[0] -= 1
            return left[0] == -1
        return False

    return holds


def write_half(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    die()


def is_state(path, *_):
    return ".state" in Path(path).name


# Where to die -> how to arrange it, given a random number generator.
POINTS = {
    "training": lambda r: before(Learner, "step", nth(r.randrange(4), lambda s, x, y, place: place[1] == "fit")),
    "training, later": lambda r: before(
        Learner, "step", nth(r.randrange(4), lambda s, x, y, place: place[:2] == (1, "fit"))
    ),
    "fine-tuning": lambda r: before(
        Learner, "step", nth(r.randrange(2), lambda s, x, y, place: place[1] == "finetune")
    ),
    "herding": lambda r: before(memory, "herd", nth(r.randrange(4))),
    "evaluation": lambda r: before(evaluate, "predict", nth(r.randrange(2))),
    "half a state": lambda r: before(Path, "write_bytes", nth(r.randrange(6), is_state), write_half),
    "a whole state without its name": lambda r: before(os, "replace", nth(r.randrange(6), is_state)),
    "memory": lambda r: before(os, "replace", nth(1, lambda a, b: "memory" in str(b))),
    "between accuracy and weights": lambda r: before(RunDir, "save_task", nth(r.randrange(2))),
    "weights": lambda r: before(os, "replace", nth(r.randrange(2), lambda a, b: "task_" in str(b))),
    "between weights and the removal of states": lambda r: before(shutil, "rmtree", nth(r.randrange(2))),
}


def victim(run, out, arrange, number):
    arrange(random.Random(number))
    fit.SAVE_EVERY = 0.0
    train(run, out)


@pytest.mark.parametrize("number, point", list(enumerate(POINTS)))
def test_killed_run_ends_as_the_undisturbed_one(number, point, toy_runs, toy, tmp_path):
    process = FORK.Process(target=victim, args=(toy, tmp_path / "toy", POINTS[point], number))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    train(toy, tmp_path / "toy")
    assert_equal(toy_runs / "toy", tmp_path / "toy")
    assert not (tmp_path / "toy/resume").exists()


def slow(run, out):
    before(Learner, "step", lambda *args: True, lambda *args: time.sleep(0.05))
    train(run, out)


def told_to_stop(run, out, number, step):
    """Train, and be sent a signal while the step `step` (from 0) is under way."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may ignore it
    before(Learner, "step", nth(step), lambda *args: os.kill(os.getpid(), number))
    with contextlib.suppress(KeyboardInterrupt):
        train(run, out)
        os._exit(3)
    os._exit(4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 2, 6])  # in the first task, in the main phase and in fine-tuning of the second
def test_stopped_run_saves_where_it_is_and_leaves(number, step, toy_runs, toy, tmp_path):
    """By SIGTERM, or by Ctrl-C: it does not wait for the next state, which is 20 seconds away."""
    process, out = FORK.Process(target=told_to_stop, args=(toy, tmp_path / "toy", number, step)), tmp_path / "toy"
    began = time.monotonic()
    process.start()
    process.join(30)
    assert process.exitcode == 4 and time.monotonic() - began < 15
    state = resume.states(open_run(out))[0]
    seen = []
    train(toy, out, report=seen.append)
    assert (
        seen[0].done == int(state.stem) + 1 == step + 2
    )  # it goes on after the step that was saved, inside the epoch too
    assert_equal(toy_runs / "toy", out)


def without_disk(run, out, told):
    fit.SAVE_EVERY = 0.0

    def fill(*_):  # no file may grow any further: the kernel refuses the write as it would on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    before(Learner, "step", nth(3), fill)
    try:
        train(run, out)
    except OSError as error:
        told.send(f"{error.filename}: {error.strerror}")


def test_full_disk_is_one_sentence_and_the_last_state_is_intact(toy_runs, toy, tmp_path):
    receive, send = FORK.Pipe()
    process = FORK.Process(target=without_disk, args=(toy, tmp_path / "toy", send))
    process.start()
    assert receive.poll(60)
    message = receive.recv()
    process.join(60)
    assert message == (
        f"{tmp_path / 'toy/resume'}: File too large; the state before it and finished tasks [0] are as they were"
    )
    assert not list((tmp_path / "toy").rglob(".*.part"))
    seen = []
    train(toy, tmp_path / "toy", report=seen.append)
    assert seen[0].done == 4
    assert_equal(toy_runs / "toy", tmp_path / "toy")


def test_second_trainer_refuses(toy, tmp_path):
    process = FORK.Process(target=slow, args=(toy, tmp_path / "toy"))
    process.start()
    while not (tmp_path / "toy/.lock").exists():
        time.sleep(0.005)
    time.sleep(0.1)
    with pytest.raises(ValueError, match="another process is training in"):
        train(toy, tmp_path / "toy")
    process.kill()
    process.join()


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize(
    "command",
    [
        ["measure", "{runs}/toy", "--images", "{images}", "--out", "tables"],
        ["spectrum", "{runs}/toy", "--out", "tables"],
        ["reproduce", "--scale", "demo", "--out", "tables"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_are_asked_to_end_do_so(command, asked, toy_runs, tmp_path):
    """With one line and exit code 1, at whatever they are; nothing half-written stays."""
    np.save(tmp_path / "images.npy", np.zeros((20_000, 3, 8, 8), dtype=np.float32))
    words = [word.format(runs=toy_runs, images=tmp_path / "images.npy") for word in command]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "under way\n"
    process.send_signal(asked)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said
    assert said.strip().splitlines()[-1] in ("Aborted!", "Error: interrupted; the same command goes on where it was")
    left = {path.name for path in tmp_path.rglob("*") if ".part" in path.name or path.suffix in (".csv", ".parquet")}
    assert left <= {"sweep.csv"}


# The command line, of which the first forward pass says that it is under way, and then takes its time.
SLOWLY = """
import sys, time, torch
real, told = torch.nn.Module.__call__, []
def slow(self, *arguments, **named):
    if not told:
        told.append(print("under way", flush=True))
        time.sleep(20)
    return real(self, *arguments, **named)
torch.nn.Module.__call__ = slow
from locality_probe.cli import main
main(sys.argv[1:])
"""
