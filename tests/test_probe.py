"""Probe: exact while fused, on any model, restored; the log for training loops.

Attention in these tests is peaked: near-uniform maps would let wrong shortcuts pass.
"""

from __future__ import annotations

import math

import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import TOY, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BATCH, FUSED, Mixer, Tokens, images, maps, sharpen, vit
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from cil.foreign import read
from cil.models import IncrementalViT
from locality_probe import LocalityLog, Probe
from locality_probe.measures import MEASURES, distances, measure_attention, positions
from locality_probe.record import maps as record_module
from locality_probe.record import record
from locality_probe.tables import HISTORY, LAYERS, NONLOCALITY, NONLOCALITY_IMAGES


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def exact(attention: Tensor, grid: tuple[int, ...], prefix: int) -> dict[str, Tensor]:
    """The measures [B, H] in float64, patch by patch, as their definitions read."""
    a = attention.double()
    patches = a[:, :, prefix:, prefix:] / a[:, :, prefix:, prefix:].sum(-1, keepdim=True)
    p, d = positions(grid), distances(grid)
    away = torch.einsum("bhij,jc->bhic", patches, p) - p
    sinks = a[:, :, prefix:, prefix:].mean(2).topk(-(-len(p) // 100)).indices
    is_sink = torch.zeros(*a.shape[:2], len(p), dtype=torch.bool).scatter(-1, sinks, True)[:, :, None]
    left = patches.masked_fill(is_sink, 0.0)
    nothing = torch.full(a.shape[:2], math.nan, dtype=torch.float64)
    return {
        "d_loc": (patches * d).sum(-1).mean(-1),
        "rms_distance": (patches * d**2).sum(-1).mean(-1).sqrt(),
        "prefix_mass": a[:, :, prefix:, :prefix].sum(-1).mean(-1),
        "entropy": -torch.xlogy(patches, patches).sum(-1).mean(-1) / math.log(len(p)),
        "self_mass": patches.diagonal(0, 2, 3).mean(-1),
        "centroid_shift": away.norm(dim=-1).mean(-1),
        "sink_mass": (patches * is_sink).sum(-1).mean(-1),
        "d_loc_no_sinks": ((left * d).sum(-1) / left.sum(-1)).nanmean(-1),  # NaN: all on sinks
        "d_time": nothing,
        "d_space": nothing,
    }


def probed(model: nn.Module, *batches: Tensor, **options):
    with Probe(model, **options) as probe:
        for batch in batches:
            probe.update(batch)
    return probe.result()


# 1. Exact ------------------------------------------------------------------------------------------------------------

MODELS = {  # what: (timm model, options, image height and width)
    "class token": ("vit_tiny_patch16_224", {}, (32, 32)),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, (32, 32)),
    "no prefix, wide": ("vit_medium_patch16_gap_240", {"img_size": (24, 48)}, (24, 48)),
    "bias as a mask": ("beit_base_patch16_224", {}, (32, 32)),
    "rotary": ("eva02_tiny_patch14_224", {}, (32, 32)),
    "q and k normalised": ("vit_tiny_patch16_224", {"qk_norm": True}, (32, 32)),
}


@pytest.mark.parametrize("blocks", ["default", "small"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("case", MODELS)
def test_exact_to_float64_on_the_models_own_scores(case, fused, blocks, monkeypatch):
    """Scores in float64 from the float32 q and k that the layer has: record's maps of a float64 copy of the layer's input."""
    name, options, size = MODELS[case]
    model, x = vit(name, fused, **options), images(5, *size)
    if blocks == "small":  # many images, heads and queries are cut into blocks
        monkeypatch.setattr(record_module, "BLOCK", 100)
        monkeypatch.setattr(record_module, "WHOLE", 100)
        monkeypatch.setattr(record_module, "BLOCK_ROWS", 5)
    expected = record(model, x, lambda a, layer: exact(a, layer.grid, layer.num_prefix_tokens))
    found = probed(model, x)
    assert [layer.status for layer in found.layers] == ["ok"] * 2
    for values, other in zip(found.values, expected, strict=True):
        assert list(values) == list(MEASURES)
        for name in MEASURES:
            torch.testing.assert_close(values[name], other.values[name], atol=2e-6, rtol=1e-5, equal_nan=True)


def test_long_grids_and_peaked_attention_are_exact():
    """As DINOv2 at 518 pixels: 1374 tokens; one fp32 sum over N^2 terms would be off by up to 2e-3 here."""
    n, grid = 5 + 37 * 37, (37, 37)
    p = F.pad(positions(grid).float(), (0, 0, 5, 0))
    q = torch.cat([2 * p, torch.randn(n, 6)], -1)  # a query looks around its own place, and a little elsewhere
    k = torch.cat([p, torch.randn(n, 6)], -1)
    bias = (-(positions(grid) ** 2).sum(-1)).float()
    mask = F.pad(bias.expand(37 * 37, -1), (5, 0, 5, 0))

    class Local(nn.Module):
        def forward(self, x):
            x = x.unflatten(1, (2, n, 8))
            return F.scaled_dot_product_attention(q.expand(1, 2, -1, -1), k.expand(1, 2, -1, -1), x, mask, scale=1.0)

    model, values = Local(), torch.randn(1, 2 * n * 8)
    found = probed(model, values, grid=grid, num_prefix_tokens=5).values[0]
    scores = q.double() @ k.double().T + mask.double()
    for name, expected in exact(scores.softmax(-1)[None, None], grid, 5).items():
        torch.testing.assert_close(found[name][0], expected[0].expand(2), atol=2e-6, rtol=1e-5, equal_nan=True)
    assert found["d_loc"].max() < 3  # local: uniform is 19.3


@pytest.mark.parametrize("case", FUSED)
def test_a_users_own_fused_call_is_replaced_by_the_same(case, monkeypatch):
    """Masks, scales, grouped heads: what the next layer gets is the kernel's output, what is measured the map's."""
    monkeypatch.setattr(record_module, "BLOCK", 50)
    model, outputs = Tokens(Mixer(FUSED[case])).eval(), []
    x = images(BATCH, 8, 8)
    with torch.no_grad():
        plain = model(x)
    with Probe(model) as probe:
        outputs.append(probe.update(x))
    torch.testing.assert_close(outputs[0], plain, atol=1e-6, rtol=1e-6)
    (item,) = record(model, x, lambda a, layer: exact(a, layer.grid, 0))
    for name, value in probe.result().values[0].items():
        torch.testing.assert_close(value, item.values[name], atol=1e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("file", ["raw_gpsa", "raw_lpa", "dytox_gpsa", "dytox_lpa"])
def test_released_networks(file):
    """Nonlocality [layers, H] that the released implementation computes, over the layers between patches."""
    stored = golden(f"model_{file}")
    model, _ = read({name[2:]: value for name, value in stored.items() if name.startswith("w.")}, file)
    found = probed(model, stored["x"])
    between = [values["d_loc"].mean(0) for values in found.values if values]
    expected = stored["nonlocality"].double()
    torch.testing.assert_close(torch.stack(between), expected[: len(between)], atol=0, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_invariants(data):
    """Free bounds of the measures, and what flips of the grid do to them: nothing."""
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 5))
    prefix, n = data.draw(st.integers(0, 2)), rows * columns
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    sharp = data.draw(st.sampled_from([0.1, 3.0, 30.0]))
    scores = sharp * torch.randn(2, 3, prefix + n, prefix + n, generator=generator)

    class Given(nn.Module):
        def forward(self, x):
            x = x.unflatten(1, (3, prefix + n, 4))
            return F.scaled_dot_product_attention(x, x, x, attn_mask=self.scores)

    def of(scores):
        model = Given()
        model.scores = scores
        return probed(
            model, torch.zeros(2, 3 * (prefix + n) * 4), grid=(rows, columns), num_prefix_tokens=prefix
        ).values[0]

    found = of(scores)
    farthest = distances((rows, columns)).max()
    assert (found["d_loc"] >= 0).all() and (found["d_loc"] <= farthest + 1e-6).all()
    assert (found["centroid_shift"] <= found["d_loc"] + 1e-5).all()
    assert (found["d_loc"] <= found["rms_distance"] + 1e-6).all()
    for share in ("prefix_mass", "entropy", "self_mass"):
        assert (found[share] >= -1e-5).all() and (found[share] <= 1 + 1e-5).all()
    flipped = torch.arange(n).view(rows, columns).flip(data.draw(st.sampled_from([0, 1])))
    order = torch.cat([torch.arange(prefix), prefix + flipped.flatten()])
    for name, value in of(scores[:, :, order][..., order]).items():
        if sharp == 30 and name in ("sink_mass", "d_loc_no_sinks"):
            continue  # where patches get all of a few queries, two may get the same, and which is the sink is a matter of order
        torch.testing.assert_close(value, found[name], atol=2e-6, rtol=1e-5, equal_nan=True)


def test_batches_and_order_do_not_matter():
    model, x = vit(), images(7)
    whole = probed(model, x)
    order = torch.randperm(7)
    for other, index in ((probed(model, *x.split(3)), torch.arange(7)), (probed(model, x[order]), order)):
        for a, b in zip(whole.values, other.values, strict=True):
            for name in MEASURES:
                torch.testing.assert_close(b[name], a[name][index], atol=1e-6, rtol=1e-6, equal_nan=True)


def test_only_some_measures():
    found = probed(vit(), images(), measures=("entropy",))
    assert list(found.values[0]) == ["d_loc", "entropy"]
    table = found.table()
    assert table["rms_distance"].isna().all() and table["entropy"].notna().all()
    with pytest.raises(ValueError, match="no measure 'dloc'; there: d_loc, rms_distance"):
        Probe(vit(), measures=("dloc",))


# 2. Any model ----------------------------------------------------------------------------------------------------------


def test_windows_are_measured_inside_the_window():
    """Swin: shifted windows with their masks and biases, worked out from the weights of one layer."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 1), num_heads=(2, 2)
    )
    model = sharpen(model)
    seen = {}
    attn = model.layers[0].blocks[1].attn  # the shifted one
    attn.register_forward_pre_hook(lambda _, inputs, kwargs: seen.update(x=inputs[0], **kwargs), with_kwargs=True)
    x = images(3, 56, 56)
    found = probed(model, x)
    assert [(layer.extent, layer.grid) for layer in found.layers] == [("window", (7, 7))] * 2 + [("grid", (7, 7))]
    q, k, _ = attn.qkv(seen["x"]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).double()
    scores = (q / 8**0.5 @ k.mT).unflatten(0, (3, 4)) + attn._get_rel_pos_bias().double() + seen["mask"][None, :, None]
    expected = exact(scores.softmax(-1).flatten(0, 1), (7, 7), 0)
    assert seen["mask"].min() < -50  # shifted: parts of a window that are not neighbours do not see each other
    expected["rms_distance"] = expected["rms_distance"].square()  # the root of the mean over all windows of the image
    for name, value in found.values[1].items():
        mean = expected[name].detach().unflatten(0, (3, 4)).mean(1)
        mean = mean.sqrt() if name == "rms_distance" else mean
        torch.testing.assert_close(value, mean, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert set(found.table()["extent"]) == {"window", "grid"}


def test_convits_prefix_joins_late_and_its_gate_is_shown():
    model = timm.create_model(
        "convit_tiny", img_size=32, patch_size=8, embed_dim=8, depth=3, num_heads=4, local_up_to_layer=2
    )
    model.eval()
    found = probed(model, images(2))
    assert [(layer.kind, layer.num_prefix_tokens, layer.how) for layer in found.layers] == [
        ("GPSA", 0, "eager"), ("GPSA", 0, "eager"), ("MHSA", 1, "eager"),
    ]  # fmt: skip
    with torch.no_grad():
        tokens = model.pos_drop(model.patch_embed(images(2)) + model.pos_embed)
        attention = model.blocks[0].attn.get_attention(model.blocks[0].norm1(tokens))
    torch.testing.assert_close(found.values[0]["d_loc"], exact(attention, (4, 4), 0)["d_loc"], atol=1e-6, rtol=1e-5)
    table = found.table().set_index("layer")
    gate = model.blocks[0].attn.gating_param.sigmoid().tolist()
    assert table.loc[0, "gate"].tolist() == pytest.approx(gate) and table.loc[2, "gate"].isna().all()


def test_torchvisions_transformer():
    """nn.MultiheadAttention, whose fast path would hide it, gives the weights that it applies."""
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 16, num_classes=3).eval()
    sharpen(model)
    attention = {}
    layer = model.encoder.layers[1].self_attention
    layer.register_forward_pre_hook(lambda _, inputs: attention.update(x=inputs[0]))
    found = probed(model, images(5))
    assert [(layer.how, layer.grid, layer.num_prefix_tokens) for layer in found.layers] == [("sdpa", (4, 4), 1)] * 2
    with torch.no_grad():
        _, weights = layer(*[attention["x"]] * 3, average_attn_weights=False)
    for name, value in exact(weights, (4, 4), 1).items():
        torch.testing.assert_close(found.values[1][name], value, atol=1e-5, rtol=1e-5, equal_nan=True)


class Multihead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=options.pop("batch_first", True), **options)

    def forward(self, x, **masks):
        return self.attend(x, x, x, need_weights=False, **masks)[0]


@pytest.mark.parametrize("masks", ["none", "attn_mask", "attn_mask by head", "key_padding_mask"])
def test_masks_of_multihead_attention(masks):
    model, x = Multihead().eval(), torch.randn(3, 6, 8)
    given = {
        "none": {}, "attn_mask": {"attn_mask": torch.randn(6, 6)},
        "attn_mask by head": {"attn_mask": torch.randn(6, 6, 6)},
        "key_padding_mask": {"key_padding_mask": torch.arange(6)[None] > torch.tensor([[5], [3], [4]])},
    }[masks]  # fmt: skip
    with Probe(model, grid=(6,)) as probe:
        probe.update(x, **given)
    with torch.no_grad():
        _, weights = model.attend(x, x, x, average_attn_weights=False, **given)
    torch.testing.assert_close(
        probe.result().values[0]["d_loc"], exact(weights, (6,), 0)["d_loc"], atol=1e-6, rtol=1e-5
    )


def test_keys_beyond_the_tokens_are_refused():
    found = probed(Multihead(add_bias_kv=True), torch.randn(3, 6, 8), grid=(6,))
    assert found.layers[0].reason == "its 7 keys are not 0 tokens without a place + 6 patches"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_of_text(kind, attention):
    """A sequence: distance |i - j| to earlier tokens alone; grouped queries in the second."""
    transformers = pytest.importorskip("transformers")
    n = 24
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4)
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
    model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    tokens = torch.randint(50, (3, n))
    found = probed(model, tokens, grid=(n,))
    assert [(layer.grid, layer.causal or attention == "eager") for layer in found.layers] == [((n,), True)] * 2
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    for values, weights in zip(found.values, attentions, strict=True):
        for name, value in exact(weights, (n,), 0).items():
            torch.testing.assert_close(values[name], value, atol=2e-5, rtol=1e-4, equal_nan=True)
    if attention == "sdpa":
        assert found.layers[0].d_uniform == pytest.approx((n - 1) / 4)
    table = found.layer_table()
    assert set(table["grid_rows"]) == {1} and set(table["grid_columns"]) == {n}


def test_our_networks_show_gate_and_lambda():
    model = IncrementalViT(TOY, (8, 8))
    model.grow(2)
    table = probed(model, images(2, 8, 8)).table()
    lpa, gpsa = (table[table["kind"] == kind] for kind in ("LPA", "GPSA"))
    assert lpa["content_scale"].tolist() == pytest.approx([TOY.lambda_init] * 4) and lpa["gate"].isna().all()
    assert gpsa["gate"].tolist() == pytest.approx([1 / (1 + math.exp(-1))] * 4) and gpsa["content_scale"].isna().all()


# 3. Precision, compilation, and what is left behind -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_as_it_is_and_is_scored_in_float32(dtype):
    model = vit().to(dtype)
    x = images().to(dtype)
    with torch.no_grad():
        plain = model(x)
    with Probe(model) as probe:
        assert torch.equal(probe.update(x), plain)
    expected = record(model, x, lambda a, layer: exact(a, layer.grid, 1))
    for values, item in zip(probe.result().values, expected, strict=True):
        torch.testing.assert_close(values["d_loc"], item.values["d_loc"], atol=0, rtol=1e-5)


def test_autocast_is_scored_in_float32():
    model, x = vit(), images()
    with torch.autocast("cpu", torch.bfloat16):
        found = probed(model, x)
        expected = record(model, x, lambda a, layer: exact(a, layer.grid, 1))
    for values, item in zip(found.values, expected, strict=True):
        torch.testing.assert_close(values["d_loc"], item.values["d_loc"], atol=0, rtol=1e-5)
    assert (found.values[0]["d_loc"] - probed(model, x).values[0]["d_loc"]).abs().max() > 1e-5  # bf16 it was


def test_compiled_models_give_the_same():
    model, x = vit(), images()
    plain = probed(model, x)
    for a, b in zip(probed(torch.compile(model), x).values, plain.values, strict=True):
        assert torch.equal(a["d_loc"], b["d_loc"])


def test_memory_does_not_grow_with_layers_or_with_all_maps(monkeypatch):
    """The largest tensor alive is a block or a row of sums, never [B, H, N, N]."""
    monkeypatch.setattr(record_module, "BLOCK", 2000)
    monkeypatch.setattr(record_module, "WHOLE", 200)
    monkeypatch.setattr(record_module, "BLOCK_ROWS", 8)
    sizes, model, x = [], vit(depth=3), images(6)
    softmax = torch.softmax

    def watch(*args, **kwargs):
        sizes.append(args[0].numel())
        return softmax(*args, **kwargs)

    monkeypatch.setattr(torch, "softmax", watch)
    probed(model, x)
    assert len(sizes) >= 3 * 6 and max(sizes) <= 2000 < 6 * 2 * 17 * 17


def test_the_model_comes_back_also_after_an_exception():
    model = vit()
    model.train()
    model.blocks[0].eval()
    before = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), Probe(model) as probe:
        probe.update(images())
        assert model.training  # between two updates it is nobody's but the user's
        raise RuntimeError("stop")
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    assert torch.is_grad_enabled() and model.blocks[0].attn.fused_attn
    model(images()).sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="inside `with Probe"):
        probe.update(images())


def test_images_of_another_size_need_another_probe():
    model = vit("vit_tiny_patch16_224", dynamic_img_size=True)
    with Probe(model) as probe:
        probe.update(images())
        with pytest.raises(
            ValueError, match=r"layer 0 \(blocks.0.attn\) is another .* use a Probe for each image size"
        ):
            probe.update(images(2, 40, 24))


def test_nothing_measured():
    with Probe(vit()) as probe, pytest.raises(ValueError, match="nothing was measured"):
        probe.result()
    with Probe(vit()) as probe, pytest.raises(ValueError, match="as tensors"):
        probe.update(3)


# 4. Tables and the log ---------------------------------------------------------------------------------------------


def test_tables_have_their_schema():
    found = probed(timm.create_model("xcit_nano_12_p8_224", img_size=32, embed_dim=32, num_heads=2, depth=1), images(3))
    assert found.table().empty and found.per_image().empty  # channels and class tokens alone
    assert found.layer_table()["status"].tolist() == ["skipped"] * 3
    found = probed(vit(), images(3))
    table, rows, layers = found.table("a", 2), found.per_image("a", 2, [4, 7, 9]), found.layer_table("a", 2)
    for frame, schema in ((table, NONLOCALITY), (rows, NONLOCALITY_IMAGES), (layers, LAYERS)):
        assert list(frame) == list(schema.columns) and set(frame["run"]) == {"a"} and set(frame["task"]) == {2}
    assert rows["image"].unique().tolist() == [4, 7, 9]
    means = rows.groupby(["layer", "head"])[["d_loc", "entropy"]].mean().reset_index(drop=True)
    torch.testing.assert_close(torch.tensor(means.to_numpy()), torch.tensor(table[["d_loc", "entropy"]].to_numpy()))


def test_entropy_of_windows_with_one_patch():
    """7 x 7 patches in windows of 6 x 6: the last window holds one patch, which has nothing to choose from."""
    swin = SwinTransformer(img_size=28, patch_size=4, window_size=6, depths=(1,), num_heads=(2,), embed_dim=8)
    for parameter in swin.parameters():
        torch.nn.init.normal_(parameter, std=0.02)  # attention is nearly uniform
    table = probed(swin, torch.randn(2, 3, 28, 28)).table()
    assert set(table["extent"]) == {"window"} and table["entropy"].between(0.99, 1 + 1e-6).all()
    assert measure_attention(torch.ones(1, 1, 1, 1), (1, 1))["entropy"].isnan().all()


def test_log_of_a_training_loop(tmp_path):
    model, x, path = vit(), images(4), tmp_path / "locality.csv"
    log = LocalityLog(path, x, batch_size=3)
    for epoch in range(3):
        log(model, epoch)
    again = LocalityLog(path, x)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
        model.blocks[0].attn.qkv.bias.zero_()
    rows = again(model, 2)  # an epoch that is trained again replaces its rows
    history = HISTORY.read(path)
    assert history.groupby("epoch").size().tolist() == [2, 2, 2]
    assert rows["d_loc"].iloc[0] == pytest.approx(rows["d_uniform"].iloc[0], rel=1e-5)
    first = probed(model, x).table().groupby("layer")["d_loc"].mean()
    pd.testing.assert_series_equal(history[history["epoch"] == 2].set_index("layer")["d_loc"], first, rtol=1e-6)


def test_log_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = LocalityLog(tmp_path / "locality.csv", images(2), tensorboard=tmp_path / "events")
    expected = [log(vit(), epoch)["d_loc"].tolist() for epoch in range(2)]
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for layer in range(2):
        logged = [event.value for event in events.Scalars(f"d_loc/layer_{layer:02d}")]
        assert logged == pytest.approx([epoch[layer] for epoch in expected])


def test_maps_of_the_tests_are_peaked():
    assert all(item.values["map"].amax(-1).mean() > 3 / 17 for item in record(vit(), images(), maps))
