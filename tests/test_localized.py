"""LPA in timm's ViTs: exact against a plain reference, unchanged at `content`, local at `local`, seen by the probe."""

import copy

import pytest
import timm
import torch
from torch import nn

from cil.attention import LocalizedAttention, local_heads, localize
from locality_probe.measures import measure_attention
from locality_probe.probe import Probe

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 5}
NAMES = {
    "class token": "vit_tiny_patch16_224",
    "registers": "vit_medium_patch16_reg4_gap_256",
    "gap": "vit_tiny_patch16_224",
}


def network(kind="class token", **settings):
    torch.manual_seed(0)
    pooled = {"global_pool": "avg", "class_token": False} if kind == "gap" else {}
    return timm.create_model(NAMES[kind], **SMALL | pooled | settings).eval()


def reference(layer: LocalizedAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 3 in float64, pair by pair: the output [B, N, dim] and the map [B, H, N, N]."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    b, n, _ = x.shape
    q, k, v = layer.qkv(x).reshape(b, n, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    scores = layer.content_scale[:, None, None] * (layer.q_norm(q) @ layer.k_norm(k).mT) / layer.head_dim**0.5
    first, columns = layer.num_prefix_tokens, layer.grid[1]
    for i in range(first, n):
        for j in range(first, n):
            y, x_ = ((j - first) // columns - (i - first) // columns), ((j - first) % columns - (i - first) % columns)
            r = torch.tensor([x_, y, x_**2 + y**2]).double()
            scores[:, :, i, j] = scores[:, :, i, j] + layer.pos_weight @ r
    a = scores.softmax(-1)
    return layer.proj(layer.norm((a @ v).transpose(1, 2).flatten(2))), a


@pytest.mark.parametrize("kind", NAMES)
def test_content_start_leaves_the_network_as_it_was(kind):
    before, images = network(kind), torch.randn(2, 3, 32, 32)
    after = localize(copy.deepcopy(before))
    assert all(isinstance(block.attn, LocalizedAttention) for block in after.blocks)
    torch.testing.assert_close(after(images), before(images), rtol=0, atol=1e-6)
    more = {name for name, _ in after.named_parameters()} - {name for name, _ in before.named_parameters()}
    assert more == {f"blocks.{i}.attn.{name}" for i in range(3) for name in ("pos_weight", "content_scale")}
    after.load_state_dict(before.state_dict(), strict=False)


@pytest.mark.parametrize("kind", NAMES)
def test_both_formulations_are_eq_3(kind, monkeypatch):
    layer = localize(network(kind), [1], "local", 0.3).blocks[1].attn
    nn.init.normal_(layer.pos_weight, std=0.3)
    nn.init.normal_(layer.content_scale)
    x = torch.randn(2, layer.num_prefix_tokens + 16, 48)
    expected, _ = reference(layer, x)
    wanted = {}
    for written_out in (False, True):
        monkeypatch.setattr("cil.localized.writes_out", lambda q, w=written_out: w)
        layer.zero_grad()
        out = layer(x)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
        out.square().sum().backward()
        grads = [layer.pos_weight.grad.clone(), layer.content_scale.grad.clone(), layer.qkv.weight.grad.clone()]
        for got, other in zip(grads, wanted.setdefault("grads", grads), strict=True):
            torch.testing.assert_close(got, other, rtol=1e-3, atol=1e-4)
    double = copy.deepcopy(layer).double()  # the reference's own gradients, of v and lambda
    x64 = x.double()
    q, k, v = double.qkv(x64).reshape(2, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(3, x.shape[1], x.shape[1]).double()
    n = double.num_prefix_tokens
    y, x_ = (torch.arange(16) // 4).double(), (torch.arange(16) % 4).double()
    dx, dy = x_[None] - x_[:, None], y[None] - y[:, None]
    r = torch.stack([dx, dy, dx**2 + dy**2])
    bias[:, n:, n:] = torch.einsum("hr,rij->hij", double.pos_weight, r)
    a = (double.content_scale[:, None, None] * (q @ k.mT) / 4 + bias).softmax(-1)
    double.proj((a @ v).transpose(1, 2).flatten(2)).square().sum().backward()
    torch.testing.assert_close(wanted["grads"][0].double(), double.pos_weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(wanted["grads"][1].double(), double.content_scale.grad, rtol=1e-3, atol=1e-4)


def test_half_precision_stays_near(monkeypatch):
    layer = localize(network("class token", img_size=112), [0], "local", 1.0).blocks[0].attn
    x = torch.randn(1, 197, 48)
    expected, _ = reference(layer, x)
    for written_out in (False, True):
        monkeypatch.setattr("cil.localized.writes_out", lambda q, w=written_out: w)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert (out.double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_local_start_is_the_papers_and_the_probe_sees_it():
    model = localize(network(), start="local", lambda_init=0.02)
    layer = model.blocks[0].attn
    assert torch.equal(layer.pos_weight[:1], local_heads(3, 1.0, "random")[:1])
    assert layer.content_scale.tolist() == pytest.approx([0.02] * 3)
    images, seen = torch.randn(2, 3, 32, 32), []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with Probe(model) as probe:
        probe.update(images)
    measured = probe.result()
    assert [(x.grid, x.num_prefix_tokens, x.places) for x in measured.layers] == [((4, 4), 1, "observed")] * 3
    with torch.no_grad():
        _, a = reference(layer, seen[-1])
    expected = measure_attention(a, (4, 4), 1)
    for name in ("d_loc", "prefix_mass"):
        torch.testing.assert_close(measured.values[0][name], expected[name], rtol=1e-5, atol=0)
    assert measured.table().query("layer == 0")["content_scale"].tolist() == pytest.approx([0.02] * 3)
    assert measured.values[0]["d_loc"].mean() < 0.8 * measured.layers[0].d_uniform


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (network, {"start": "near"}, "start='near' is none of content, local"),
        (network, {"layers": [3]}, "there is no layer 3: VisionTransformer has 3 blocks"),
        (lambda: localize(network(), [1]), {}, "layer 1 is local already"),
        (lambda: timm.create_model("resnet10t"), {}, "ResNet has no blocks over a grid of patches"),
        (lambda: timm.create_model("test_vit", attn_layer="diff"), {}, "layer 0 has DiffAttention, and LPA goes into"),
    ],
)
def test_what_cannot_be_localized_is_refused(model, options, words):
    made = model()
    before = [type(block.attn) for block in getattr(made, "blocks", [])]
    with pytest.raises(ValueError, match=words):
        localize(made, **options)
    assert before == [type(block.attn) for block in getattr(made, "blocks", [])]


def test_other_patches_than_the_grids_are_refused():
    layer = localize(network()).blocks[0].attn
    with pytest.raises(
        ValueError, match="local on 4 x 4 patches and 1 tokens before them, without a mask; it got 26 tokens"
    ):
        layer(torch.randn(1, 26, 48))
