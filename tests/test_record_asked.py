"""Layers that say their attention themselves: ours, and a user's."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from conftest import TOY
from networks import (
    BATCH,
    Asked,
    Tokens,
    images,
    maps,
    status,
)

from cil.models import IncrementalViT
from locality_probe.record import record

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("method", ["baseline", "dytox"])
@pytest.mark.parametrize("attention", ["gpsa", "mhsa"])
def test_our_models_say_it_themselves(method, attention):
    model = IncrementalViT(dataclasses.replace(TOY, method=method, attention=attention, depth=4, n_lpa=1), (8, 12))
    model.grow(2)
    model.grow(3)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    inputs = {}
    layers = {name: part for name, part in model.named_modules() if hasattr(part, "attention_map")}
    handles = [
        part.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given}))
        for name, part in layers.items()
    ]
    grid, x = model.grid, images(3, 8, 12)
    recorded = record(model, x, maps)
    for handle in handles:
        handle.remove()

    assert [item.layer.name for item in recorded] == [*(f"blocks.{i}.attn" for i in range(3)), "task_block.attn"]
    other = {"gpsa": "GPSA", "mhsa": "SelfAttention"}[attention]
    assert status(recorded) == [(kind, "ok", "") for kind in ("LPA", other, other, "TaskAttention")]
    with torch.no_grad():
        for item in recorded:
            expected = layers[item.layer.name].attention_map(*inputs[item.layer.name])
            torch.testing.assert_close(item.values["map"], expected, atol=1e-6, rtol=0)
            assert (item.layer.grid, item.layer.num_heads) == (grid, TOY.num_heads)
    *between, task = (item.layer for item in recorded)
    assert all(layer.between_patches and layer.num_prefix_tokens == 0 for layer in between)
    tokens = {"baseline": 1, "dytox": 2}[method]
    assert (task.queries, task.num_prefix_tokens, task.between_patches) == (tokens, 1, False)
    assert task.keys == 1 + grid[0] * grid[1]


def test_a_layer_that_is_asked_is_not_watched():
    layer = Asked()
    (item,) = record(Tokens(layer), images(BATCH, 8, 8), maps)
    assert (item.layer.name, item.layer.kind, item.layer.num_heads, item.layer.status) == ("mixer", "Asked", 1, "ok")
    layer.grid = (2, 3)
    (item,) = record(Tokens(layer), images(BATCH, 8, 8), maps)
    assert item.layer.status == "skipped" and item.layer.reason == "its 4 keys are not 0 prefix tokens + 2 x 3 patches"


@pytest.mark.parametrize("model", ["timm", "ours"])
def test_autocast_around_it_leaves_scores_and_sums_in_float32(model):
    """Rows of a bfloat16 softmax are off by some 1e-3 from 1."""
    if model == "timm":
        network, x = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    else:
        network, x = IncrementalViT(TOY, (8, 8)), torch.randn(2, 3, 8, 8)
        network.grow(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = record(network, x, lambda a, layer: {"a": a, "twice": a @ a.transpose(-2, -1)})
    for item in found:
        rows = item.values["a"].sum(-1)
        assert item.values["a"].dtype == item.values["twice"].dtype == torch.float32
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)
