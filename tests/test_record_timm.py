"""Recorded attention of timm's plain networks against attention that is worked out here from the weights of each layer."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from networks import (
    images,
    maps,
    vit,
)
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from locality_probe.measures import nonlocality
from locality_probe.record import record

pytestmark = pytest.mark.usefixtures("seeded")


class Calls(TorchFunctionMode):
    """Counts calls of F.scaled_dot_product_attention, to know that a path is taken."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def reference(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], int]:
    """{name: attention [B, H, N, N]} in float64 from the input and weights of each layer; and how many ran fused."""
    found = {}

    def watch(name):
        def hook(attn, inputs, kwargs):
            found[name] = attention_of(attn, inputs[0], kwargs.get("rope"), kwargs.get("shared_rel_pos_bias"))

        return hook

    handles = []
    for name, part in model.named_modules():
        if name.rpartition(".")[-1].startswith("attn") and any(hasattr(part, n) for n in ("qkv", "q_proj")):
            handles.append(part.register_forward_pre_hook(watch(name), with_kwargs=True))
    with Calls() as calls:
        model(x)
    for handle in handles:
        handle.remove()
    return found, calls.count


def attention_of(attn: nn.Module, x: Tensor, rope: Tensor | None, shared: Tensor | None) -> Tensor:
    """softmax(rotate(norm(W_q x)) . rotate(norm(W_k x)) / sqrt d + bias), written out in float64."""
    x, heads = x.double(), attn.num_heads
    if getattr(attn, "qkv", None) is not None:
        w_q, w_k, _ = attn.qkv.weight.double().chunk(3)
        b = torch.zeros(3 * len(w_q)) if attn.qkv.bias is None else attn.qkv.bias
        b_q, b_k, _ = b.double().chunk(3)
        if getattr(attn, "q_bias", None) is not None:
            b_q = attn.q_bias.double()
    else:
        w_q, w_k = attn.q_proj.weight.double(), attn.k_proj.weight.double()
        b_q, b_k = (0 if p.bias is None else p.bias.double() for p in (attn.q_proj, attn.k_proj))
    q, k = ((x @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2) for w, b in ((w_q, b_q), (w_k, b_k)))
    if hasattr(attn, "q_norm"):
        q, k = (layer_norm(y, norm) for y, norm in ((q, attn.q_norm), (k, attn.k_norm)))
    if rope is not None:
        prefix = attn.num_prefix_tokens
        q, k = (torch.cat([y[:, :, :prefix], rotate(y[:, :, prefix:], rope.double())], 2) for y in (q, k))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    if getattr(attn, "relative_position_bias_table", None) is not None:  # BEiT: for class token and patches
        scores = scores + attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1).double()
    if getattr(attn, "rel_pos", None) is not None:
        scores = scores + attn.rel_pos.get_bias().double()
    if shared is not None:
        scores = scores + shared.double()
    return scores.softmax(-1)


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return x * norm.weight.double() + norm.bias.double()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Pairs of neighbouring channels (a, b) -> (a cos - b sin, b cos + a sin); rope is [..., sin | cos]."""
    sin, cos = (part[..., ::2] for part in rope.chunk(2, -1))
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


# what: (model, options, image height and width, grid, number of prefix tokens)
PLAIN = {
    "class token": ("vit_tiny_patch16_224", {}, (32, 32), (4, 4), 1),
    "two prefix tokens": ("deit_tiny_distilled_patch16_224", {}, (32, 32), (4, 4), 2),
    "class token and registers": ("vit_small_patch14_reg4_dinov2", {}, (32, 32), (4, 4), 5),
    "registers only": ("vit_medium_patch16_reg4_gap_256", {}, (32, 32), (4, 4), 4),
    "no prefix": ("vit_medium_patch16_gap_240", {}, (32, 32), (4, 4), 0),
    "class token off": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, (32, 32), (4, 4), 0),
    "wide": ("vit_tiny_patch16_224", {"img_size": (24, 48)}, (24, 48), (3, 6), 1),
    "tall": ("deit_tiny_distilled_patch16_224", {"img_size": (48, 16)}, (48, 16), (6, 2), 2),
    "patches not square": ("vit_tiny_patch16_224", {"patch_size": (8, 4)}, (32, 32), (4, 8), 1),
    "another size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (40, 24), (5, 3), 1),
    "padded": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, (41, 23), (6, 3), 1),
    "a CNN in front": ("vit_tiny_r_s16_p8_224", {"img_size": 96, "patch_size": None}, (96, 96), (3, 3), 1),
    "q and k normalised": ("vit_tiny_patch16_224", {"qk_norm": True}, (32, 32), (4, 4), 1),
    "rotary, EVA": ("eva02_tiny_patch14_224", {}, (32, 32), (4, 4), 1),
    "rotary": ("vit_small_patch16_rope_224", {}, (32, 32), (4, 4), 1),
    "rotary, learned by layer": ("vit_small_patch16_rope_mixed_224", {}, (32, 32), (4, 4), 1),
    "bias, BEiT": ("beit_base_patch16_224", {}, (32, 32), (4, 4), 1),
    "bias": ("vit_relpos_medium_patch16_cls_224", {}, (32, 32), (4, 4), 1),
    "bias, no prefix": ("vit_relpos_small_patch16_224", {}, (32, 32), (4, 4), 0),
    "layer scale": ("deit3_small_patch16_224", {}, (32, 32), (4, 4), 1),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("case", PLAIN)
def test_map_is_the_one_of_the_weights(case, fused):
    name, options, size, grid, prefix = PLAIN[case]
    model, x = vit(name, fused, **options), images(3, *size)
    expected, calls = reference(model, x)
    assert calls == (len(expected) if fused else 0)

    recorded = record(model, x, maps)
    assert [item.layer.name for item in recorded] == ["blocks.0.attn", "blocks.1.attn"] == list(expected)
    for index, item in enumerate(recorded):
        layer, attention = item.layer, expected[item.layer.name]
        assert (layer.index, layer.status, layer.reason) == (index, "ok", "")
        assert layer.kind == type(model.blocks[index].attn).__name__
        assert (layer.grid, layer.num_prefix_tokens, layer.num_heads) == (grid, prefix, 2)
        assert layer.queries == layer.keys == prefix + grid[0] * grid[1] and layer.between_patches
        assert item.values["map"].dtype == torch.float32
        assert attention.amax(-1).mean() > 3 / layer.keys, "the test has lost its point: attention is near uniform"
        torch.testing.assert_close(item.values["map"].double(), attention, atol=1e-5, rtol=0)
        for ours, theirs in zip(*(nonlocality(a, grid, prefix) for a in (item.values["map"], attention)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rotary_is_in_the_map():
    """The reference above without rotation is another map: the agreement there means something."""
    model, x = vit("eva02_tiny_patch14_224"), images()
    item = record(model, x, maps)[0]
    seen = {}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        handle = model.blocks[0].attn.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
        stack.callback(handle.remove)
        model(x)
        plain = attention_of(model.blocks[0].attn, seen["x"], None, None)
    assert (item.values["map"] - plain).abs().max() > 0.1


def test_agrees_with_timms_extractor():
    model, x = vit("deit_tiny_distilled_patch16_224", fused=False), images()
    with torch.no_grad():
        theirs = list(AttentionExtract(model, method="fx")(x).values())
    for item, attention in zip(record(model, x, maps), theirs, strict=True):
        torch.testing.assert_close(item.values["map"], attention, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
def test_attention_pooling_is_a_layer_of_one_query(fused):
    model, x = vit("vit_base_patch16_siglip_224", fused), images()
    recorded = record(model, x, maps)
    assert [item.layer.name for item in recorded] == ["blocks.0.attn", "blocks.1.attn", "attn_pool"]
    pool, layer = model.attn_pool, recorded[-1].layer
    assert (layer.status, layer.queries, layer.keys, layer.between_patches) == ("ok", 1, 16, False)
    with torch.no_grad():
        tokens = model.forward_features(x)
        q, k = pool.q(pool.latent.expand(3, -1, -1)), pool.kv(tokens).chunk(2, -1)[0]
        q, k = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (q, k))
        torch.testing.assert_close(recorded[-1].values["map"], (q @ k.mT / 4).softmax(-1), atol=1e-5, rtol=0)


def test_parallel_layers_and_attention_within_a_block():
    recorded = record(vit("vit_small_patch16_18x2_224"), images(), maps)
    assert [item.layer.name for item in recorded] == [f"blocks.{i}.attns.{j}.attn" for i in range(2) for j in range(2)]
    model, x = vit("vit_pwee_patch16_reg1_gap_256"), images()
    recorded = record(model, x, maps)
    assert [(item.layer.name, item.layer.kind) for item in recorded] == [
        (f"blocks.{i}", "ParallelScalingBlock") for i in range(2)
    ]
    assert {(item.layer.status, item.layer.num_prefix_tokens) for item in recorded} == {("ok", 1)}


def test_gradient_checkpointing_hides_nothing():
    model, x = vit(), images()
    plain = record(model, x, maps)
    model.set_grad_checkpointing()
    for item, other in zip(record(model, x, maps), plain, strict=True):
        assert torch.equal(item.values["map"], other.values["map"])
