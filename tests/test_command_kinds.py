"""Every command that looks at runs, on every kind of run; and the options that all commands which compute have."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY, invoke, run_ok

from cil.checkpoint import open_run
from cil.recipes import find
from cil.train import train
from figures import nonlocality_over_tasks, spectra, transfer
from locality_probe.cli import main
from locality_probe.tables import CKA, COMPARISON, NONLOCALITY, SPECTRUM, TRANSFER

pytestmark = pytest.mark.usefixtures("here")

KINDS = {  # beside the toy's, a baseline with GPSA and LPA
    "dytox-lpa": {"method": "dytox", "n_lpa": 1},
    "plain": {"attention": "mhsa"},
    "timm": {"model": "timm/test_vit", "patch_size": 2},
}


@pytest.fixture(scope="session")
def of_each_kind(tmp_path_factory) -> Path:
    """A folder with runs of 2 tasks, and their joint twins: dytox and dytox-joint, ..."""
    root = tmp_path_factory.mktemp("kinds")
    for name, change in KINDS.items():
        run = find("demo-baseline").change([f"{key}={value}" for key, value in (TINY | change).items()])
        train(run, root / name)
        train(run.joint(), root / f"{name}-joint")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_every_kind_of_run(of_each_kind, kind, picture):
    run, twin = of_each_kind / kind, of_each_kind / f"{kind}-joint"
    for line in (
        ["measure", run, "--n", 3, "--out", "out"],
        ["doctor", run],
        ["compare", run, twin, "--n", 3, "--out", "out"],
        ["compare", run / "task_01.safetensors", run / "task_00.safetensors", "--n", 3, "--out", "out"],
        ["spectrum", run, "--out", "out"],
        ["transfer", run, "--task", 1, "--per-class", 4, "--test-per-class", 4, "--out", "out"],
        ["heatmap", picture, "--ckpt", f"{run}:all", "--ckpt", f"{twin}:1", "-o", "out.png"],
        ["heatmap", picture, "--ckpt", f"{run}:0", "--ckpt", f"{run}:1", "--difference", "-o", "out.png"],
    ):
        run_ok(*line)


@pytest.mark.parametrize("kind", KINDS)
def test_cka_compares_the_layers_that_both_networks_have(of_each_kind, kind):
    result = run_ok("transfer", of_each_kind / kind, "--per-class", 4, "--test-per-class", 4, "--out", "out")
    rows = CKA.read("out/cka.csv").query("run == @kind")
    blocks = [f"block {i}" for i in range(6 if kind == "timm" else 1)]
    for _, layers in rows.groupby(["task", "other_run", "other_task"])["layer"]:
        assert layers.tolist() == [*blocks, "token"]
    both = set(rows[["task", "other_run", "other_task"]].itertuples(index=False, name=None))
    assert both == {(0, f"{kind}-joint", 0), (1, f"{kind}-joint", 1), (1, kind, 0)}
    token_per_task = "dytox" in kind
    said = f"CKA of {kind} leaves out the layer tokens where task 0 or the joint twin has no such layer"
    assert (said in result.stderr) == token_per_task
    rows = TRANSFER.read("out/transfer.csv").query("run == @kind and layer == 'tokens'")
    assert set(rows["task"]) == ({1} if token_per_task else set())  # measured all the same, where it is


# options


COMPUTING = {"train", "sweep", "measure", "doctor", "compare", "spectrum", "transfer", "heatmap", "demo", "reproduce"}


def test_each_command_that_computes_takes_device_and_threads():
    assert set(main.commands) == COMPUTING | {"recipes"}
    for name in COMPUTING:
        assert {"device", "threads"} <= {option.name for option in main.commands[name].params}, name


def test_an_option_has_one_meaning_in_all_commands():
    """Its type and whether it repeats; its help may name another default."""
    found = {}
    for command in main.commands.values():
        for option in command.params:
            if option.param_type_name == "option" and option.name not in ("scale", "out"):
                found.setdefault(option.opts[0], []).append((type(option.type), option.multiple, option.metavar))
    odd = {name: ways for name, ways in found.items() if len(set(ways)) > 1}
    assert set(odd) <= {"--threads"}  # of each training, which may be one in a list of jobs, or of the command itself


@pytest.mark.parametrize(
    "line",
    [
        "measure runs/toy --n 1", "doctor runs/toy", "compare runs/toy runs/toy-joint --n 2", "spectrum runs/toy --task 0",
        "transfer runs/toy --task 2 --per-class 2 --test-per-class 4",
        "heatmap picture.png --ckpt runs/toy", "train demo-baseline --dry-run --set dim=9",
    ],
)  # fmt: skip
def test_threads(runs, picture, monkeypatch, line):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("cil.device.cores", lambda: 4)
    run_ok(*line.split(), "--threads", 3, "--device", "cpu")
    assert 3 in asked
    assert invoke(*line.split(), "--threads", 0).exit_code == 2
    assert invoke(*line.split(), "--threads", 10**10).exit_code == 2
    assert invoke(*line.split(), "--device", "quantum").exit_code == 2


def test_more_threads_than_cores_are_cores_and_a_word(runs, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("cil.device.cores", lambda: 2)
    result = run_ok("doctor", "runs/toy", "--threads", 1000)
    assert asked == [2] and "--threads 1000: this machine has 2 cores" in result.stderr


def test_the_demo_passes_device_and_threads_on(monkeypatch):
    given = []
    monkeypatch.setattr("figures.paper.demo.run_demo", lambda out, echo, *rest: given.append((out, *rest)))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    run_ok("demo")
    run_ok("demo", "--out", "mine", "--device", "cpu", "--threads", 3)
    assert given == [(Path("runs/demo"), "cpu", 1), (Path("mine"), "cpu", 3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(of_each_kind, kind, picture):
    run = of_each_kind / kind
    for line in (
        ["measure", run, "--n", 3, "--out", "out"],
        ["doctor", run],
        ["heatmap", picture, "--ckpt", f"{run}:all", "--query", "pixel:3,3", "-o", "out.png"],
        ["heatmap", picture, "--ckpt", run, "--rollout", "--query", "cls", "-o", "out.png"],
    ):
        run_ok(*line, "--device", "cuda")


# wrong paths and words


WITHOUT_TORCH = """
import sys
from click.testing import CliRunner
from locality_probe.cli import main
for line in sys.argv[1:]:
    result = CliRunner().invoke(main, line.split())
    code = 2 if line.startswith("heatmap picture.png") and "--ckpt nowhere" not in line or "keras" in line else 1
    assert result.exit_code == code and "Error: " in result.output, (line, result.output)
    heavy = {"torch", "timm", "numpy", "pandas", "matplotlib", "PIL", "sklearn", "figures"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""


def test_what_can_be_told_without_torch_is(picture):
    lines = [
        "measure nowhere", "measure runs/a/task_00.safetensors", "compare nowhere elsewhere", "spectrum nowhere",
        "transfer nowhere", "doctor nowhere", "heatmap missing.png", "heatmap picture.png --ckpt nowhere",
        "heatmap picture.png --query centre", "heatmap picture.png --layer deep", "heatmap picture.png --head first",
        "heatmap picture.png", "measure --model keras/vit_b_16", "heatmap picture.png --model vit", 
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *lines], check=True, env=environment)


# counting


def titles(figure) -> set[str]:
    """Titles of panels and names of lines that count."""
    words = [axes.get_title() for axes in figure.axes]
    words += [line.get_label() for axes in figure.axes for line in axes.lines]
    return {word.partition(",")[0] for word in words if word.startswith(("layer ", "task "))}


def test_what_commands_draw_counts_from_0_and_the_papers_figures_from_1(runs, monkeypatch):
    """The drawings of all commands, at the default, and as the paper's page asks for them."""
    from figures import comparison, style

    run_ok("measure", "runs/toy", "--n", 3, "--out", "out")
    drawn, save = {}, style.save
    monkeypatch.setattr(
        style, "save", lambda figure, path: (drawn.setdefault(path.name, figure), save(figure, path))[1]
    )
    run_ok("compare", "runs/toy", "runs/toy-joint", "--n", 3, "--out", "out")
    run_ok("spectrum", "runs/toy", "--out", "out")
    run_ok("transfer", "runs/toy", "--per-class", 4, "--test-per-class", 4, "--out", "out")
    layers, tasks = {"layer 0", "layer 1"}, {"task 0", "task 1", "task 2"}
    assert titles(drawn["comparison.png"]) == layers
    assert titles(drawn["spectrum.png"]) == tasks and titles(drawn["transfer.png"]) == {"task 0", "task 1"}
    distances = NONLOCALITY.read("out/nonlocality.csv")
    assert titles(nonlocality_over_tasks.draw(distances)) == layers

    layers, tasks = {"layer 1", "layer 2"}, {"task 1", "task 2", "task 3"}
    assert titles(comparison.draw(COMPARISON.read("out/comparison.csv"), first=1)) == layers
    assert titles(nonlocality_over_tasks.draw(distances, first=1)) == layers
    assert titles(spectra.draw(SPECTRUM.read("out/spectrum.parquet"), first=1)) == tasks
    frame = TRANSFER.read("out/transfer.csv")
    assert titles(transfer.draw(frame, distances, first=1)) == {"task 1", "task 2"}


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("runs/toy", "runs/toy-joint", ["toy", "toy-joint"]),
        ("runs/toy/task_02.safetensors", "runs/toy/task_00.safetensors", ["toy:2", "toy:0"]),
        ("runs/toy/task_02.safetensors", "runs/toy-joint/task_00.safetensors", ["toy:2", "toy-joint:0"]),
        ("runs/toy/task_02.safetensors", "runs/toy-joint/task_02.safetensors", ["toy", "toy-joint"]),
    ],
)
def test_compare_says_which_is_which(runs, monkeypatch, first, second, names):
    from figures import style

    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure) or path)
    result = run_ok("compare", first, second, "--n", 3, "--out", "out")
    assert result.stdout.startswith(f"{names[0]} minus {names[1]}: D_loc in patches")
    assert f"layer 0: {names[0]} " in result.stdout
    assert drawn[0].get_suptitle() == f"{names[0]}\nminus {names[1]}"
    tasks = pd.read_csv("out/comparison.csv")[["task", "other_task"]].drop_duplicates()
    assert len(tasks) == 1 or (tasks["task"] == tasks["other_task"]).all()
    assert open_run("runs/toy").tasks == [0, 1, 2]
