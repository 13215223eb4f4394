"""locality_probe.record against attention worked out here from the weights of each layer, for timm's models and ours.

Attention in these tests is peaked: near-uniform maps would let wrong shortcuts pass.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import TOY
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Attention
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cil.models import IncrementalViT
from locality_probe.measures import nonlocality, uniform_nonlocality
from locality_probe.record import Layer, Recorded, fused_map, record
from locality_probe.record import maps as module

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
CHANGED = "its softmax does not meet the values as it is"
CHANNELS = "it attends between channels"
TWICE = "it attends more than once in a forward pass"
UNSEEN = "neither scaled_dot_product_attention nor softmax is seen in it"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def maps(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
    return {"map": attention}


def images(batch: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def sharpen(model: nn.Module) -> nn.Module:
    """Random weights of one size where attention depends on them; timm starts many at zero or near it."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if any(
            part in name for part in ("qkv", "q_proj", "k_proj", "q_bias", "q_norm", "k_norm", "in_proj", "rel_pos")
        ):
            p.data = 0.4 * torch.randn(p.shape, generator=generator) + 2 * ("norm.weight" in name)
        elif any(part in name for part in ("pos_embed", "token")):
            p.data = torch.randn(p.shape, generator=generator)
    return model.eval()


def vit(name: str = "vit_tiny_patch16_224", fused: bool = True, **options) -> nn.Module:
    options = {key: value for key, value in (SMALL | options).items() if value is not None}
    model = sharpen(timm.create_model(name, **options))
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    return model


def status(recorded: list[Recorded]) -> list[tuple[str, str, str]]:
    return [(item.layer.kind, item.layer.status, item.layer.reason) for item in recorded]


# 1. timm's plain networks ------------------------------------------------------------------------------------------


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


# 2. D_loc -----------------------------------------------------------------------------------------------------------


def test_an_untrained_network_is_uniform():
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    recorded = record(model, images(2, 224, 224), lambda a, layer: {"d": nonlocality(a, layer.grid, 1)[0]})
    d_loc = torch.stack([item.values["d"] for item in recorded])
    assert d_loc.shape == (2, 2, 3)
    assert abs(d_loc.mean() / 7.280764 - 1) < 2e-4
    assert (d_loc / 7.280764 - 1).abs().max() < 1e-3  # without renormalising, heads are off by .5 %
    assert recorded[0].layer.grid == (14, 14) and abs(uniform_nonlocality((14, 14)) - 7.280764) < 1e-6


def test_grid_and_prefix_that_are_given_go_before_those_of_the_model():
    model, x = vit(), images()
    right = record(model, x, maps, grid=(2, 8), num_prefix_tokens=1)
    assert {(item.layer.status, item.layer.grid) for item in right} == {("ok", (2, 8))}
    for wrong in (record(model, x, maps, grid=(4, 5)), record(model, x, maps, num_prefix_tokens=0)):
        assert {item.layer.status for item in wrong} == {"skipped"} and not any(item.values for item in wrong)
        assert all("its 17 keys are not" in item.layer.reason for item in wrong)


def test_feature_maps_tell_the_grid_of_a_model_that_declares_none():
    for options, size, grid, prefix in (({}, (32, 32), (4, 4), 1), ({"img_size": (24, 48)}, (24, 48), (3, 6), 1)):
        found = record(nn.Sequential(vit(**options)), images(2, *size), maps)
        assert [(item.layer.name, item.layer.grid, item.layer.num_prefix_tokens) for item in found] == [
            ("0.blocks.0.attn", grid, prefix), ("0.blocks.1.attn", grid, prefix),
        ]  # fmt: skip


class LinearPatches(nn.Module):
    """A network whose patches are cut by a reshape: no feature map, nothing declared."""

    def __init__(self):
        super().__init__()
        self.embed, self.mixer = nn.Linear(48, 8), Mixer(FUSED["positional"])

    def forward(self, x):
        return self.mixer(
            self.embed(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        )


def test_a_grid_that_cannot_be_told_is_asked_for():
    (item,) = record(LinearPatches(), images(2, 8, 8), maps)
    assert item.layer.status == "skipped"
    assert item.layer.reason == (
        "its 4 keys are no grid of patches that can be told: give grid=(rows, columns) and num_prefix_tokens"
    )
    (item,) = record(LinearPatches(), images(2, 8, 8), maps, grid=(2, 2))
    assert (item.layer.status, item.layer.grid) == ("ok", (2, 2))


# 3. The model comes back ---------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A network with what a recorder could spoil: running statistics, dropout, frozen parts, hooks of its user."""

    num_prefix_tokens = 0

    def __init__(self, fails: bool = False):
        super().__init__()
        self.patch_embed = timm.layers.PatchEmbed(16, 4, 3, 16)
        self.norm = nn.BatchNorm1d(16)
        self.attn = Attention(16, 2, attn_drop=0.5, proj_drop=0.5)
        self.frozen = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout())
        self.last = Attention(16, 2)
        self.fails = fails

    def forward(self, x):
        x = self.patch_embed(x)
        x = self.frozen(self.norm(x.mT)).mT
        x = x + self.attn(x)
        if self.fails:
            raise ArithmeticError("from the model")
        return self.last(x)


class AlwaysFrozen(nn.Sequential):
    """The usual way to freeze: train() is overridden."""

    def train(self, mode=True):
        return super().train(False)


def odd(fused: bool = True, fails: bool = False) -> Odd:
    model = Odd(fails).train()
    model.frozen.eval()
    model.always = AlwaysFrozen(nn.Dropout())
    model.frozen.requires_grad_(False)
    model.attn.fused_attn = model.last.fused_attn = fused
    model.register_forward_hook(lambda *_: None)
    model.attn.register_forward_pre_hook(lambda *_: None)
    return model


def state(model: nn.Module) -> dict[str, object]:
    """All of a model that could change: tensors by value, hooks, modes, and the modes of torch."""
    tensors = {key: value.clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}
    parts = {
        (name, key): dict(value) if isinstance(value, dict) and key.startswith("_") else value
        for name, part in model.named_modules() for key, value in vars(part).items()
        if "hook" in key or key in ("training", "fused_attn", "forward")
    }  # fmt: skip
    gradients = {key: (p.requires_grad, p.grad) for key, p in model.named_parameters()}
    torchs = (
        torch.is_grad_enabled(),
        torch._C._len_torch_function_stack(),
        F.scaled_dot_product_attention,
        torch.softmax,
    )
    return {"tensors": tensors, "parts": parts, "gradients": gradients, "torch": torchs}


def assert_same(now: dict, before: dict) -> None:
    tensors = before["tensors"]
    assert now["tensors"].keys() == tensors.keys() and all(torch.equal(now["tensors"][k], tensors[k]) for k in tensors)
    assert {k: v for k, v in now.items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}


def fail(attention, layer):
    raise ArithmeticError("from the measure")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("where", ["nowhere", "measure", "model"])
@pytest.mark.parametrize("gradients", [True, False])
def test_model_comes_back(where, fused, gradients):
    model, x = odd(fused, fails=where == "model"), images(3, 16, 16)
    before = state(model)
    assert ("frozen", "training") in before["parts"] and before["parts"]["attn", "training"]
    assert not before["parts"]["frozen.0", "training"] and len(before["parts"]["", "_forward_hooks"]) == 1
    with torch.set_grad_enabled(gradients):
        inside = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
        with (
            contextlib.nullcontext()
            if where == "nowhere"
            else pytest.raises(ArithmeticError, match=f"from the {where}")
        ):
            assert len(record(model, x, fail if where == "measure" else maps)) == 2
        assert inside == (torch.is_grad_enabled(), torch._C._len_torch_function_stack())
    assert_same(state(model), before)


def test_state_sees_what_a_recorder_could_leave():
    """The comparison above can fail: each of these would be noticed."""
    for spoil in (
        lambda m: m.frozen.train(),
        lambda m: m.attn.register_forward_hook(lambda *_: None, always_call=True),
        lambda m: m.norm.running_mean.add_(1),
        lambda m: m.frozen.requires_grad_(True),
        lambda m: setattr(m.attn, "fused_attn", False),
    ):
        model = odd()
        before = state(model)
        spoil(model)
        with pytest.raises(AssertionError):
            assert_same(state(model), before)


def whole() -> nn.Module:
    model = IncrementalViT(TOY, (8, 8))
    model.grow(2)
    return model


@pytest.mark.parametrize("make", [vit, lambda: vit(fused=False), odd, lambda: vit("beit_base_patch16_224"), whole])
def test_outputs_before_during_and_after_are_the_same(make):
    model = make().eval()
    x = images(3, *(model.patch_embed.img_size))
    outputs = []
    with torch.no_grad():
        outputs.append(model(x))
        handle = model.register_forward_hook(lambda _, inputs, output: outputs.append(output.clone()))
        record(model, x, maps)
        handle.remove()
        outputs.append(model(x))
    before, during, after = outputs
    assert torch.equal(during, before) and torch.equal(after, before)


def test_the_measure_runs_without_gradients_in_eval_mode():
    model = odd()
    seen = []

    def measure(attention, layer):
        seen.append((torch.is_grad_enabled(), attention.requires_grad, model.attn.training, model.norm.training))
        return {}

    record(model, images(3, 16, 16), measure)
    assert set(seen) == {(False, False, False, False)} and len(seen) == 2


def test_what_the_measure_computes_is_not_taken_for_the_models():
    """Attention, softmax and whole models inside a measure."""
    other = vit()

    def measure(attention, layer):
        F.scaled_dot_product_attention(attention, attention, attention)
        attention.softmax(-1) @ attention.mT
        return {"logits": other(images(len(attention)))}

    for model, size in ((vit(), 32), (whole(), 8)):
        plain = record(model, images(2, size, size), maps)
        recorded = record(model, images(2, size, size), measure)
        assert status(recorded) == status(plain) and all(item.layer.status == "ok" for item in recorded)


# 4. A chunk at a time ------------------------------------------------------------------------------------------------


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


# 5. Refused, skipped, never missing ------------------------------------------------------------------------------------


def test_compiled_models_are_measured_as_they_were_or_refused_by_name():
    model = vit()
    expected = record(model, images(), maps)
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    in_place = copy.deepcopy(model)
    in_place.blocks[0].compile(backend=backend)
    before = in_place.blocks[0]._compiled_call_impl
    for compiled in (torch.compile(model, backend=backend), in_place):
        for item, other in zip(record(compiled, images(), maps), expected, strict=True):
            assert item.layer == other.layer and torch.equal(item.values["map"], other.values["map"])
    assert not calls and in_place.blocks[0]._compiled_call_impl is before
    model.blocks[1] = torch.compile(model.blocks[1], backend=backend)
    with pytest.raises(ValueError, match=r"blocks\.1 is torch.compile'd and hides its attention"):
        record(model, images(), maps)
    with pytest.raises(ValueError, match="is TorchScript and hides its attention"):
        record(torch.jit.trace(vit(), images()), images(), maps)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_networks_without_attention_are_refused(name):
    with pytest.raises(ValueError, match="has no attention layer"):
        record(timm.create_model(name, num_classes=3), images(2, 64, 64), maps)


def small(name: str, **options):
    return lambda: timm.create_model(name, num_classes=3, **options)


WINDOWS = "it attends within parts of an image: 8 of 2 images"
HEADS = {"num_heads": (2, 2, 2, 2)}
# what: (model, image side, grid, number of prefix tokens, [(kind, "ok" or the beginning of the reason) of each layer])
OTHERS = {
    "windows": (
        small("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 2)), 56, (7, 7), 0,
        [("WindowAttention", "window")] * 2 + [("WindowAttention", "ok")] * 2,  # the last stage is one window
    ),
    "windows, written out": (
        small("swinv2_tiny_window8_256", img_size=64, embed_dim=16, depths=(2, 1), num_heads=(2, 2)), 64, (8, 8), 0,
        [("WindowAttention", "window")] * 2 + [("WindowAttention", "ok")],
    ),
    "channels": (
        small("xcit_nano_12_p8_224", img_size=32, embed_dim=32, num_heads=2, depth=2), 32, (4, 4), 1,
        [("XCA", CHANNELS)] * 2 + [("ClassAttn", "ok")] * 2,
    ),
    "as many channels as patches": (
        small("xcit_nano_12_p8_224", img_size=32, embed_dim=32, num_heads=2, depth=1), 32, (4, 4), 0,
        [("XCA", CHANNELS)] + [("ClassAttn", "its 17 keys are not 0 prefix tokens + 4 x 4 patches")] * 2,
    ),
    "channels and windows": (
        small("davit_tiny", depths=(1, 1), embed_dims=(16, 16), num_heads=(2, 2)), 56, (7, 7), 0,
        [("WindowAttention", "window"), ("ChannelAttention", CHANNELS), ("WindowAttention", "ok"),
         ("ChannelAttention", CHANNELS)],
    ),
    "heads that are mixed": (
        small("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2), 32, None, 1,
        [("TalkingHeadAttn", CHANGED)] * 2 + [("ClassAttn", "ok")] * 2,
    ),
    "heads that are mixed, without prefix": (
        small("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2), 32, None, 0,
        [("TalkingHeadAttn", CHANGED)] + [("ClassAttn", "its 17 keys are not 0 prefix tokens + 4 x 4 patches")] * 2,
    ),
    "two softmaxes": (
        small("convit_tiny", img_size=32, patch_size=8, embed_dim=8, depth=3, num_heads=4, local_up_to_layer=2), 32, None, None,
        [("GPSA", "ok")] * 2 + [("MHSA", "ok")],
    ),
    "two softmaxes, without prefix": (
        small("convit_tiny", img_size=32, patch_size=8, embed_dim=8, depth=3, num_heads=4, local_up_to_layer=2), 32, None, 0,
        [("GPSA", "ok")] * 2 + [("MHSA", "its 17 keys")],
    ),
    "a difference of two": (
        small("vit_dwee_patch16_reg1_gap_256", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2), 32, None, 1,
        [("DiffAttention", "it")] * 2,  # attends twice, or changes its softmax
    ),
    "keys reduced": (
        small("pvt_v2_b0", depths=(1, 1, 1, 1)), 128, (4, 4), 0,
        [("Attention", "its 1024 queries"), ("Attention", "its 256 queries"), ("Attention", "its 64 queries"),
         ("Attention", "ok")],
    ),
    "a pyramid whose grid shrinks": (
        small("pit_ti_224", img_size=64, depth=(1, 1, 1)), 64, None, None, [("Attention", "ok")] * 3,
    ),
    "a pyramid of which one grid is given": (
        small("pit_ti_224", img_size=64), 64, (7, 7), 1,
        [("Attention", "ok")] * 2 + [("Attention", "its 17 keys")] * 6 + [("Attention", "its 5 keys")] * 4,
    ),
    "mask units": (
        small("hiera_tiny_224", embed_dim=16, stages=(1, 1, 1, 1)), 224, (14, 14), 0,
        [("MaskUnitAttention", "its attention [2, 1, 49, 64, 64]"), ("MaskUnitAttention", "its attention"),
         ("MaskUnitAttention", "its attention"), ("MaskUnitAttention", "its tokens are ordered by mask units")],
    ),
    "within and between patches": (
        small("tnt_s_patch16_224", img_size=32, embed_dim=32, inner_dim=8, depth=1, num_heads_outer=2), 32, (2, 2), 1,
        [("Attention", WINDOWS), ("Attention", "ok")],
    ),
    "queries reduced": (
        small("levit_128s", img_size=64, embed_dim=(32, 32), depth=(1, 1), num_heads=(2, 2), key_dim=8), 64, (4, 4), 0,
        [("Attention", "ok"), ("AttentionDownsample", "its 4 queries"), ("Attention", "its 4 keys")],
    ),
    "local groups": (
        small("twins_svt_small", embed_dims=(16,) * 4, depths=(2, 1, 1, 1), **HEADS), 112, (4, 4), 0,
        [("LocallyGroupedAttn", "window of 16"), ("GlobalSubSampleAttn", "its 784 queries"),
         ("LocallyGroupedAttn", "window"), ("LocallyGroupedAttn", "its 49 keys"), ("LocallyGroupedAttn", "its 49 keys")],
    ),
    "heads among the images": (
        small("samvit_base_patch16_224", img_size=128, embed_dim=16, depth=2, num_heads=2, window_size=4,
              global_attn_indexes=(1,)), 128, (8, 8), 0, [("Attention", "window"), ("Attention", "ok")],
    ),
    "one map for all channels": (
        small("mobilevitv2_050"), 64, (4, 4), 0, [("LinearSelfAttention", "")] * 9,
    ),
    "transformers of torch": (
        lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 16, num_classes=3), 16, (2, 2), 1,
        [("MultiheadAttention", "ok")] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("case", OTHERS)
def test_every_layer_is_ok_or_says_why_not(case, fused):
    make, side, grid, prefix, expected = OTHERS[case]
    model = make()
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    recorded = record(model, images(2, side, side), maps, grid, prefix)
    assert [item.layer.kind for item in recorded] == [kind for kind, _ in expected]
    assert [item.layer.index for item in recorded] == list(range(len(expected)))
    for item, (_, outcome) in zip(recorded, expected, strict=True):
        layer = item.layer
        if outcome == "ok" or outcome.startswith("window"):
            assert (layer.status, layer.reason) == ("ok", "")
            assert layer.extent == ("grid" if outcome == "ok" else "window")
            windows = {"ok": 1, "window": 4}.get(outcome) or int(outcome.split()[-1])
            maps_of_images = 2 * windows
            assert item.values["map"].shape == (maps_of_images, layer.num_heads, layer.queries, layer.keys)
            assert layer.between_patches == (layer.kind != "ClassAttn")
        else:
            assert layer.status == "skipped" and layer.reason and layer.reason.startswith(outcome) and not item.values


@pytest.mark.parametrize(
    "case", [case for case, (*_, layers) in OTHERS.items() if any(outcome == "ok" for _, outcome in layers)]
)
def test_other_networks_give_the_same_fused_and_written_out(case):
    make, side, grid, prefix, _ = OTHERS[case]
    model, found = sharpen(make()), []
    for fused in (True, False):
        for part in model.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused
        found.append(record(model, images(2, side, side), maps, grid, prefix))
    for item, other in zip(*found, strict=True):
        assert dataclasses.replace(item.layer, how="") == dataclasses.replace(other.layer, how="")
        if item.values:
            torch.testing.assert_close(item.values["map"], other.values["map"], atol=5e-5, rtol=0)
            torch.testing.assert_close(item.values["map"].sum(-1), torch.ones(item.values["map"].shape[:-1]))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
def test_class_attention(fused):
    """CaiT's last layers: the class token alone looks at itself and the patches."""
    model = timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    attn, seen = model.blocks_token_only[0].attn, {}
    attn.q.weight.data.normal_()
    attn.fused_attn = fused
    handle = attn.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    item = record(model, images(), maps)[-2]
    handle.remove()
    assert (item.layer.name, item.layer.queries, item.layer.keys) == ("blocks_token_only.0.attn", 1, 17)
    with torch.no_grad():
        q, k = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (attn.q(seen["x"][:, :1]), attn.k(seen["x"])))
    torch.testing.assert_close(item.values["map"], (q @ k.mT / 4).softmax(-1), atol=1e-6, rtol=0)


def test_outputs_of_torchs_transformer_stay():
    """nn.MultiheadAttention leaves its fast path while it is watched; the result is the same to rounding."""
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 16, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)
    outputs = []
    with torch.no_grad():
        plain = model(images(2, 16, 16))
        model.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        record(model, images(2, 16, 16), maps)
    assert plain.std() > 0.1
    torch.testing.assert_close(outputs[0], plain, atol=1e-5, rtol=0)


# A user's own module --------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Images [B, 3, 8, 8] -> `mixer`(x) of 2 x 2 patches; what is around a user's own attention."""

    num_prefix_tokens = 0

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.patch_embed = timm.layers.PatchEmbed(8, 4, 3, 8)
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(2 * self.patch_embed(x))


class Mixer(nn.Module):
    """attend(q, k, v [B, 2, 4, 4]) of any kind, in a class whose name says nothing."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.expected = None

    def forward(self, x):
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = q.flip(2) * 2, q.roll(1, 2)
        out = self.attend(q, k, v)
        return out.transpose(1, 2).flatten(2)


class AttendModule(nn.Module):
    """As `written` below, with the softmax and the dropout in modules of their own."""

    def __init__(self, softmax):
        super().__init__()
        self.softmax, self.drop = softmax, nn.Dropout(0.3)

    def forward(self, q, k, v):
        return torch.matmul(self.drop(self.softmax(q @ k.mT / 2)), v)


class OwnSoftmax(nn.Module):
    def forward(self, scores):
        return torch.softmax(scores, dim=3)


BATCH = 3
GENERATOR = torch.Generator().manual_seed(2)
BOOL = torch.rand(4, 4, generator=GENERATOR) > 0.4
BOOL[2] = True
FLOAT = {n: torch.randn(*(BATCH, 2, 4, 4)[4 - n :], generator=GENERATOR) for n in (2, 3, 4)}
SHARED = torch.randn(1, 1, 4, 4, generator=GENERATOR)
PER_IMAGE = torch.rand(BATCH, 1, 4, 4, generator=GENERATOR) > 0.3
PER_IMAGE[..., 0] = True
sdpa = F.scaled_dot_product_attention

FUSED = {
    "positional": lambda q, k, v: sdpa(q, k, v),
    "keywords": lambda q, k, v: sdpa(value=v, key=k, query=q),
    "all positional": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "bool mask": lambda q, k, v: sdpa(q, k, v, BOOL),
    "bool mask, keyword": lambda q, k, v: sdpa(q, k, v, attn_mask=BOOL),
    "bool mask, an image each": lambda q, k, v: sdpa(q, k, v, attn_mask=PER_IMAGE),
    "float mask [Q, K]": lambda q, k, v: sdpa(q, k, v, attn_mask=FLOAT[2]),
    "float mask [H, Q, K]": lambda q, k, v: sdpa(q, k, v, attn_mask=FLOAT[3]),
    "float mask [B, H, Q, K]": lambda q, k, v: sdpa(q, k, v, attn_mask=FLOAT[4]),
    "float mask [1, 1, Q, K]": lambda q, k, v: sdpa(q, k, v, attn_mask=SHARED),
    "minus infinity": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.zeros(4, 4).masked_fill(~BOOL, float("-inf"))),
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "scale": lambda q, k, v: sdpa(q, k, v, scale=1.7),
    "scale and mask": lambda q, k, v: sdpa(q, k, v, BOOL, scale=0.1),
    "grouped queries": lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
    "one head of keys": lambda q, k, v: sdpa(q, k[:, 1:], v[:, 1:]),
    "the keys of one image": lambda q, k, v: sdpa(q, k[:1], v[:1]),
    "through nn.functional": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
}


def written(softmax, product=torch.matmul):
    return lambda q, k, v: product(softmax(q @ k.mT / 2), v)


WRITTEN = {
    "torch.softmax": written(lambda s: torch.softmax(s, -1)),
    "torch.softmax(dim=3)": written(lambda s: torch.softmax(s, dim=3)),
    "Tensor.softmax": written(lambda s: s.softmax(-1)),
    "Tensor.softmax(dim=)": written(lambda s: s.softmax(dim=-1)),
    "F.softmax": written(lambda s: F.softmax(s, -1)),
    "F.softmax(dim=)": written(lambda s: F.softmax(s, dim=-1)),
    "torch.special.softmax": written(lambda s: torch.special.softmax(s, -1)),
    "in float64, back": written(lambda s: s.softmax(-1, dtype=torch.float64).to(s.dtype)),
    "in float64, type_as": written(lambda s: torch.softmax(s.double(), -1).type_as(s)),
    "dropout": written(lambda s: F.dropout(s.softmax(-1), 0.5, training=False)),
    "@": written(lambda s: s.softmax(-1), lambda a, v: a @ v),
    "Tensor.matmul": written(lambda s: s.softmax(-1), lambda a, v: a.matmul(v)),
    "einsum": written(lambda s: s.softmax(-1), lambda a, v: torch.einsum("bhij,bhjd->bhid", a, v)),
    "einsum, values first": written(lambda s: s.softmax(-1), lambda a, v: torch.einsum("bhjd, bhij -> bhid", v, a)),
    "einsum, ellipsis": written(lambda s: s.softmax(-1), lambda a, v: torch.einsum("...ij,...jd->...id", a, v)),
    "einsum, list": written(lambda s: s.softmax(-1), lambda a, v: torch.einsum("bhij,bhjd->bhid", [a, v])),
    "nn.Softmax": AttendModule(nn.Softmax(dim=-1)),
    "a module around softmax": AttendModule(OwnSoftmax()),
}


@pytest.mark.parametrize("case", [*FUSED, *WRITTEN])
def test_users_own_attention(case, monkeypatch):
    """The map times the identity as values is the map: the attention that the user's own call applies."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 2 * 16 * 2)  # two images: also masks are taken by image
    mixer = Mixer(FUSED.get(case) or WRITTEN[case])
    model = Tokens(mixer).eval()
    (item,) = record(model, images(BATCH, 8, 8), maps)
    name, kind = ("mixer.attend", "AttendModule") if isinstance(mixer.attend, nn.Module) else ("mixer", "Mixer")
    how = "fused" if case in FUSED else "written out"
    assert item.layer == Layer(0, name, kind, 2, 4, (2, 2), 0, how=how, causal=case in ("causal", "all positional"))

    with torch.no_grad():
        q = (2 * model.patch_embed(images(BATCH, 8, 8))).unflatten(-1, (2, 4)).transpose(1, 2)
        applied = mixer.attend(q, 2 * q.flip(2), torch.eye(4).expand(BATCH, 2, 4, 4))
    torch.testing.assert_close(item.values["map"], applied, atol=1e-6, rtol=0)
    assert (applied[0] - applied[1]).abs().max() > 0.01 and (applied - 0.25).abs().max() > 0.1


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
        q, k, _ = model.blocks[0].attn.qkv(seen[0]).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).double()
    assert item.values["map"].dtype == torch.float32
    torch.testing.assert_close(item.values["map"].double(), (q @ k.mT / 4).softmax(-1), atol=1e-6, rtol=0)


# 6. Our own models ---------------------------------------------------------------------------------------------------


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


class Asked(nn.Module):
    """A user's layer that offers its map, and computes with modules and softmaxes inside."""

    grid, num_prefix_tokens = (2, 2), 0

    def __init__(self):
        super().__init__()
        self.soft, self.inner, self.calls = nn.Softmax(-1), Mixer(FUSED["positional"]), 0

    def attention_map(self, x):
        self.calls += 1
        return self.soft((x @ x.mT)[:, None])

    def forward(self, x):
        return (self.attention_map(x) @ x[:, None])[:, 0] + self.inner(x)


def test_a_layer_that_is_asked_is_not_watched():
    layer = Asked()
    (item,) = record(Tokens(layer), images(BATCH, 8, 8), maps)
    assert (item.layer.name, item.layer.kind, item.layer.num_heads, item.layer.status) == ("mixer", "Asked", 1, "ok")
    layer.grid = (2, 3)
    (item,) = record(Tokens(layer), images(BATCH, 8, 8), maps)
    assert item.layer.status == "skipped" and item.layer.reason == "its 4 keys are not 0 prefix tokens + 2 x 3 patches"


def test_asked_and_watched_layers_in_one_model_keep_their_order():
    model = Tokens(nn.Sequential(Mixer(FUSED["positional"]), Asked(), Mixer(WRITTEN["@"])))
    recorded = record(model, images(BATCH, 8, 8), maps)
    assert [(item.layer.name, item.layer.kind) for item in recorded] == [
        ("mixer.0", "Mixer"), ("mixer.1", "Asked"), ("mixer.2", "Mixer"),
    ]  # fmt: skip
    assert [item.layer.index for item in recorded] == [0, 1, 2]


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
