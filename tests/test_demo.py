"""The demo's orchestration, with toys in place of its recipes; .ci/run does the real one."""

import dataclasses
import multiprocessing
import signal
from pathlib import Path

import pytest

from cil import recipes
from cil.checkpoint import is_locked, open_run
from figures.paper import demo


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Processes of a sweep import what is tested, and signals are handled afterwards as before."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_finish(toy, tmp_path, monkeypatch):
    short = dataclasses.replace(toy, num_classes=4, epochs_first=1, epochs=1, finetune_epochs=0)
    bad = dataclasses.replace(short, lr_first=1e30, warmup_epochs=0, epochs_first=9)
    runs = {"good": short, "bad": bad, "better": dataclasses.replace(short, seed=1)}
    monkeypatch.setattr(recipes, "find", lambda name: dataclasses.replace(runs[name], recipe=name))
    times = []
    for _ in range(2):  # again: what is finished is left as it is
        with pytest.raises(ValueError, match=r"^bad: the loss is (nan|inf) in task 0") as caught:
            demo.train_all(list(runs), tmp_path)
        assert "good:" not in str(caught.value) and "better:" not in str(caught.value)
        assert [open_run(tmp_path / name).finished for name in runs] == [True, False, True]
        times.append([path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/task_*"))])
    assert times[0] == times[1] and len(times[0]) == 4


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    """Nobody is left training after kill -9, so that the demo can be started again."""
    context = multiprocessing.get_context("spawn")
    parent, out = context.Process(target=demo.train_all, args=(["demo-baseline"], tmp_path)), tmp_path / "demo-baseline"
    parent.start()
    while parent.is_alive() and not is_locked(out):
        parent.join(0.05)
    assert parent.is_alive()
    parent.kill()
    parent.join()
    for _ in range(200):
        if not is_locked(out):
            break
        context.Event().wait(0.1)
    else:
        pytest.fail("the worker still holds the run directory")
    assert not open_run(out).finished
