"""A run on several processes is the same run: losses, memory, schedule and accuracy do not depend on how many."""

import dataclasses
import multiprocessing
import os
import signal
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cil import fit, parallel
from cil.checkpoint import open_run
from cil.train import train

FORK = multiprocessing.get_context("fork")


def member(rank, size, port, function, arguments, told):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    try:
        with parallel.processes("cpu") as device:
            told.send((rank, function(*arguments, device)))
    except Exception as error:
        told.send((rank, f"{type(error).__name__}: {error}"))


def on_processes(size, function, *arguments):
    """What function(*arguments, device) returns in each of `size` processes, as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receive, send = FORK.Pipe()
    members = [FORK.Process(target=member, args=(r, size, port, function, arguments, send)) for r in range(size)]
    for process in members:
        process.start()
    answers = dict(receive.recv() for _ in members if receive.poll(120))
    for process in members:
        process.join(30)
    return [answers[r] for r in range(size)]


def train_here(run, out, device):
    done = []
    train(run, out, device, lambda p: done.append((p.task, p.phase, p.epoch, p.loss)))
    return done


@pytest.mark.parametrize(
    "size, changes",
    [
        (2, {"num_classes": 4}),
        (2, {"method": "dytox", "n_lpa": 2, "num_classes": 4, "rand_augment": "rand-m9-mstd0.5-inc1", "flip": True}),
        (3, {"num_classes": 4, "batch_size": 13, "kd_rows": "all"}),
    ],
    ids=["baseline", "dytox", "three processes, odd batch"],
)
def test_same_run_on_several_processes(size, changes, toy, tmp_path):
    run = dataclasses.replace(toy, drop_path=0.3, **changes)
    alone = train_here(run, tmp_path / "alone", "cpu")
    together = on_processes(size, train_here, run, tmp_path / "together")
    assert all(t == together[0] for t in together)  # every process sees the whole batch's loss
    assert [row[:3] for row in alone] == [row[:3] for row in together[0]]
    np.testing.assert_allclose([row[3] for row in alone], [row[3] for row in together[0]], rtol=2e-4)
    a, b = (open_run(tmp_path / name) for name in ("alone", "together"))
    assert a.memory(1).equals(b.memory(1)) and len(a.memory(1)) <= run.memory
    for task in (0, 1):
        first, second = (load_file(directory.weights_path(task)) for directory in (a, b))
        # Softmax cancels pos_bias: its gradient is rounding alone, and AdamW makes steps of it all the same.
        for name in (name for name in first if not name.endswith("pos_bias")):
            # AdamW divides a gradient by its own size, so where it is nearly 0 rounding decides a step of up to lr = 2e-3.
            torch.testing.assert_close(first[name], second[name], rtol=1e-2, atol=1e-4, msg=name)


def gather_and_sum(device):
    """The gradient of a loss over a batch of 7, computed by rows."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2), torch.randn(7, 3)
    model.idle = torch.nn.Parameter(torch.zeros(2))  # takes no part in any step
    summing = parallel.summing(model)
    with parallel.batch(7):
        y = parallel.gather(summing(parallel.own(x)))
        draws = parallel.own(torch.arange(parallel.whole(len(parallel.own(x)))))
    (y**2).mean().backward()
    assert model.idle.grad is None or not model.idle.grad.any()
    return y.tolist(), model.weight.grad.tolist(), draws.tolist(), parallel.anywhere(parallel.rank() == 1)


def test_rows_come_together_and_gradients_sum_up():
    (y, gradient, draws, anywhere), other = on_processes(2, gather_and_sum)
    expected = gather_and_sum("cpu")
    np.testing.assert_allclose(y, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5)
    assert other[1] == gradient and anywhere and other[3] and not expected[3]
    assert sorted(draws + other[2]) == list(range(7)) == expected[2]
    assert all(sorted(6 - d for d in part) == part for part in (draws, other[2]))  # mixup's pairs stay together


def fail_in_first(device):
    def function():
        raise ValueError("disk full")

    return parallel.once(function)


def test_failure_of_the_writing_process_reaches_all():
    first, second = on_processes(2, fail_in_first)
    assert first == "ValueError: disk full" and second == "ChildProcessError: process 0 failed: disk full"


def train_until_killed(run, out, device):
    """The second process is killed in its third step."""
    steps = []

    def report(progress):
        steps.append(progress)
        if len(steps) == 3 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(run, out, device, report)


def test_when_one_process_is_killed_the_other_says_so_and_the_run_goes_on(toy, tmp_path, monkeypatch):
    run = dataclasses.replace(toy, num_classes=4)
    monkeypatch.setattr(fit, "SAVE_EVERY", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receive, send = FORK.Pipe()
    arguments = port, train_until_killed, (run, tmp_path / "run"), send
    members = [FORK.Process(target=member, args=(rank, 2, *arguments)) for rank in range(2)]
    for process in members:
        process.start()
    assert receive.poll(60)
    rank, said = receive.recv()
    assert (rank, said.partition(",")[0]) == (0, "ChildProcessError: process 0 lost another one")
    for process in members:
        process.join(30)
    assert [process.exitcode for process in members] == [0, -signal.SIGKILL]
    on_processes(2, train_here, run, tmp_path / "run")
    on_processes(2, train_here, run, tmp_path / "whole")
    again, whole = open_run(tmp_path / "run"), open_run(tmp_path / "whole")
    for task in whole.tasks:
        assert again.weights_path(task).read_bytes() == whole.weights_path(task).read_bytes()


def few_rows(device):
    return parallel.rows(3)


def test_batch_smaller_than_processes():
    assert on_processes(2, few_rows)[0] == "ValueError: a batch of 3 images is too small for 2 processes"


def test_locked_directory_is_refused_by_all(toy, tmp_path):
    directory = train(dataclasses.replace(toy, num_classes=2), tmp_path / "toy")
    with directory.lock():
        first, second = on_processes(2, train_here, directory.run, tmp_path / "toy")
    assert first.startswith("ValueError: another process is training in")
    assert second.startswith("ChildProcessError: process 0 failed: another process is training in")
