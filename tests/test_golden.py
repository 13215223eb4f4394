"""Outputs of the released implementations on the same inputs and weights (tests/golden)."""

import pytest
import torch
from conftest import GOLDEN, golden

from cil import foreign, losses
from cil.attention import GPSA, LPA
from cil.memory import herd
from locality_probe.measures import nonlocality
from locality_probe.record import record

ATTENTION = ["lpa_attention_a", "lpa_attention_b", "lpa_attention_init", "gpsa_attention_a", "gpsa_attention_init"]
MODELS = ["model_raw_gpsa", "model_raw_lpa", "model_dytox_gpsa", "model_dytox_lpa"]


def layer_and_arrays(name):
    z = golden(name)
    side, heads, dim = int(z["grid"]), int(z["heads"]), z["x"].shape[-1]
    layer = (LPA if name.startswith("lpa") else GPSA)(dim, heads, (side, side), qkv_bias="qk_bias" in z)
    ours = {"qk.weight": "qk_weight", "qk.bias": "qk_bias", "v.weight": "v_weight", "v.bias": "v_bias",
            "proj.weight": "proj_weight", "proj.bias": "proj_bias", "pos_bias": "pos_bias", "gate": "gate"}  # fmt: skip
    state = {k: z[v] for k, v in ours.items() if v in z} | {"pos_weight": z["pos_weight"][:, :3]}
    if isinstance(layer, LPA):
        state["content_scale"] = z["pos_weight"][:, 3]
    return layer, state, z


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("gradients", [False, True])  # two formulations: fused, and written out for training on a CPU
def test_attention_layer(name, gradients):
    layer, state, z = layer_and_arrays(name)
    layer.load_state_dict(state)
    with torch.set_grad_enabled(gradients):
        y, attention = layer(z["x"]), layer.attention_map(z["x"])
    torch.testing.assert_close(y, z["y"], atol=1e-5, rtol=0)
    torch.testing.assert_close(attention, z["attention"], atol=1e-5, rtol=0)
    d_loc, prefix = nonlocality(attention, layer.grid)
    torch.testing.assert_close(d_loc.mean(0).float(), z["nonlocality_per_head"], rtol=1e-5, atol=0)
    assert prefix.abs().max() == 0


@pytest.mark.parametrize("name", ATTENTION)
def test_local_initialisation(name):
    layer, _, z = layer_and_arrays(name)
    local = int(int(z["heads"]) ** 0.5) ** 2
    torch.testing.assert_close(
        layer.pos_weight[:local].detach(), z["initial_pos_weight"][:local, :3], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", MODELS)
def test_whole_model_under_released_names(name):
    z = golden(name)
    model, _ = foreign.read({k[2:]: v for k, v in z.items() if k.startswith("w.")}, GOLDEN / name)
    with torch.no_grad():
        features = model.forward_features(z["x"])
    torch.testing.assert_close(features, z["features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.forward_head(features), z["logits"], atol=1e-5, rtol=0)
    assert sum("content_scale" in n for n, _ in model.named_parameters()) == int(z["num_lpsa"])

    def measure(attention, layer):
        return {"d": nonlocality(attention, layer.grid)[0]} if layer.between_patches else {}

    recorded = [item for item in record(model, z["x"], measure) if item.values]
    d_loc = torch.stack([item.values["d"].mean(0) for item in recorded]).float()
    torch.testing.assert_close(d_loc, z["nonlocality"], rtol=1e-5, atol=0)


def test_losses():
    z = golden("losses")
    old = z["tasks"] < z["task_id"]
    classification, kd = losses.auto_kd(
        z["logits"], z["targets"], z["old_logits"], old.nonzero().squeeze(1), float(z["tau"])
    )
    torch.testing.assert_close(losses.classification(z["logits"], z["targets"]), z["bce"], atol=1e-6, rtol=0)
    torch.testing.assert_close(classification, z["cls_after_auto_kd"], atol=1e-6, rtol=0)
    torch.testing.assert_close(kd, z["kd"], atol=1e-6, rtol=0)
    num_old = z["old_logits"].shape[1]
    div = float(z["div_factor"]) * losses.divergence(z["div_logits"], z["targets"], num_old)
    torch.testing.assert_close(div.float(), z["div"], atol=1e-6, rtol=0)


def test_herding():
    z = golden("herding")
    assert herd(z["features"], int(z["budget"])) == z["selected"].tolist()
