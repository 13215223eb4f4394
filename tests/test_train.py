"""The task loop: published budgets, freezing, memory, determinism, going on after an interruption."""

import dataclasses
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cil import checkpoint, recipes, resume
from cil.checkpoint import open_run
from cil.data import CIFAR100_MEAN, CIFAR100_STD, Dataset, ImageSet
from cil.fit import Learner, Rows, fit, frozen_parts, teach
from cil.losses import auto_kd
from cil.run import Run
from cil.schedule import finetune_phase, learning_rate, main_phase, plan, total_steps
from cil.session import Session
from cil.train import in_class_order, load_dataset, train


@pytest.fixture(scope="module")
def cifar_labels():
    """A data set with CIFAR-100's labels and hardly any pixels."""
    sets = [ImageSet(torch.zeros(1, 1).expand(100 * n, 1), torch.arange(100).repeat_interleave(n)) for n in (500, 100)]
    return Dataset(*sets, [str(c) for c in range(100)], CIFAR100_MEAN, CIFAR100_STD)


def directory_of(run, labels):
    """Its run directory as planned, for 32-pixel images."""
    return checkpoint.describe("run", run, dataclasses.replace(
        labels, train=ImageSet(torch.zeros(1, 3, 32, 32), labels.train.labels)))  # fmt: skip


@pytest.mark.parametrize(
    "name, steps",
    [
        ("baseline", 156_560),
        ("baseline-lpa", 156_560),
        ("baseline-joint", 640_100),
        ("baseline-joint-as-long", 156_585),
    ],
)
def test_published_number_of_steps(name, steps, cifar_labels):
    directory = directory_of(recipes.find(f"paper-b10-10-{name}"), cifar_labels)
    phases = plan(directory, in_class_order(cifar_labels, directory))
    assert sum(p.steps * p.epochs for p in phases) == steps


@pytest.mark.parametrize(
    "settings, parameters",
    [([], 10_730_128), (["n_lpa=5"], 10_730_068), (["method=dytox"], 10_733_584)],
)
def test_published_parameter_counts(settings, parameters, cifar_labels):
    model = directory_of(Run().change(settings), cifar_labels).grown_model(9)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("settings", [["n_lpa=1"], ["attention=gpsa", "n_lpa=0"]])
def test_frozen_positional_weights_stay_as_they_start(toy, tmp_path, settings):
    few = ["epochs_first=1", "epochs=1", "finetune_epochs=1", "positional_frozen=true"]
    directory = train(toy.change([*settings, *few]), tmp_path / "run")
    start, end = (model.state_dict() for model in (directory.new_model(0), directory.model(2)))
    frozen = {name for name in start if name.endswith("pos_weight")}
    assert frozen and all(torch.equal(start[name], end[name]) for name in frozen)
    assert not torch.equal(start["blocks.0.attn.qk.weight"], end["blocks.0.attn.qk.weight"])
    thawed = train(toy.change([*settings, *few[:3]]), tmp_path / "thawed").model(2).state_dict()
    assert not any(torch.equal(start[name], thawed[name]) for name in frozen)


def test_learning_rate_of_the_protocol(cifar_labels):
    run = Run()
    directory = directory_of(run, cifar_labels)
    first, later = (main_phase(directory, task, torch.arange(5000)[None]) for task in (0, 1))
    assert (first.epochs, later.epochs) == (500, 600)
    assert learning_rate(run, first, 0) == pytest.approx(1e-6)
    assert learning_rate(run, first, 5) == pytest.approx(2.5e-4, rel=1e-3)
    assert learning_rate(run, later, 5) == pytest.approx(4e-4, rel=1e-3)
    assert learning_rate(run, later, 300) == pytest.approx((4e-4 + 1e-5) / 2)
    assert 1e-5 < learning_rate(run, later, 599) < 1.01e-5
    fine = finetune_phase(directory, 1, torch.arange(2000)[None])
    assert {learning_rate(run, fine, epoch) for epoch in range(20)} == {5e-5}
    terminal = directory_of(run.joint("joint-terminal"), cifar_labels)  # its one task is its first
    assert main_phase(terminal, 9, torch.arange(50_000)[None]).epochs == 500


def test_run_directory(toy_runs, toy):
    run = open_run(toy_runs / "toy")
    assert run.run == toy and run.tasks == [0, 1, 2] and run.joint_twin == "toy-joint"
    assert open_run(toy_runs / "toy-joint").twin_of == "toy"
    assert sorted(p.name for p in run.path.iterdir() if p.name != ".lock") == [
        "accuracy.csv", "memory", "run.json", "task_00.safetensors", "task_01.safetensors", "task_02.safetensors",
        "training.csv",
    ]  # fmt: skip
    accuracy = run.table("accuracy")
    assert accuracy[["task", "on_task"]].values.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1], [2, 2]]
    training = run.table("training")
    assert training.groupby(["task", "phase"]).size().to_dict() == {
        (0, "fit"): 2, (1, "fit"): 2, (1, "finetune"): 2, (2, "fit"): 2, (2, "finetune"): 2}  # fmt: skip
    assert [len(run.memory(t)) for t in range(3)] == [20, 20, 18]  # 20 in all: 10, 5, 3 a class
    assert (training["images"] > 0).all() and training["loss"].notna().all()


def test_accuracy_rows_are_what_the_weights_predict(toy_runs):
    run = open_run(toy_runs / "toy")
    dataset = in_class_order(load_dataset(run.run), run)
    row = run.table("accuracy").query("task == 2 and on_task == 1").iloc[0]
    chosen = run.scenario[1].select(dataset.test.labels)
    x = (dataset.test.images[chosen].float() / 255 - torch.tensor(run.mean)[:, None, None]) / torch.tensor(run.std)[
        :, None, None
    ]
    with torch.no_grad():
        predicted = run.model(2)(x).argmax(1)
    assert (predicted == dataset.test.labels[chosen]).sum() == row["correct"] and len(chosen) == row["images"]


def test_memory_holds_training_images_of_its_classes(toy_runs):
    run = open_run(toy_runs / "toy")
    dataset = in_class_order(load_dataset(run.run), run)
    for task in range(3):
        memory = run.memory(task)
        images = torch.tensor(memory["image"].to_numpy())
        assert dataset.train.labels[images].tolist() == memory["label"].tolist()


def test_incremental_and_joint_start_alike_and_part(toy_runs):
    cil, joint = (open_run(toy_runs / name) for name in ("toy", "toy-joint"))
    first = [load_file(run.weights_path(0)) for run in (cil, joint)]
    assert all(torch.equal(first[0][k], first[1][k]) for k in first[0])  # task 0: the same data, seed and budget
    starts = [joint.new_model(t).state_dict()["blocks.0.attn.qk.weight"] for t in (1, 2)]
    assert not torch.equal(*starts)  # a fresh initialisation for each task
    assert len(joint.model(2).heads) == 1 and joint.model(2).heads[0].fc.out_features == 6
    assert [head.fc.out_features for head in cil.model(2).heads] == [2, 2, 2]


def test_old_heads_are_frozen_in_the_main_phase_and_blocks_in_fine_tuning(toy_run, toy):
    model = toy_run.grown_model(2)
    names = [name for name, _ in model.named_parameters()]
    main = frozen_parts(toy_run, main_phase(toy_run, 2, torch.arange(1)[None]))
    assert {n for n in names if main(n)} == {n for n in names if n.startswith(("heads.0.", "heads.1."))}
    fine = frozen_parts(toy_run, finetune_phase(toy_run, 2, torch.arange(1)[None]))
    assert {n for n in names if not fine(n)} == {n for n in names if n.startswith(("heads.", "tokens."))}


def test_what_is_frozen_really_stays_in_eval_mode(toy_run, tmp_path):
    """Also stochastic depth inside frozen blocks: watched during real fine-tuning steps."""
    model, modes = toy_run.model(2), []
    run = dataclasses.replace(toy_run, path=tmp_path)
    dataset = in_class_order(load_dataset(run.run), run)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def watch(_):
        modes.append([m.training for m in model.blocks.modules()] + [not m.training for m in model.heads.modules()])

    images = torch.tensor(toy_run.memory(2)["image"].to_numpy())
    fit(run, dataset, model, finetune_phase(run, 2, images[None]), None, Session("cpu", watch))
    assert modes and not any(any(mode) for mode in modes)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith(("heads.", "tokens.")) for k in changed)


def test_teacher_sees_only_the_rows_whose_logits_are_used():
    calls = []

    def teacher(x):
        calls.append(len(x))
        return x.mean((1, 2, 3))[:, None].expand(-1, 2)

    x, old = torch.randn(4, 3, 8, 8), torch.tensor([True, False, False, True])
    logits = teach(teacher, x, Rows.where(old, 1), 2)
    assert torch.equal(logits[old], teacher(x)[old]) and not logits[~old].any()
    assert torch.equal(teach(teacher, x, None, 2), teacher(x))
    assert not teach(teacher, x, Rows.where(old & False, 1), 2).any()
    assert calls == [2, 4, 4, 4]


@pytest.mark.parametrize("chosen", [[True, False, False, True, True], [False] * 5, [True] * 5])
def test_rows_that_fill_up_change_no_loss(chosen):
    """On a GPU the rows to distil are a multiple of a number: fillers weigh nothing."""
    torch.manual_seed(0)
    x, chosen = torch.randn(5, 3, 8, 8), torch.tensor(chosen)
    logits, targets = torch.randn(5, 6), torch.rand(5, 6)
    exact, filled = (Rows.where(chosen, multiple) for multiple in (1, 4))
    assert len(filled.which) % 4 == 0 and filled.weights.sum() == chosen.sum() == len(exact.which)
    old = [teach(lambda x: x.flatten(1)[:, :2], x, rows, 2) for rows in (exact, filled)]
    assert torch.equal(old[0][chosen], old[1][chosen])
    if chosen.any():
        for tau in (1.0, 2.0):
            bce, kd = auto_kd(logits, targets, old[0], exact.which, tau)
            padded = auto_kd(logits, targets, old[1], filled.which, tau, filled.weights)
            torch.testing.assert_close((bce, kd), padded)


@pytest.mark.parametrize("changes", [{"kd": False}, {"kd_rows": "old"}, {"kd_rows": "all"}], ids=str)
def test_teacher_is_asked_only_where_its_output_is_used(changes, toy_run, toy):
    """A batch of new classes alone is distilled only where all rows are."""
    directory = dataclasses.replace(toy_run, run=dataclasses.replace(toy, **changes))
    dataset = in_class_order(load_dataset(toy), directory)
    teacher, calls = directory.model(0), []
    teacher.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    learner = Learner(directory, dataset, directory.grown_model(1), teacher, 1, "cpu")
    for labels in ([2, 3, 2, 3], [2, 3, 0, 1]):
        y = torch.tensor(labels)
        learner.step(torch.arange(4), y, ("test", 0))
    assert calls == {"kd": [], "old": [2], "all": [4, 4]}[changes.get("kd_rows", "kd")]


def test_same_seed_same_weights(toy_runs, toy, tmp_path):
    train(toy, tmp_path / "again")
    for task in range(3):
        first, second = (
            load_file(root / f"task_0{task}.safetensors") for root in (toy_runs / "toy", tmp_path / "again")
        )
        assert all(torch.equal(first[k], second[k]) for k in first)
    other = train(dataclasses.replace(toy, seed=1, num_classes=2), tmp_path / "other")
    weights = [
        d["blocks.0.attn.qk.weight"]
        for d in (load_file(other.weights_path(0)), load_file(toy_runs / "toy/task_00.safetensors"))
    ]
    assert not torch.equal(*weights)


class Stop(Exception):
    pass


def train_and_stop(run, out, steps):
    """Train, and break off after so many steps."""
    left = [steps]

    def stop(_):
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        train(run, out, report=stop)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 10, 13])
def test_interrupted_run_goes_on_to_the_same_weights(steps, toy_runs, toy, tmp_path, monkeypatch):
    """Stopped after so many steps, in the main phase or fine-tuning of any task, and started again."""
    monkeypatch.setattr("cil.fit.SAVE_EVERY", 0)
    train_and_stop(toy, tmp_path / "toy", steps)
    seen = []
    train(toy, tmp_path / "toy", report=seen.append)
    assert [p.done for p in seen] == list(range(seen[0].done, seen[-1].total + 1))
    for name in ("task_02.safetensors", "task_01.safetensors"):
        first, second = load_file(toy_runs / "toy" / name), load_file(tmp_path / "toy" / name)
        assert all(torch.equal(first[k], second[k]) for k in first)
    for table in ("accuracy.csv", "memory/task_02.csv"):
        assert (toy_runs / "toy" / table).read_text() == (tmp_path / "toy" / table).read_text()
    columns = ["task", "phase", "epoch", "loss", "lr"]
    tables = [pd.read_csv(root / "toy/training.csv")[columns] for root in (toy_runs, tmp_path)]
    pd.testing.assert_frame_equal(*tables)
    assert not (tmp_path / "toy/resume").exists()


@pytest.mark.parametrize("torn", [1, 2])
def test_torn_state_costs_what_was_done_since_the_one_before(torn, toy_runs, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("cil.fit.SAVE_EVERY", 0)
    train_and_stop(toy, tmp_path / "toy", 14)
    states = resume.states(open_run(tmp_path / "toy"))
    assert [int(path.stem) for path in states] == [13, 12]
    for state in states[:torn]:
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    seen = []
    train(toy, tmp_path / "toy", report=seen.append)
    assert seen[0].done == {1: 13, 2: 9}[torn]  # both torn: the task starts anew
    first, second = (load_file(root / "toy/task_02.safetensors") for root in (toy_runs, tmp_path))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_finished_run_is_left_alone(toy_runs, toy, tmp_path):
    shutil.copytree(toy_runs / "toy", tmp_path / "toy")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "toy").rglob("*") if p.is_file() and p.name != ".lock"}
    train(toy, tmp_path / "toy", report=lambda p: pytest.fail("it trained again"))
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_terminal_joint_training(toy, tmp_path):
    run = train(toy.joint("joint-terminal"), tmp_path / "toy-joint-terminal")
    assert run.tasks == [2] and run.twin_of == "toy" and run.joint_twin is None
    assert run.table("accuracy")[["task", "on_task"]].values.tolist() == [[2, 0], [2, 1], [2, 2]]
    assert not (run.path / "memory").exists()


def test_joint_training_as_long_as_the_increments(toy, tmp_path):
    """One model, all classes, the incremental run's steps to within half an epoch, over one cosine schedule."""
    run, dataset = train(toy.joint("joint-as-long"), tmp_path / "toy-joint-as-long"), load_dataset(toy)
    twin = checkpoint.describe("toy", toy, dataset)
    increments = total_steps(plan(twin, in_class_order(dataset, twin)))
    (phase,) = plan(run, in_class_order(dataset, run))
    assert abs(total_steps([phase]) - increments) <= phase.steps / 2 and phase.cosine == phase.epochs
    rows = run.table("training")
    assert rows["steps"].sum() == total_steps([phase]) and (rows["task"] == 2).all()
    assert run.tasks == [2] and run.twin_of == "toy"
    assert rows["lr"].iloc[-1] == pytest.approx(learning_rate(run.run, phase, phase.epochs - 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dytox", "kd_rows": "all"},
        {"method": "dytox", "n_lpa": 2, "attention": "mhsa"},
        {"attention": "mhsa", "n_lpa": 0},
        {"amp": "bf16", "n_lpa": 2},
        {"memory": 0},
        {"scenario": "B4-1"},
    ],
    ids=str,
)
def test_every_method_and_attention_trains_three_tasks(changes, toy, tmp_path):
    run = train(dataclasses.replace(toy, epochs=1, epochs_first=1, finetune_epochs=1, **changes), tmp_path / "run")
    assert run.tasks == [0, 1, 2]
    if changes.get("method") == "dytox":
        assert len(run.model(2).tokens) == 3
        assert not any("div_head" in name for name in load_file(run.weights_path(2)))  # it is for training alone


def test_training_learns(tmp_path):
    """Two digits, a minute of the demo's budget compressed to seconds: far above chance."""
    run = dataclasses.replace(recipes.find("demo-baseline"), num_classes=2, epochs_first=15)
    assert train(run, tmp_path / "run").table("accuracy")["accuracy"].iloc[0] > 0.9


def test_non_finite_loss_stops_with_its_place(toy, tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) in task 0, fit epoch \d+, step \d+, at learning rate"):
        train(dataclasses.replace(toy, lr_first=1e30, warmup_epochs=0, epochs_first=20), tmp_path / "run")
    assert not list((tmp_path / "run").glob("task_*"))
