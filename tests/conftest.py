"""One shared toy run: three tasks of real digits, a baseline with one LPA layer, and its joint twin."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cil import recipes
from cil.checkpoint import RunDir
from cil.run import Run
from cil.train import train

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"

TOY = dataclasses.replace(
    recipes.find("demo-baseline"),
    num_classes=6, images_per_class=12, dim=24, num_heads=4, depth=3, n_lpa=1, batch_size=16,
    epochs_first=2, epochs=2, finetune_epochs=2, warmup_epochs=1, mixup=0.8, memory=20,
)  # fmt: skip


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
