"""The command train, on tiny real runs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import TINY, beyond_recipe, flat, invoke, run_ok, settings

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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."),
         "the GPU's memory is too small for this work, which wanted 2.50 GiB more; what helps: several processes"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
         "memory is too small for this work; what helps: several processes"),
    ],
)  # fmt: skip
def test_too_little_memory_is_a_sentence_with_advice(error, words, tmp_path, monkeypatch):
    def step(*arguments):
        raise error

    monkeypatch.setattr("cil.fit.Learner.step", step)
    result = invoke("train", "demo-baseline", "--out", tmp_path / "run")
    assert result.exit_code == 1 and words in flat(result.output) and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["memory=3"], "memory=3 is less than one exemplar for each of 4 classes: from task 1 on none is kept, and there is no "
         "fine-tuning; memory=6 keeps one of each class to the end"),
        (["images_per_class=2"], "batch_size=8 is more than the 4 images of task 0 (fit): an epoch is then one step on all"),
    ],
)  # fmt: skip
def test_what_may_be_a_slip_is_said_once(settings, words, tmp_path):
    tiny = TINY | {"num_classes": 6, "images_per_class": 6, "memory": 12}
    given = [x for s in [*(f"{k}={v}" for k, v in tiny.items()), *settings] for x in ("--set", s)]
    assert words in flat(run_ok("train", "demo-baseline", "--dry-run", *given).output)
    command = ("train", "demo-baseline", "--out", tmp_path / "run", *given)
    assert words in flat(run_ok(*command).stderr)
    assert words not in flat(run_ok(*command).stderr)


def test_no_remark_where_nothing_is_odd(tmp_path):
    given = [x for k, v in TINY.items() for x in ("--set", f"{k}={v}")]
    assert run_ok("train", "demo-baseline", "--out", tmp_path / "run", *given).stderr.count("is less than") == 0


def test_a_scenario_that_starts_with_no_class_is_told_what_it_is_here(tmp_path):
    result = invoke("train", "demo-baseline", "--set", "scenario=B0-2", "--dry-run")
    assert result.exit_code == 2 and "tasks of 2 classes each, it is B2-2 here" in flat(result.output)
