"""What a plan costs: at the pace of what was run, with stand-ins for data that are not there."""

import pandas as pd
import pytest
import torch

from cil import recipes
from cil.device import processor
from figures.paper.cost import cost_of, nominal
from figures.paper.plan import jobs_of, needs
from figures.paper.study import Study


def test_cost_is_at_the_pace_of_what_was_run(tmp_path):
    jobs = list(dict.fromkeys(jobs_of(needs("paper")["fig1"], tmp_path, "data").values()))
    study = Study(tmp_path)
    row = {
        "run": "x", "scale": "paper", "setting": "b10-10", "system": "baseline", "method": "baseline", "n_lpa": 0,
        "lpa_blocks": 5, "lambda_init": 0.02, "training": "incremental", "seed": 0, "tasks": 1, "classes": 10, "steps": 10,
        "images": 1000, "seconds": 20.0, "git": "", "trainer": 2, "torch": "", "device": processor("cpu"), "settings": "{}",
    }  # fmt: skip
    elsewhere = row | {"run": "z", "seconds": 99.0, "device": "another"}
    joint = row | {"run": "y", "training": "joint", "seconds": 10.0}
    study.add("x", {"runs.csv": pd.DataFrame([row])}, {"run": "x", "kind": "accuracy"} | dict.fromkeys(
        ("images", "seconds"), 1) | dict.fromkeys(("source", "sha256", "git"), ""))  # fmt: skip
    study.add("y", {"runs.csv": pd.DataFrame([joint])}, {"run": "y", "kind": "accuracy"} | dict.fromkeys(
        ("images", "seconds"), 1) | dict.fromkeys(("source", "sha256", "git"), ""))  # fmt: skip
    study.add("z", {"runs.csv": pd.DataFrame([elsewhere])}, {"run": "z", "kind": "accuracy"} | dict.fromkeys(
        ("images", "seconds"), 1) | dict.fromkeys(("source", "sha256", "git"), ""))  # fmt: skip
    for job, (steps, images, seconds) in zip(jobs, cost_of(jobs, study, 1, "cpu"), strict=True):
        assert steps == (640_100 if job.run.training == "joint" else 156_560)
        assert images == 256 * steps and seconds == pytest.approx(
            images * (0.01 if job.run.training == "joint" else 0.02)
        )


def test_nominal_images_take_no_memory():
    run = recipes.find("paper-imagenet-b10-10-baseline")
    dataset = nominal(run)
    assert len(dataset.train) == 130_000 and dataset.image_size == (224, 224)
    assert dataset.train.images.untyped_storage().nbytes() == 3 * 224 * 224
    assert torch.equal(torch.bincount(dataset.test.labels), torch.full((100,), 50))
