"""The run directory's own questions: whether it is finished, which tasks are there, whether someone trains in it."""

import dataclasses
import multiprocessing
import shutil
import threading
import time

import pytest
import torch

from cil import checkpoint, device, resume
from cil.checkpoint import is_locked, open_run
from cil.fit import Position

FORK = multiprocessing.get_context("fork")


def test_finished_is_all_tasks_and_their_accuracy(toy_runs, tmp_path):
    directory = open_run(shutil.copytree(toy_runs / "toy", tmp_path / "toy"))
    assert directory.finished
    (tmp_path / "toy/accuracy.csv").rename(tmp_path / "accuracy.csv")
    assert not directory.finished
    (tmp_path / "accuracy.csv").rename(tmp_path / "toy/accuracy.csv")
    directory.weights_path(1).unlink()
    assert not directory.finished and directory.tasks == [0, 2]


def test_a_missing_task_is_one_sentence(toy_run, tmp_path):
    toy_run.require()
    toy_run.require([2, 0])
    with pytest.raises(ValueError, match=r"^no task 4 in .*toy; there: 0, 1, 2$"):
        toy_run.require([5, 1, 4])
    with pytest.raises(ValueError, match=r"^no task 3 in .*toy; there: 0, 1, 2$"):
        toy_run.model(3)
    none = dataclasses.replace(toy_run, path=tmp_path)
    for ask in (none.require, lambda: none.require([0]), lambda: none.model(0)):
        with pytest.raises(ValueError, match="has no finished task yet"):
            ask()


def hold(directory, told):
    with directory.lock():
        told.set()
        time.sleep(60)


def test_a_killed_process_leaves_no_lock_behind(toy_run, tmp_path):
    directory, told = dataclasses.replace(toy_run, path=tmp_path), FORK.Event()
    assert not is_locked(tmp_path) and not is_locked(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())  # who asks leaves nothing behind
    process = FORK.Process(target=hold, args=(directory, told))
    process.start()
    assert told.wait(30) and is_locked(tmp_path)
    with pytest.raises(ValueError, match="another process is training in"), directory.lock():
        pass
    process.kill()
    process.join()
    assert not is_locked(tmp_path)
    with directory.lock():
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_who_asks_does_not_disturb_a_trainer(toy_run, tmp_path):
    """Several ask all the time, while the lock is taken and given back again and again."""
    directory, over, answers = dataclasses.replace(toy_run, path=tmp_path), threading.Event(), []

    def ask():
        while not over.is_set():
            answers.append(is_locked(tmp_path))

    with directory.lock():
        assert is_locked(tmp_path)
    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(20):
            with directory.lock():
                pass
    finally:
        over.set()
        for asker in askers:
            asker.join()
    assert answers


def test_a_state_says_where_training_stands_under_the_same_keys_as_ever(toy, tmp_path):
    """States outlive versions of the code: those that were written before Position was have these keys, too."""
    from cil.train import train

    def stop(progress):
        import signal

        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(toy, tmp_path / "toy", report=stop)
    directory = open_run(tmp_path / "toy")
    (path,) = resume.states(directory)
    state = resume.load(directory, 0)
    assert list(state) == ["model", "optimizer", "task", "phase", "epoch", "step", "sums", "seconds"]
    assert (state["task"], state["phase"], state["epoch"], state["step"], path.stem) == (0, "fit", 1, 0, "000000001")
    assert state["sums"].dtype == torch.float64 and Position.of(state) == Position(1, 0)
    assert resume.last_good(directory) == str(path) and directory.resume_folder == path.parent


def test_names_of_devices():
    assert device.resolve("cpu") == "cpu"
    assert device.resolve("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("foo", "cuda:99"):
        with pytest.raises(ValueError, match=f"^no device '{name}' here") as caught:
            device.resolve(name)
        assert "\n" not in str(caught.value)
    assert device.cores() >= 1


def test_the_lock_is_of_the_file_that_earlier_versions_lock(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / checkpoint.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
