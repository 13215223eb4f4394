"""Maps are taken a chunk at a time: the values are the same, and no more than one chunk of one layer is alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from networks import (
    images,
    maps,
    vit,
    whole,
)
from torch import Tensor

from locality_probe.record import maps as module
from locality_probe.record import record

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("make", [vit, lambda: vit(fused=False), lambda: vit("beit_base_patch16_224"), whole])
@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_chunks_give_the_same_values(make, at_a_time, monkeypatch):
    model = make().eval()
    x = images(5, *model.patch_embed.img_size)
    expected = record(model, x, maps)
    sizes = {}

    def measure(attention, layer):
        sizes.setdefault(layer.name, []).append(len(attention))
        return maps(attention, layer)

    layer = expected[0].layer
    monkeypatch.setattr(module, "CHUNK_BYTES", at_a_time * 4 * layer.num_heads * layer.queries * layer.keys)
    recorded = record(model, x, measure)
    assert sizes[layer.name] == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[at_a_time]
    for item, other in zip(recorded, expected, strict=True):
        assert item.layer == other.layer
        torch.testing.assert_close(item.values["map"], other.values["map"], atol=1e-6, rtol=0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # less than an image: an image all the same
    sizes.clear()
    record(model, x, measure)
    assert set(map(tuple, sizes.values())) == {(1,) * 5}


def live_maps(queries: int, keys: int) -> int:
    """Images whose attention [b, H, Q, K] is alive anywhere, each storage counted once."""
    alive = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.ndim == 4 and thing.shape[-2:] == (queries, keys):
            alive[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // (4 * thing[0].numel())
    return sum(alive.values())


@pytest.mark.parametrize("make, masks", [(vit, 0), (lambda: vit("beit_base_patch16_224"), 1), (whole, 0)])
def test_one_chunk_of_one_layer_is_alive(make, masks, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    model = make().eval()
    earlier, alive = [], []

    def measure(attention, layer):
        assert not any(ref() is not None for ref in earlier)
        earlier.append(weakref.ref(attention))
        alive.append(live_maps(layer.queries, layer.keys))
        return {"mean": attention.mean((2, 3))}

    gc.collect()
    recorded = record(model, images(4, *model.patch_embed.img_size), measure)
    assert len(earlier) == 4 * len(recorded) and set(alive) == {1 + masks}


def test_what_a_layer_writes_out_is_let_go():
    """Its softmax lives in the model, of all images; none of it may live on into the next layer."""
    alive = []

    def measure(attention, layer):
        alive.append(live_maps(layer.queries, layer.keys))
        return {}

    gc.collect()
    record(vit(fused=False, depth=3), images(4), measure)
    assert len(alive) == 3 and len(set(alive)) == 1 and alive[0] <= 2 * 4  # the scores are the model's too
