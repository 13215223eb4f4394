"""The watch: what is no attention is refused, what is not one map is skipped with the reason, layers keep their order."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import (
    BATCH,
    FUSED,
    WRITTEN,
    Asked,
    Mixer,
    Tokens,
    images,
    maps,
    sdpa,
)
from torch import nn

from locality_probe.record import record

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_networks_without_attention_are_refused(name):
    with pytest.raises(ValueError, match="has no attention layer"):
        record(timm.create_model(name, num_classes=3), images(2, 64, 64), maps)


NOT_ONE_MAP = {  # of scores and values
    "gated": (lambda s, v: (s.softmax(-1) * 0.5) @ v, "its weights sum to 0.5 where they meet the values"),
    "a sum of two": (lambda s, v: (s.softmax(-1) + s.flip(-1).softmax(-1)) @ v, "its weights sum to 2"),
    "a difference of two": (lambda s, v: (2 * s.softmax(-1) - s.flip(-1).softmax(-1)) @ v, "its weights are negative"),
    "sigmoid": (lambda s, v: s.sigmoid() @ v, "its weights sum to"),
    "over the queries": (lambda s, v: s.softmax(-2) @ v, "its weights sum to"),  # as slot attention has it
    "heads mixed": (
        lambda s, v: torch.einsum("bhij,hg->bgij", s.softmax(-1), torch.ones(2, 2)) @ v, "what is done to its scores",
    ),
    "keys first": (lambda s, v: v.softmax(-1) @ (v.softmax(-2).mT @ v), "its keys meet the values before the queries"),
    "the keys of one image": (lambda s, v: sdpa(v, v[:1], v[:1]), "none of its keys is a place of the image"),
    "for all images": (lambda s, v: sdpa(v[:1], v[:1], v[:1]).expand_as(v), "its 2 x 1 maps are not of one image each"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_ONE_MAP)
def test_attention_that_is_not_one_map_is_skipped(case):
    attend, reason = NOT_ONE_MAP[case]
    model = Tokens(Mixer(lambda q, k, v: attend(q @ k.mT / 2, v)))
    (item,) = record(model, images(BATCH, 8, 8), maps)
    assert item.layer.status == "skipped" and item.layer.reason.startswith(reason) and not item.values


ONE_MAP = {  # of scores and values, and the names of the rows
    "after the values": (lambda s, v: (v.mT @ s.softmax(-1).mT).mT, ["mixer"]),
    "three dimensions": (lambda s, v: (s.flatten(0, 1).softmax(-1) @ v.flatten(0, 1)).view_as(v), ["mixer"]),
    "a copy between": (lambda s, v: s.softmax(-1).clone().double() @ v.double(), ["mixer"]),
    "exp over sum": (lambda s, v: (s.exp() / s.exp().sum(-1, keepdim=True)) @ v, ["mixer"]),
    "exp of log_softmax": (lambda s, v: s.log_softmax(-1).exp() @ v, ["mixer"]),
    "dropout that is always on": (lambda s, v: F.dropout(s.softmax(-1), 0.5, True) @ v, ["mixer"]),
    "twice": (lambda s, v: s.softmax(-1) @ (s.softmax(-1) @ v), ["mixer", "mixer#2"]),
    "fused, then written out": (lambda s, v: s.softmax(-1) @ sdpa(v, v, v), ["mixer", "mixer#2"]),
}


@pytest.mark.parametrize("case", ONE_MAP)
def test_other_spellings_are_the_same_attention(case):
    attend, names = ONE_MAP[case]
    model, x = Tokens(Mixer(lambda q, k, v: attend(q @ k.mT / 2, v).float())).eval(), images(BATCH, 8, 8)
    recorded = record(model, x, maps)
    assert [(item.layer.name, item.layer.status, item.layer.reason) for item in recorded] == [
        (n, "ok", "") for n in names
    ]
    with torch.no_grad():
        q = (2 * model.patch_embed(x)).unflatten(-1, (2, 4)).transpose(1, 2)
        expected = (q @ (2 * q.roll(1, -1)).mT / 2).softmax(-1)
    found = recorded[-1 if "fused" in case else 0].values["map"]
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=0)


def test_a_layer_used_twice_has_two_rows():
    shared = Mixer(FUSED["positional"])
    recorded = record(Tokens(nn.Sequential(shared, shared)), images(BATCH, 8, 8), maps)
    assert [(item.layer.name, item.layer.status) for item in recorded] == [("mixer.0", "ok"), ("mixer.0#2", "ok")]
    assert not torch.equal(recorded[0].values["map"], recorded[1].values["map"])


def test_asked_and_watched_layers_in_one_model_keep_their_order():
    model = Tokens(nn.Sequential(Mixer(FUSED["positional"]), Asked(), Mixer(WRITTEN["@"])))
    recorded = record(model, images(BATCH, 8, 8), maps)
    assert [(item.layer.name, item.layer.kind) for item in recorded] == [
        ("mixer.0", "Mixer"), ("mixer.1", "Asked"), ("mixer.2", "Mixer"),
    ]  # fmt: skip
    assert [item.layer.index for item in recorded] == [0, 1, 2]
