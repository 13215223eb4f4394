"""The demo's orchestration, with toys in place of its recipes; .ci/run does the real one."""

import dataclasses
import multiprocessing
import signal
from pathlib import Path

import pandas as pd
import pytest
from conftest import flat

from cil import recipes
from cil.checkpoint import is_locked, open_run
from figures.paper import demo
from figures.paper.demo import what_was_seen


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


def test_the_last_line_says_what_was_seen():
    rows = [
        {"pair": pair, "training": training, "task": task, "d_loc": start + task * step}
        for pair, start in (("demo-baseline", 2.0), ("demo-baseline-lpa", 1.5))
        for training, step in (("incremental", 0.1), ("joint", -0.05))
        for task in (-1, 0, 1, 2, 3)
    ]
    said = what_was_seen(pd.DataFrame(rows), {"demo-baseline": 0.768, "demo-baseline-lpa": 0.862})
    assert flat(said) == (
        "Seen, with one seed: from the first task to the last, mean D_loc in patches of the baseline went from 2.00 to 2.30 "
        "(joint training: 2.00 to 1.85) and ended at an accuracy of 77 %; that of the baseline with LPA went from 1.50 to 1.80 "
        "(joint training: 1.50 to 1.35) and ended at an accuracy of 86 %."
    )
