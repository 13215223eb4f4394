"""The watch: what is no attention is refused, what is not one map is skipped with the reason, layers keep their order."""

from __future__ import annotations

import pytest
import timm
import torch
from networks import (
    BATCH,
    CHANGED,
    FUSED,
    TWICE,
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
    "gated": (lambda s, v: (s.softmax(-1) * 0.5) @ v, CHANGED),
    "a sum of two": (lambda s, v: (s.softmax(-1) + s.flip(-1).softmax(-1)) @ v, CHANGED),
    "heads mixed": (lambda s, v: torch.einsum("bhij,hg->bgij", s.softmax(-1), torch.ones(2, 2)) @ v, CHANGED),
    "after the values": (lambda s, v: (v.mT @ s.softmax(-1).mT).mT, CHANGED),
    "twice": (lambda s, v: s.softmax(-1) @ (s.softmax(-1) @ v), TWICE),
    "twice, fused": (lambda s, v: sdpa(v, v, sdpa(v, v, v)), TWICE),
    "fused, then written out": (lambda s, v: s.softmax(-1) @ sdpa(v, v, v), TWICE),
    "three dimensions": (lambda s, v: (s.flatten(0, 1).softmax(-1) @ v.flatten(0, 1)).view_as(v), "its attention [6, 4, 4]"),
    "one head, fused": (lambda s, v: sdpa(v[:, 0], v[:, 0], v[:, 0])[:, None].expand_as(v), "its attention [3, 4, 4]"),
    "fewer keys": (lambda s, v: sdpa(v, v[:, :, :3], v[:, :, :3]), "its 4 queries are neither its 3 keys"),
    "for all images": (lambda s, v: sdpa(v[:1], v[:1], v[:1]).expand_as(v), "it attends within parts of an image: 1 of 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_ONE_MAP)
def test_attention_that_is_not_one_map_is_skipped(case):
    attend, reason = NOT_ONE_MAP[case]
    model = Tokens(Mixer(lambda q, k, v: attend(q @ k.mT / 2, v)))
    (item,) = record(model, images(BATCH, 8, 8), maps)
    assert item.layer.status == "skipped" and item.layer.reason.startswith(reason) and not item.values


def test_softmax_over_the_queries_is_not_attention_between_keys():
    """As slot attention has it: rows do not sum to one."""
    with pytest.raises(ValueError, match="has no attention layer"):
        record(Tokens(Mixer(lambda q, k, v: (q @ k.mT).softmax(-2) @ v)), images(BATCH, 8, 8), maps)


def test_a_layer_used_twice_is_skipped():
    shared = Mixer(FUSED["positional"])
    (item,) = record(Tokens(nn.Sequential(shared, shared)), images(BATCH, 8, 8), maps)
    assert (item.layer.name, item.layer.status, item.layer.reason) == ("mixer.0", "skipped", TWICE)


def test_asked_and_watched_layers_in_one_model_keep_their_order():
    model = Tokens(nn.Sequential(Mixer(FUSED["positional"]), Asked(), Mixer(WRITTEN["@"])))
    recorded = record(model, images(BATCH, 8, 8), maps)
    assert [(item.layer.name, item.layer.kind) for item in recorded] == [
        ("mixer.0", "Mixer"), ("mixer.1", "Asked"), ("mixer.2", "Mixer"),
    ]  # fmt: skip
    assert [item.layer.index for item in recorded] == [0, 1, 2]
