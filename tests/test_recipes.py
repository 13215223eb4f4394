"""The runs of the paper by name: every cell and sweep is there, builds, survives JSON, starts; what they promise is so."""

import dataclasses
import itertools
import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from cil import checkpoint, recipes, start
from cil.data import CIFAR100_MEAN, CIFAR100_STD, Dataset, ImageSet
from cil.recipes import COSTS, LAMBDAS, PUBLISHED, RECIPES, SCENARIOS, SYSTEMS
from cil.run import Run
from cil.schedule import plan, total_steps
from cil.train import in_class_order, train


def labels_only(per_class: int, size: int) -> Dataset:
    """100 classes with as many training images each as the real set has, and hardly any pixels."""
    labels = torch.arange(100).repeat_interleave(per_class)
    images = ImageSet(torch.zeros(1, 3, size, size), labels)
    return Dataset(images, images, [str(c) for c in range(100)], CIFAR100_MEAN, CIFAR100_STD)


CIFAR, IMAGENET = labels_only(500, 32), labels_only(1300, 224)


def data_of(run: Run) -> Dataset:
    return IMAGENET if run.dataset == "imagenet100" else CIFAR


def test_every_recipe_survives_json():
    for name in (
        name + training for name in RECIPES for training in ("", "-joint", "-joint-terminal", "-joint-as-long")
    ):
        run = recipes.find(name)
        assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run and run.recipe == name


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_starts(name, toy, tmp_path, monkeypatch):
    """At demo size: what is large is cut down, what makes the recipe stays."""
    run = recipes.find(name)
    if run.weights == "hub":
        run = dataclasses.replace(run, model="timm/test_vit", input_size=16, n_lpa=min(run.n_lpa, 6))
        monkeypatch.setattr(start, "fetched", lambda name: tmp_path / "hub.safetensors")
        save_file(timm.create_model("test_vit").state_dict(), tmp_path / "hub.safetensors")
    few = {f: getattr(toy, f) for f in ("dataset", "class_order", "num_classes", "image_size", "dim", "num_heads")}
    cut = dataclasses.replace(
        run, **few, patch_size=4, scenario="B4-2", images_per_class=4, batch_size=4, crop_padding=0,
        epochs_first=1, cosine_epochs_first=0, epochs=1, finetune_epochs=1, memory=4,
    )  # fmt: skip

    class Started(Exception):
        pass

    def stop(progress):
        raise Started

    with pytest.raises(Started):
        train(cut, tmp_path / "run", report=stop)


def test_every_cell_of_both_tables_and_both_sweeps():
    for scale, system in itertools.product(("paper", "paper-as-released"), SYSTEMS):
        cells = [f"{scale}-{s.lower()}-{system}" for s in SCENARIOS["cifar"]]
        cells += [f"{scale}-imagenet-{s.lower()}-{system}" for s in SCENARIOS["imagenet"]]
        assert all(name in RECIPES for name in cells) and len(cells) == 7
    for scenario, system in itertools.product(SCENARIOS["cifar"], SYSTEMS):
        assert recipes.find(f"small-{scenario.lower()}-{system}").scenario == scenario
    assert all(f"demo-{system}" in RECIPES for system in SYSTEMS)
    for stem in ("paper-b10-10", "paper-as-released-b10-10", "small-b10-10", "demo"):
        runs = [recipes.find(f"{stem}-baseline-lambda-{value:g}") for value in LAMBDAS]
        assert [r.lambda_init for r in runs] == list(LAMBDAS) and all(r.n_lpa == r.depth - 1 for r in runs)
        assert [recipes.find(f"{stem}-baseline-nlpa-{n}").n_lpa for n in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name", [n for n in RECIPES if n.startswith("paper") and n.endswith(tuple(SYSTEMS)) and "lambda" not in n]
)
def test_recipe_is_its_cell(name):
    """Read back off the name what the run must be, and off the docstring what it costs and should give."""
    run = recipes.find(name)
    parts = re.fullmatch(r"paper(-as-released)?(-imagenet)?-(b\d+-\d+)-(baseline|dytox)(-lpa)?", name)
    released, imagenet, scenario, method, lpa = parts.groups()
    assert run.scenario == scenario.upper() and run.method == method and run.n_lpa == (5 if lpa else 0)
    assert (run.dataset, run.class_order, run.patch_size) == (
        ("imagenet100", "imagenet100", 16) if imagenet else ("cifar100", "icarl", 4))  # fmt: skip
    assert run.mixup == 0.8 and (run.memories == 2) == bool(released)
    setting = ("imagenet-" if imagenet else "") + scenario
    doc = RECIPES[name].__doc__
    assert PUBLISHED[setting][list(SYSTEMS).index(method + (lpa or ""))] in doc and f"train {name}." in doc
    steps = int(re.search(r"Cost: ([\d ]+) steps", doc)[1].replace(" ", ""))
    directory = checkpoint.describe("run", run, data_of(run))
    assert total_steps(plan(directory, in_class_order(data_of(run), directory))) == steps


def test_paper_as_released_differs_in_its_switches_alone():
    ours, released = (
        recipes.find(f"{scale}-b10-10-baseline-lpa").to_dict() for scale in ("paper", "paper-as-released")
    )
    assert {k: v for k, v in released.items() if v != ours[k]} == {
        "recipe": "paper-as-released-b10-10-baseline-lpa", "memory_mode": "per-process:2", "herding_crop": True,
        "cosine_epochs_first": 600, "schedule_late": True, "repeats": 3, "lambda_init_mode": "normal", "eval_amp": "fp16",
        "frozen_eval": False,
    }  # fmt: skip


def test_what_is_compared_differs_in_what_is_compared_alone():
    """No confounder between the systems of a setting: the same augmentation, budget, memory and seed."""
    for stem in ("paper-b50-5", "small-b10-10", "demo", "learned-b6-2"):
        base = recipes.find(f"{stem}-baseline")
        for system in SYSTEMS:
            other = recipes.find(f"{stem}-{system}")
            same = dataclasses.replace(other, recipe=base.recipe, method=base.method, n_lpa=base.n_lpa)
            if (
                stem.startswith("learned") and other.method == "dytox"
            ):  # with mixup, as DyTox+ has it; its own baseline has it
                assert other.mixup == recipes.find(f"{stem}-dytox").mixup == 0.8
                same = dataclasses.replace(same, mixup=base.mixup)
            assert same == base
        twin = recipes.find(f"{stem}-dytox-lpa-joint")
        assert twin.is_twin_of(recipes.find(f"{stem}-dytox-lpa")) and not twin.is_twin_of(base)


def test_controls_differ_in_what_they_control_alone():
    for stem in ("paper-b10-10", "learned-b2-2", "small-b10-10", "demo"):
        base, lpa = (recipes.find(f"{stem}-{system}") for system in ("baseline", "baseline-lpa"))
        for system, of, differ in (
            ("baseline-mhsa", base, {"attention": ("gpsa", "mhsa")}),
            ("baseline-gate", base, {"gate_init": (1.0, 6.0)}),
            ("baseline-lpa-frozen", lpa, {"positional_frozen": (False, True)}),
            ("baseline-lpa-random", lpa, {"positional_start": ("local", "random")}),
        ):
            assert of.differences(recipes.find(f"{stem}-{system}")) == differ


def test_recipes_for_cpus_ask_for_float32():
    assert {recipes.find(name).amp for name in RECIPES if name.startswith(("learned", "small", "demo"))} == {"none"}


def test_small_is_real_cifar100_with_all_classes_and_the_papers_layers():
    run = recipes.find("small-b10-10-baseline")
    assert (run.dataset, run.num_classes, run.depth, run.patch_size, run.scenario) == ("cifar100", 0, 6, 4, "B10-10")


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_says_command_cost_and_result(name):
    doc = RECIPES[name].__doc__
    assert (
        re.search(r"Published|Measured|Not yet run", doc)
        and f"train {name}." in " ".join(doc.split())
        and re.search(r"Cost: |hour|minute", doc)
    )
    assert "TODO" not in doc


def test_costs_are_all_used():
    used = {name for name in COSTS if any(COSTS[name] in function.__doc__ for function in RECIPES.values())}
    assert used == set(COSTS)


def test_own_recipe_is_a_function(monkeypatch):
    monkeypatch.setattr(recipes, "RECIPES", dict(RECIPES))

    @recipes.recipe
    def my_own_run() -> Run:
        """A minute. Not yet run."""
        return Run(dim=48)

    assert recipes.find("my-own-run-joint") == Run(recipe="my-own-run-joint", dim=48, training="joint")
