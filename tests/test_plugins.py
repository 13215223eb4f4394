"""What a user adds: a function and a line in a dict each, and it trains, saves, opens and is measured (docs/extending.md)."""

import dataclasses

import pytest
import timm

from cil import recipes
from cil.attention import ATTENTION, SelfAttention
from cil.checkpoint import open_run
from cil.data import DATASETS, Source, cover, digits
from cil.methods import METHODS
from cil.train import train
from locality_probe import LIBRARIES, Probe, Subject, distances, doctor, from_run, load_images
from locality_probe.plan import make_plan
from locality_probe.record import record
from locality_probe.survey import survey
from locality_probe.typed import Library


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


def test_own_measure(toy_run):
    """A function of the attention of a layer: it sees each layer of a network, ours or not, and may use what is in Layer."""

    def seen_from_afar(attention, layer):
        if not layer.between_patches:
            return {}
        prefix = layer.num_prefix_tokens
        far = distances(layer.grid) > 2
        return {"far": (attention[:, :, prefix:, prefix:] * far).sum(-1).mean(-1)}

    subject = from_run(toy_run, 1)
    images = load_images("digits", 3)
    (batch,) = images.batches(subject, 3)
    found = record(subject.model, batch, seen_from_afar)
    with Probe(subject.model) as probe:
        probe.update(batch)
    between = [item for item in found if item.values]
    assert [item.layer for item in found] == [
        dataclasses.replace(layer, status="ok", reason="") for layer in probe.result().layers
    ]
    assert len(between) == 2
    for item, values in zip(between, probe.result().values, strict=False):
        assert item.values["far"].shape == (3, 4) and (2 * item.values["far"] < values["d_loc"]).all()  # Markov


def test_own_library_of_models(monkeypatch, tmp_path, capsys):
    def from_mine(name, weights, pretrained):
        network = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
        return Subject(
            name, name, "model", 0, network, lambda image: cover(image, (64, 64)), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        )

    monkeypatch.setitem(LIBRARIES, "mine", Library(from_mine, "SIZE"))
    plan = make_plan([], model="mine/tiny", images="digits", n=2)
    assert "tiny is untrained" in capsys.readouterr().out
    found = survey((make() for make in plan.subjects), plan.images)
    assert set(found.nonlocality["run"]) == {"tiny"} and found.layers["how"].tolist() == ["sdpa", "sdpa"]
    assert doctor.find("mine/tiny").run == "tiny"
    with pytest.raises(ValueError, match=r"give a run directory, a weights file, timm/NAME, .* or mine/SIZE$"):
        doctor.find("other/tiny")
    with pytest.raises(
        ValueError,
        match=r"is not of the form timm/NAME, torchvision/NAME, hf/FOLDER, open_clip/NAME\[:FILE\] or mine/SIZE, like",
    ):
        make_plan([], model="mine", images="digits")


@pytest.mark.parametrize(
    "name, value", [("attention", "sharp"), ("method", "mine"), ("dataset", "mine"), ("attention", "lpa")]
)
def test_what_is_not_there_is_named(name, value, toy, tmp_path):
    with pytest.raises(ValueError, match=value):
        train(dataclasses.replace(toy, **{name: value}), tmp_path / "run")
