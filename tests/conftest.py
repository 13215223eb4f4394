"""One shared toy run: three tasks of real digits, a baseline with one LPA layer, and its joint twin; and the command line."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cil import recipes
from cil.checkpoint import RunDir
from cil.run import Run
from cil.train import train
from locality_probe.cli import main

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"

TOY = dataclasses.replace(
    recipes.find("demo-baseline"),
    num_classes=6, images_per_class=12, dim=24, num_heads=4, depth=3, n_lpa=1, batch_size=16,
    epochs_first=2, epochs=2, finetune_epochs=2, warmup_epochs=1, mixup=0.8, memory=20,
)  # fmt: skip
TINY = {
    "num_classes": 4, "images_per_class": 6, "dim": 8, "num_heads": 2, "depth": 2,
    "epochs_first": 1, "epochs": 1, "finetune_epochs": 1, "batch_size": 8, "memory": 8,
}  # fmt: skip


@pytest.fixture(scope="session")
def toy() -> Run:
    return TOY


@pytest.fixture(scope="session")
def toy_runs(tmp_path_factory) -> Path:
    """A folder with the finished runs `toy` and `toy-joint`. Tests read it and write elsewhere."""
    root = tmp_path_factory.mktemp("runs")
    train(TOY, root / "toy")
    train(TOY.joint(), root / "toy-joint")
    return root


@pytest.fixture
def toy_run(toy_runs) -> RunDir:
    from cil.checkpoint import open_run

    return open_run(toy_runs / "toy")


def golden(name: str) -> dict[str, torch.Tensor]:
    """Arrays of a golden file as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture
def seeded() -> None:
    """The same random numbers for each test of a file with `pytestmark = pytest.mark.usefixtures("seeded")`."""
    torch.manual_seed(0)


def invoke(*arguments):
    """The command line in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def flat(printed):
    """What a command printed, however its lines were broken."""
    return " ".join(printed.split())


def run_ok(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def settings(values):
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def beyond_recipe(toy):
    """What makes the recipe demo-baseline the toy."""
    recipe = recipes.find("demo-baseline").to_dict()
    return {key: value for key, value in toy.to_dict().items() if value != recipe[key]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(here, toy_runs):
    """A copy of the toy and its twin: ./runs/toy and ./runs/toy-joint."""
    shutil.copytree(toy_runs, "runs")
    return Path("runs")


@pytest.fixture
def picture(here):
    pixels = np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    return Path("picture.png")


def tree():
    """Every file below the working directory with its content, hidden ones too, and every folder."""
    return {p: p.read_bytes() if p.is_file() else None for p in Path().rglob("*")}


def refused(*arguments, names=(), code=1):
    """The command fails with one sentence in which each of `names` stands, and leaves everything as it was."""
    before = tree()
    result = invoke(*arguments)
    assert result.exit_code == code, (result.output, result.exc_info)
    assert isinstance(result.exception, SystemExit) and result.stdout == ""
    said = [line for line in result.stderr.splitlines() if line and not line.startswith(("Usage: ", "Try '"))]
    said = [line for line in said if "is untrained: without --weights" not in line]
    assert len(said) == 1 and said[0].startswith("Error: "), result.stderr
    for name in [names] if isinstance(names, str) else names:
        assert str(name) in said[0], (name, said[0])
    assert "Traceback" not in result.stderr and tree() == before
    return said[0]
