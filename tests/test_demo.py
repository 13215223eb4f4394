"""The demo's orchestration, with a toy in place of its recipes; .ci/run does the real one."""

import multiprocessing

import pytest

from figures.paper import demo


def test_a_run_that_fails_is_named_and_the_others_finish(tmp_path, monkeypatch):
    trained = tmp_path / "out"
    monkeypatch.setattr(demo, "_worker", worker)
    with pytest.raises(ValueError, match=r"^bad: loss is nan; dead: its process ended with code 3$"):
        demo.train_all(["good", "bad", "dead", "better"], trained)
    assert sorted(p.name for p in trained.iterdir()) == ["better", "good"]


def worker(name, out, events, device, threads):
    if name == "dead":
        raise SystemExit(3)
    if name == "bad":
        events.put((name, 1.0, "failed: loss is nan"))
        return
    out.mkdir(parents=True, exist_ok=True)
    events.put((name, 0.5, "half"))


def test_workers_end_with_their_parent(tmp_path):
    """Nobody is left training after kill -9, so that the demo can be started again."""
    context = multiprocessing.get_context("spawn")
    parent, out = context.Process(target=demo.train_all, args=(["demo-baseline"], tmp_path)), tmp_path / "demo-baseline"
    parent.start()
    while parent.is_alive() and not (out / "run.json").exists():
        parent.join(0.05)
    assert parent.is_alive()
    parent.kill()
    parent.join()
    from cil.checkpoint import open_run

    for _ in range(200):
        try:
            with open_run(out).lock():
                break
        except ValueError:
            context.Event().wait(0.1)
    else:
        pytest.fail("the worker still holds the run directory")
