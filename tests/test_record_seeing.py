"""The ways of seeing: a user's own attention, fused or written out, and what the fused kernel applies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    BATCH,
    BOOL,
    FUSED,
    WRITTEN,
    Mixer,
    Tokens,
    images,
    maps,
    sdpa,
    vit,
)
from torch import nn

from locality_probe.geometry import Geometry
from locality_probe.record import Layer, fused_map, record
from locality_probe.record import maps as module

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("case", [*FUSED, *WRITTEN])
def test_users_own_attention(case, monkeypatch):
    """The map times the identity as values is the map: the attention that the user's own call applies."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 2 * 16 * 2)  # two images: also masks are taken by image
    mixer = Mixer(FUSED.get(case) or WRITTEN[case])
    model = Tokens(mixer).eval()
    (item,) = record(model, images(BATCH, 8, 8), maps)
    name, kind = ("mixer.attend", "AttendModule") if isinstance(mixer.attend, nn.Module) else ("mixer", "Mixer")
    how = "sdpa" if case in FUSED else "eager"
    causal = case in ("causal", "all positional")
    layer = item.layer
    assert layer == Layer(0, name, kind, 2, layer.geometry, how=layer.how, places="observed", causal=causal)
    assert torch.equal(layer.geometry.keys, Geometry.of_grid((2, 2)).keys) and layer.geometry.same_places
    assert layer.how in (
        how,
        "eager",
    )  # without a kernel for such strides, torch writes scaled_dot_product_attention out itself

    with torch.no_grad():
        q = (2 * model.patch_embed(images(BATCH, 8, 8))).unflatten(-1, (2, 4)).transpose(1, 2)
        applied = mixer.attend(q, 2 * q.roll(1, -1), torch.eye(4).expand(BATCH, 2, 4, 4))
    torch.testing.assert_close(item.values["map"], applied, atol=1e-6, rtol=0)
    assert (applied[0] - applied[1]).abs().max() > 0.01 and (applied - 0.25).abs().max() > 0.1


def test_a_query_without_keys_attends_to_nothing():
    """As the fused kernel has it: zeros, where a softmax would give NaN."""
    mask = BOOL.clone()
    mask[1] = False
    for attn_mask in (mask, torch.zeros(4, 4).masked_fill(~mask, float("-inf"))):
        model = Tokens(Mixer(lambda q, k, v, m=attn_mask: sdpa(q, k, v, attn_mask=m).nan_to_num(0)))
        attention = record(model, images(BATCH, 8, 8), maps)[0].values["map"]
        assert attention[:, :, 1].abs().max() == 0
        torch.testing.assert_close(attention.sum(-1)[:, :, [0, 2, 3]], torch.ones(BATCH, 2, 3))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fused_map_is_what_the_kernel_applies(data):
    b, h, q, k, d = (data.draw(st.integers(1, n)) for n in (3, 4, 5, 5, 8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    groups = data.draw(st.sampled_from([g for g in (1, 2, 4) if h % g == 0]))
    query, key = (torch.randn(b, n, m, d, generator=generator) for n, m in ((h, q), (h // groups, k)))
    kind = data.draw(st.sampled_from(["none", "bool", "float", "causal"]))
    shape = data.draw(st.sampled_from([(q, k), (h, q, k), (1, h, q, k), (b, h, q, k), (b, 1, q, k), (1, 1, q, k)]))
    mask = torch.randn(shape, generator=generator) if kind in ("bool", "float") else None
    if kind == "bool":
        mask = mask > 0
        mask[..., 0] = True
    options = {"attn_mask": mask, "is_causal": kind == "causal", "scale": data.draw(st.sampled_from([None, 0.3, 2.0]))}
    value = torch.eye(k).expand(b, h // groups, k, k)
    expected = sdpa(query, key, value, enable_gqa=groups > 1, **options)
    first = data.draw(st.integers(0, b - 1))
    for rows in (slice(0, b), slice(first, b)):
        attention = fused_map(query, key, mask, options["is_causal"], options["scale"], rows)
        torch.testing.assert_close(attention, expected[rows], atol=1e-5, rtol=0)


def test_half_precision_is_scored_in_float32():
    model = vit().to(torch.bfloat16)
    seen = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    item = record(model, images().bfloat16(), maps)[0]
    with torch.no_grad():
        q, k, _ = model.blocks[0].attn.qkv(seen[-1]).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).double()
    assert item.values["map"].dtype == torch.float32
    torch.testing.assert_close(item.values["map"].double(), (q @ k.mT / 4).softmax(-1), atol=1e-6, rtol=0)
