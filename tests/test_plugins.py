"""What a user adds: a function and a line in a dict each, and it trains, saves, opens and is measured."""

import dataclasses

import pytest

from cil import recipes
from cil.attention import ATTENTION, SelfAttention
from cil.checkpoint import open_run
from cil.data import DATASETS, Source, digits
from cil.methods import METHODS
from cil.train import train
from locality_probe.plan import make_plan
from locality_probe.survey import survey


class Sharp(SelfAttention):
    """Content attention of a lower temperature."""

    def query_key(self, x):
        q, k = super().query_key(x)
        return 3 * q, k


def test_own_attention_method_data_set_and_recipe(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(ATTENTION, "sharp", lambda run, grid: Sharp(run.dim, run.num_heads, grid))
    monkeypatch.setitem(
        METHODS, "frozen-blocks", dataclasses.replace(METHODS["baseline"], frozen=("blocks", "heads.{old}"))
    )
    monkeypatch.setitem(DATASETS, "mine", Source(lambda root, image_size: digits(root, image_size)))
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))

    @recipes.recipe
    def mine():
        """Seconds."""
        return dataclasses.replace(
            toy, attention="sharp", n_lpa=1, method="frozen-blocks", dataset="mine", num_classes=4
        )

    train(recipes.find("mine"), tmp_path / "mine")
    directory = open_run(tmp_path / "mine")
    first, second = (directory.model(task).state_dict() for task in (0, 1))
    assert isinstance(directory.model(1).blocks[1].attn, Sharp)
    assert (first["blocks.1.attn.v.weight"] == second["blocks.1.attn.v.weight"]).all()
    plan = make_plan([str(directory.path)], n=4)
    table = survey((make() for make in plan.subjects), plan.images).nonlocality
    assert set(table["kind"]) == {"LPA", "Sharp"}


@pytest.mark.parametrize(
    "name, value", [("attention", "sharp"), ("method", "mine"), ("dataset", "mine"), ("attention", "lpa")]
)
def test_what_is_not_there_is_named(name, value, toy, tmp_path):
    with pytest.raises(ValueError, match=value):
        train(dataclasses.replace(toy, **{name: value}), tmp_path / "run")
