"""doctor: what can be measured of many families, and that what is measured fused is what is written out."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import TOY
from torch import nn

from cil.models import IncrementalViT
from locality_probe import doctor, families
from locality_probe.cli import main
from locality_probe.measures import MEASURES
from locality_probe.probe import NO_PATCHES, Probe

WHOLE = "each of its tokens is of the whole image"
# timm model: {(extent and grid + keys without a place, or the beginning of the reason): layers}
FAMILIES = {
    "coat_lite_tiny": {"its keys meet the values before the queries": 8},
    "convit_tiny": {"grid 14x14 + 0": 10, "grid 14x14 + 1": 2},
    "crossvit_tiny_240": {"grid 20x20 + 1": 3, "grid 14x14 + 1": 12, NO_PATCHES: 6},
    "davit_tiny": {"window 7x7 + 0": 5, "grid 7x7 + 0": 1, WHOLE: 6},
    "deit_tiny_distilled_patch16_224": {"grid 14x14 + 2": 12},
    "efficientformer_l1": {"grid 7x7 + 0": 1},
    "gcvit_xxtiny": {"window 7x7 + 0": 4, "grid 14x14 + 0": 6, "grid 7x7 + 0": 2},
    "maxvit_rmlp_pico_rw_256": {"window 8x8 + 0": 18, "grid 8x8 + 0": 4},
    "pit_ti_224": {"grid 27x27 + 1": 2, "grid 14x14 + 1": 6, "grid 7x7 + 1": 4},
    "pvt_v2_b0": {"grid 56x56 + 0": 2, "grid 28x28 + 0": 2, "grid 14x14 + 0": 2, "grid 7x7 + 0": 2},
    "swinv2_cr_tiny_ns_224": {"window 7x7 + 0": 10, "grid 7x7 + 0": 2},
    "twins_svt_small": {
        "window 7x7 + 0": 7, "grid 56x56 + 0": 1, "grid 28x28 + 0": 1, "grid 14x14 + 0": 5, "grid 7x7 + 0": 4,
    },
    "visformer_tiny": {"grid 14x14 + 0": 4, "grid 7x7 + 0": 4},
    "vit_tiny_r_s16_p8_224": {"grid 7x7 + 1": 12},
    "xcit_nano_12_p16_224": {WHOLE: 12, NO_PATCHES: 2},
    "mobilevit_xxs": {"window 16x16 + 0": 2, "window 8x8 + 0": 4, "window 4x4 + 0": 3},
}  # fmt: skip
SLOW_WINDOWS = ["davit_tiny", "tiny_vit_5m_224", "maxvit_rmlp_pico_rw_256"]
SLOW = [
    "mobilevit_xxs",
    "maxvit_rmlp_pico_rw_256",
    "swinv2_cr_tiny_ns_224",
    "gcvit_xxtiny",
]  # convolutions between attention: many draws of noise


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    return model, torch.randn(2, *timm.data.resolve_model_data_config(model)["input_size"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES])
def test_families(name):
    layers = doctor.examine(*built(name))
    found = Counter()
    for layer in layers:
        place = f"{layer.extent} {'x'.join(map(str, layer.grid))} + {layer.num_prefix_tokens}"
        outcome = place if layer.status == "ok" else layer.reason
        (known,) = [key for key in FAMILIES[name] if outcome.startswith(key)] or [outcome]
        found[known] += 1
    assert found == FAMILIES[name]
    assert [layer.index for layer in layers] == list(range(len(layers)))


@pytest.mark.slow
def test_what_stays_blurred_is_refused():
    """TinyViT: convolutions of 7 x 7 between attention, so that tokens see far; none of its layers is put on another grid."""
    outcomes = [
        (layer.status, layer.grid if layer.status == "ok" else layer.reason)
        for layer in doctor.examine(*built("tiny_vit_5m_224"))
    ]
    blurred = [what for status, what in outcomes if status != "ok"]
    assert {what for status, what in outcomes if status == "ok"} <= {(7, 7), (14, 14)} and len(blurred) <= 5
    assert all("at no regular places" in why for why in blurred)


UNFUSED = ["pit_ti_224"] + [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("davit_tiny", "crossvit_tiny_240", "twins_svt_small", "maxvit_rmlp_pico_rw_256")
]


@pytest.mark.parametrize("name", UNFUSED)
def test_fused_and_unfused_agree_on_every_measured_layer(name):
    model, x = built(name)
    for parameter_name, p in model.named_parameters():  # less uniform than untrained, less chaotic than `sharpen`
        p.data *= 6 if re.search(r"qkv.weight|\bq.weight|kv.weight", parameter_name) else 1
    found = []
    for fused in (True, False):
        for part in model.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused
        with Probe(model) as probe:
            probe.update(x)
        found.append(probe.result())
    hows = [{layer.how for layer in result.layers if layer.status == "ok"} for result in found]
    assert "sdpa" in hows[0] and "sdpa" not in hows[1], hows
    for layer, fused, written in zip(found[0].layers, found[0].values, found[1].values, strict=True):
        assert bool(fused) == (layer.status == "ok")
        for measure in MEASURES if fused else ():
            torch.testing.assert_close(
                fused[measure], written[measure], atol=2e-3, rtol=2e-3, equal_nan=True
            )  # networks amplify rounding


@pytest.mark.parametrize("name", ["twins_svt_small", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_WINDOWS)])
def test_tokens_of_a_window_are_neighbours_in_rows(name):
    """Which pixels a token of a window depends on, by gradients: that is where it is, one patch to the right of the last."""
    model, x = built(name)
    seen, layers = {}, doctor.examine(model, x)
    layer = next(item for item in layers if item.extent == "window")

    def hook(_, inputs):
        seen.setdefault("tokens", inputs[0])

    handle = model.get_submodule(layer.name).register_forward_pre_hook(hook)
    x.requires_grad_(True)
    model(x)
    handle.remove()
    tokens = seen["tokens"]
    tokens = tokens.flatten(1, -2) if tokens.shape[0] > 2 else tokens  # [windows, N, C], or the image before it is cut
    rows, columns = layer.grid
    if tokens.shape[0] == 2:  # Twins cuts it inside: the window's tokens are the first rows of the image
        side = round(tokens.shape[1] ** 0.5)
        tokens = tokens.unflatten(1, (side, side))[:, :rows, :columns].flatten(1, 2)
    centres = []
    for token in (0, 1, columns):
        (gradient,) = torch.autograd.grad(tokens[0, token].square().sum(), x, retain_graph=True)
        weight = gradient[0].abs().sum(0)
        weight = torch.where(weight > 0.1 * weight.max(), weight, 0.0)
        y, column = torch.meshgrid(*(torch.arange(float(n)) for n in weight.shape), indexing="ij")
        centres.append(((y * weight).sum() / weight.sum(), (column * weight).sum() / weight.sum()))
    (y0, x0), (y1, x1), (y2, x2) = centres
    assert x1 - x0 > 1.5 * abs(y1 - y0) and y2 - y0 > 1.5 * abs(x2 - x0)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_command_on_a_run_and_on_models(toy_runs):
    result = run("doctor", toy_runs / "toy")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == "toy" and lines[-1] == "2 of 3 attention layers can be measured"
    assert re.match(r"0 +blocks.0.attn +LPA +asked +4 +8x8 +0 +ok$", lines[2])
    # Broken over lines in its own column.
    told = " ".join(
        " ".join(lines[4:-1]).replace("2      task_block.attn  TaskAttention  asked  4      8x8   1", "").split()
    )
    assert told == f"skipped: {NO_PATCHES}"
    rows = json.loads(run("doctor", "timm/vit_tiny_patch16_224", "--json").output)
    assert [row["status"] for row in rows] == ["ok"] * 12 and rows[3]["grid"] == [14, 14]
    rows = json.loads(run("doctor", "timm/vit_tiny_patch16_224", "--json", "--grid", "14,14", "--prefix", 1).output)
    assert (rows[0]["grid"], rows[0]["places"]) == ([14, 14], "given")
    windows = run("doctor", "torchvision/swin_t")
    assert windows.output.endswith("12 of 12 attention layers can be measured (10 of them inside their windows)\n")


def test_command_says_what_it_cannot(tmp_path):
    assert run("doctor", "timm/xcit_nano_12_p16_224").exit_code == 1
    for arguments, code, sentence in (
        (["timm/resnet18"], 1, "ResNet has no attention layer that can be seen"),
        (["nowhere"], 1, "no model 'nowhere': give a run directory, a weights file, timm/NAME"),
        (["timm/vit_tini_patch16_224"], 2, "near: vit_tiny_patch16_224"),
        (["torchvision/vit_b_17"], 2, "torchvision has no model 'vit_b_17'; near: vit_b_16"),
        (["hf/nowhere"], 1, "nowhere is no folder with a config.json; --pretrained fetches hf/nowhere"),
        (["timm/vit_tiny_patch16_224", "--grid", "14,x"], 2, "--grid '14,x' is not ROWS,COLUMNS"),
        ([], 2, "give a MODEL"),
        (["a", "--families"], 2, "give a MODEL"),
    ):
        result = run("doctor", *arguments)
        assert result.exit_code == code and sentence in result.output and "Traceback" not in result.output


def test_matrix_is_of_this_generation_of_the_tool():
    """docs/support.md has a row for each family, and its counts are those of its rows."""
    text = (Path(__file__).parents[1] / "docs/support.md").read_text()
    rows = [
        line.split(" | ")
        for line in text.splitlines()
        if line.startswith(("| timm |", "| torchvision |", "| transformers |"))
    ]
    named = {row[2].strip("`") for row in rows}
    assert {*families.TIMM.values(), *families.TORCHVISION.values(), *(f"{name}Model" for name in families.HF)} == named
    assert len(families.TIMM) >= 50
    rows_said, layers, whole, windows, skipped = map(
        int, re.search(
            r"(\d+) families with (\d+) attention layers: (\d+) measured over the whole image or\s+sequence, (\d+) inside "
            r"their windows, (\d+) skipped", text
        ).groups()
    )  # fmt: skip
    measured = [list(map(int, row[3].split(" of "))) for row in rows if row[3] != "refused"]
    assert rows_said == len(rows) and layers == sum(n for _, n in measured) == whole + windows + skipped
    assert whole + windows == sum(n for n, _ in measured)


def test_our_own_layers_are_all_there():
    model = IncrementalViT(TOY, (8, 8))
    model.grow(2)
    layers = doctor.examine(model, torch.randn(2, 3, 8, 8))
    assert [layer.name for layer in layers] == ["blocks.0.attn", "blocks.1.attn", "task_block.attn"]
