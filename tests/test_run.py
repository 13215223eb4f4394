import dataclasses
import json

import pytest
import torch

from cil import recipes
from cil.run import Run, randomness


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("kind", ["", "-joint", "-joint-terminal", "-joint-as-long"])
def test_every_recipe_survives_json_and_has_a_twin(name, kind):
    run = recipes.find(name + kind)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert run.recipe == name + kind
    assert recipes.RECIPES[name].__doc__
    assert run.training == (kind.removeprefix("-") or "incremental")
    assert run.is_twin_of(recipes.find(name)) and recipes.find(name).joint().is_twin_of(run)


def test_twins_differ_in_training_alone():
    run = Run()
    assert not run.joint().is_twin_of(dataclasses.replace(run, mixup=0.0))
    assert run.joint("joint-terminal").training == "joint-terminal"


def test_settings():
    run = Run().change(["lr=1e-3", "flip=false", "n_lpa=5", "dataset=digits"])
    assert (run.lr, run.flip, run.n_lpa, run.dataset) == (1e-3, False, 5, "digits")


@pytest.mark.parametrize(
    "setting, message",
    [("epoch=3", "near: epochs"), ("lr", "not key=value"), ("lr=fast", "not of type float"),
     ("flip=maybe", "neither true nor false"), ("method=icarl", "none of baseline, dytox"), ("n_lpa=6", "5 self-attention"),
     ("dim=100", "not a multiple"), ("depth=1", "at least 2"), ("batch_size=0", "at least 1"), ("memory=-1", "at least 0"),
     ("drop_path=1", "below 1"), ("smoothing=nan", "below 1"), ("kd_tau=0", "above 0"), ("lr=inf", "above 0"),
     ("mixup=nan", "at least 0"), ("lambda_init=inf", "finite"), ("rand_augment=rand-m9-x1", "RandAugment"),
     ("zzzz=1", "there are: recipe, seed")],
)  # fmt: skip
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        Run().change([setting])


def test_nothing_is_silently_defaulted():
    values = Run().to_dict()
    with pytest.raises(ValueError, match=r"lacks \['mixup'\]"):
        Run.from_dict({k: v for k, v in values.items() if k != "mixup"})
    with pytest.raises(ValueError, match="new_option"):
        Run.from_dict(values | {"new_option": 1})


@pytest.mark.parametrize("name, value", [("dim", "384"), ("flip", 1), ("seed", True), ("epochs", 2.0), ("mixup", None)])
def test_values_of_another_type_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not of type"):
        Run.from_dict(Run().to_dict() | {name: value})
    assert Run.from_dict(Run().to_dict() | {"mixup": 1}).mixup == 1


def test_randomness_is_named_and_leaves_no_trace():
    before = torch.get_rng_state()
    with randomness(0, "fit", 1):
        first = torch.rand(3)
    with randomness(0, "fit", 1) as generator:
        assert torch.equal(torch.rand(3, generator=generator), first)
    with randomness(0, "fit", 2):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_recipe():
    with pytest.raises(ValueError, match="demo-baseline"):
        recipes.find("demo-basline")
