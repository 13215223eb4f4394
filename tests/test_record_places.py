"""Where tokens are: grids and prefix tokens that are given, declared or observed; windows; what has no distances is skipped."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
import torchvision
from networks import (
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


def test_grid_and_prefix_that_are_given_are_checked():
    """What is given and what is observed are both said, where they differ; what is right is taken."""
    model, x = vit(), images()
    right = record(model, x, maps, grid=(4, 4), num_prefix_tokens=1)
    assert {(item.layer.status, item.layer.grid, item.layer.places) for item in right} == {("ok", (4, 4), "given")}
    for given, reason in (
        (
            {"grid": (2, 8), "num_prefix_tokens": 1},
            "1 tokens without a place + 2 x 8 is given, but 1 tokens without a place",
        ),
        ({"grid": (17,)}, "0 tokens without a place + 17 is given, but"),
        ({"grid": (4, 5)}, "0 tokens without a place + 4 x 5 is given, but"),
        ({"num_prefix_tokens": 0}, "0 tokens without a place are given, but 1 tokens without"),
    ):
        wrong = record(model, x, maps, **given)
        assert {item.layer.status for item in wrong} == {"skipped"} and not any(item.values for item in wrong)
        assert all(item.layer.reason.startswith(reason) for item in wrong), wrong[0].layer.reason


def test_a_declaration_that_is_not_so_is_refused():
    model = vit()
    model.num_prefix_tokens = 0
    model.patch_embed.dynamic_feat_size = lambda size: (1, 17)
    (item, _) = record(model, images(), maps)
    assert item.layer.reason.startswith(
        "0 tokens without a place + 1 x 17 is declared, but 1 tokens without a place + 4 x 4"
    )


def test_places_are_observed_in_a_model_that_declares_none():
    for options, size, grid, prefix in (({}, (32, 32), (4, 4), 1), ({"img_size": (24, 48)}, (24, 48), (3, 6), 1)):
        found = record(nn.Sequential(vit(**options)), images(2, *size), maps)
        assert [(item.layer.name, item.layer.grid, item.layer.num_prefix_tokens, item.layer.places) for item in found] == [
            ("0.blocks.0.attn", grid, prefix, "observed"), ("0.blocks.1.attn", grid, prefix, "observed"),
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


def test_patches_that_are_cut_by_a_reshape_are_observed():
    (item,) = record(LinearPatches(), images(2, 8, 8), maps)
    assert (item.layer.status, item.layer.grid, item.layer.places) == ("ok", (2, 2), "observed")


def test_a_grid_that_cannot_be_observed_is_asked_for():
    model, x = Mixer(FUSED["positional"]), torch.randn(2, 4, 8)
    (item,) = record(model, x, maps)
    assert item.layer.reason == (
        "there is no image among its inputs: give grid=(rows, columns) or (N,), and num_prefix_tokens"
    )
    (item,) = record(model, x, maps, grid=(2, 2))
    assert (item.layer.status, item.layer.grid, item.layer.places) == ("ok", (2, 2), "given")


CHANNELS = "each of its tokens is of the whole image"
FOLLOWED = "what is done to its scores"
HEADS = {"num_heads": (2, 2, 2, 2)}
# what: (model, image side, [(kind, "ok", how many windows, or the beginning of the reason) of each layer])
OTHERS = {
    "windows": (
        small("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 2)), 56,
        [("WindowAttention", 4)] * 2 + [("WindowAttention", "ok")] * 2,  # the last stage is one window
    ),
    "windows, written out": (
        small("swinv2_tiny_window8_256", img_size=64, embed_dim=16, depths=(2, 1), num_heads=(2, 2)), 64,
        [("WindowAttention", 4)] * 2 + [("WindowAttention", "ok")],
    ),
    "channels": (
        small("xcit_nano_12_p8_224", img_size=32, embed_dim=32, num_heads=2, depth=2), 32,
        [("XCA", CHANNELS)] * 2 + [("ClassAttn", "ok")] * 2,
    ),
    "channels and windows": (
        small("davit_tiny", depths=(1, 1), embed_dims=(16, 16), num_heads=(2, 2)), 56,
        [("WindowAttention", 4), ("ChannelAttention", CHANNELS), ("WindowAttention", "ok"), ("ChannelAttention", CHANNELS)],
    ),
    "heads that are mixed": (
        small("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2), 32,
        [("TalkingHeadAttn", FOLLOWED)] * 2 + [("ClassAttn", "ok")] * 2,
    ),
    "two softmaxes": (
        small("convit_tiny", img_size=32, patch_size=8, embed_dim=8, depth=3, num_heads=4, local_up_to_layer=2), 32,
        [("GPSA", "ok")] * 2 + [("MHSA", "ok")],
    ),
    "a difference of two": (
        small("vit_dwee_patch16_reg1_gap_256", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2), 32, None,
    ),
    "keys reduced": (small("pvt_v2_b0", depths=(1, 1, 1, 1)), 128, [("Attention", "ok")] * 4),
    "a pyramid whose grid shrinks": (small("pit_ti_224", img_size=64, depth=(1, 1, 1)), 64, [("Attention", "ok")] * 3),
    "mask units": (
        small("hiera_tiny_224", stages=(1, 1, 1, 1)), 224,
        [("MaskUnitAttention", 49)] * 3 + [("MaskUnitAttention", "ok")],
    ),
    "queries reduced": (
        small("levit_128s", img_size=64, embed_dim=(32, 32), depth=(1, 1), num_heads=(2, 2), key_dim=8), 64,
        [("Attention", "ok"), ("AttentionDownsample", "ok"), ("Attention", "ok")],
    ),
    "local groups": (
        small("twins_svt_small", embed_dims=(16,) * 4, depths=(1, 1, 1, 1), **HEADS), 112,
        [("LocallyGroupedAttn", 16), ("LocallyGroupedAttn", 4), ("LocallyGroupedAttn", "ok"), ("LocallyGroupedAttn", "ok")],
    ),
    "heads among the images": (
        small("samvit_base_patch16_224", img_size=128, embed_dim=16, depth=2, num_heads=2, window_size=4,
              global_attn_indexes=(1,)), 128, [("Attention", 4), ("Attention", "ok")],
    ),
    "among every so many patches": (
        small("maxvit_rmlp_pico_rw_256", img_size=128, embed_dim=(32,), depths=(1,), stem_width=16), 128,
        [("AttentionCl", 64)] * 2,
    ),
    "one map for all channels": (small("mobilevitv2_050"), 64, [("LinearSelfAttention", "neither")] * 9),
    "transformers of torch": (
        lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 16, num_classes=3), 16,
        [("MultiheadAttention", "ok")] * 2,
    ),
}  # fmt: skip


SLOW = {"mask units"}
CASES = [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in OTHERS]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_ok_or_says_why_not(case, fused):
    make, side, expected = OTHERS[case]
    # Where attention is fused, each of the two that are subtracted is seen; written out, their difference is.
    expected = expected or ([("DiffAttention", "ok")] * 2 if fused else [("DiffAttention", "its weights")])
    model = make()
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    recorded = record(model, images(2, side, side), maps)
    assert [item.layer.kind for item in recorded] == [kind for kind, _ in expected]
    assert [item.layer.index for item in recorded] == list(range(len(expected)))
    for item, (_, outcome) in zip(recorded, expected, strict=True):
        layer = item.layer
        if outcome == "ok" or isinstance(outcome, int):
            assert (layer.status, layer.reason) == ("ok", "")
            assert layer.extent == ("grid" if outcome == "ok" else "window")
            maps_of_images = 2 * (1 if outcome == "ok" else outcome)
            assert item.values["map"].shape == (maps_of_images, layer.num_heads, layer.queries, layer.keys)
            assert layer.between_patches == (layer.kind != "ClassAttn")
        else:
            assert layer.status == "skipped" and layer.reason and layer.reason.startswith(outcome) and not item.values


@pytest.mark.parametrize(
    "case",
    [case for case, (*_, layers) in OTHERS.items() if case not in SLOW and layers and ("ok" in dict(layers).values())],
)
def test_other_networks_give_the_same_fused_and_written_out(case):
    make, side, _ = OTHERS[case]
    model, found = sharpen(make()), []
    for fused in (True, False):
        for part in model.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused
        found.append(record(model, images(2, side, side), maps))
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
