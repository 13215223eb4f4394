"""The command train, on tiny real runs."""

import dataclasses
from pathlib import Path

import pytest
from conftest import TINY, beyond_recipe, flat, run_ok, settings

from cil import recipes
from cil.checkpoint import open_run

pytestmark = pytest.mark.usefixtures("here")


def test_train_and_go_on(here):
    train = ["train", "demo-baseline", *settings(TINY), "--threads", 1, "--device", "cpu"]
    result = run_ok(*train, "--out", "new/run")
    assert result.stdout.startswith("new/run: tasks 0 to 1 finished; Last ")
    assert "task 2/2 finetune" in result.stderr
    directory = open_run("new/run")
    assert directory.tasks == [0, 1] and directory.run == dataclasses.replace(recipes.find("demo-baseline"), **TINY)
    before = {p: p.stat().st_mtime_ns for p in directory.path.rglob("*") if p.name != ".lock"}
    again = run_ok(*train, "--out", "new/run")
    assert (again.stdout, again.stderr) == (result.stdout, "")
    assert before == {p: p.stat().st_mtime_ns for p in directory.path.rglob("*") if p.name != ".lock"}

    terminal = run_ok("train", "demo-baseline-joint-terminal", *settings(TINY), "--out", "new/run-joint-terminal")
    assert terminal.stdout.startswith("new/run-joint-terminal: tasks 1 to 1 finished; Last ")
    assert open_run("new/run-joint-terminal").twin_of == "run"


def test_train_goes_on_where_it_was(runs, toy):
    last = runs / "toy" / "task_02.safetensors"
    weights = last.read_bytes()
    last.unlink()
    run_ok("train", "demo-baseline", *settings(beyond_recipe(toy)), "--out", runs / "toy")
    assert last.read_bytes() == weights


def test_train_here_gives_the_run_its_folders_name(here, monkeypatch):
    Path("mine-joint").mkdir()
    monkeypatch.chdir("mine-joint")
    run_ok("train", "demo-baseline-joint", *settings(TINY), "--out", ".")
    assert (open_run(".").name, open_run(".").twin_of) == ("mine-joint", "mine")


def test_dry_run_writes_nothing(here):
    result = run_ok("train", "demo-baseline", *settings(TINY), "--dry-run", "--out", "run")
    # 4 classes x 6 images, 2 a task; 8 exemplars: 4 a class after task 0, 2 after task 1
    assert [line.split()[:6] for line in result.stdout.splitlines()[2:5]] == [
        ["0", "2", "fit", "12", "1", "1"],
        ["1", "4", "fit", "20", "1", "2"],
        ["1", "4", "finetune", "8", "1", "1"],
    ]
    assert "4 steps at batch 8, 32 images; 8 exemplars" in flat(result.stdout)
    assert result.stderr == "" and not list(here.iterdir())
