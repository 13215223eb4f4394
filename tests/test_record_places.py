"""Where tokens are: grids and prefix tokens that are given, declared or observed; windows; what has no distances is skipped."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
import torchvision
from networks import (
    CHANGED,
    CHANNELS,
    FUSED,
    Mixer,
    images,
    maps,
    sharpen,
    small,
    vit,
)
from torch import nn

from locality_probe.measures import nonlocality, uniform_nonlocality
from locality_probe.record import record

pytestmark = pytest.mark.usefixtures("seeded")


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
