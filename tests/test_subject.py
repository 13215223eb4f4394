"""Models from elsewhere: HuggingFace folders, torchvision, and what the trainers of ConViT and its kin save."""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_ok
from networks import sharpen
from PIL import Image
from timm.models.convit import ConVit

from locality_probe.measures import nonlocality
from locality_probe.subject import from_file, from_hf, from_model_option
from locality_probe.tables import LAYERS, NONLOCALITY

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 48,
        "patch_size": 16}  # fmt: skip
HF = {  # configuration in transformers: (settings, prefix tokens)
    "ViT": ({}, 1), "DeiT": ({}, 2), "Dinov2": ({}, 1), "Dinov2WithRegisters": ({"num_register_tokens": 3}, 4),
    "Beit": ({}, 1), "CLIPVision": ({}, 1), "SiglipVision": ({}, 0), "DINOv3ViT": ({"num_register_tokens": 2}, 3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def pictures(here):
    Path("pictures").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{i}.png")
    return "pictures"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", HF)
def test_huggingface_folders(name, attention, pictures):
    """As save_pretrained wrote them; against the maps that the library itself gives when asked."""
    transformers = pytest.importorskip("transformers")
    settings, prefix = HF[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**TINY, **settings))
    sharpen(model)
    for parameter_name, p in model.named_parameters():
        if any(part in parameter_name for part in ("query", "key", "q_lin", "k_lin")):
            p.data = 0.5 * torch.randn(p.shape)
    model.config._attn_implementation = attention
    model.save_pretrained("saved")
    config = json.loads(Path("saved/config.json").read_text())
    Path("saved/config.json").write_text(json.dumps(config | {"attn_implementation": attention}))
    Path("saved/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    run_ok("measure", "--model", "hf/saved", "--images", pictures, "--out", "out")
    rows = NONLOCALITY.read("out/nonlocality.csv")
    layers = LAYERS.read("out/layers.csv")
    between = layers[layers["status"] == "ok"]
    assert len(between) == 2 and set(between["num_prefix_tokens"]) == {prefix} and set(rows["run"]) == {"saved"}
    assert set(between["grid_rows"]) == {3}

    subject = from_hf("saved")
    subject.model.set_attn_implementation("eager")
    x = torch.stack([subject.preprocess(Image.open(f"pictures/{i}.png")) for i in range(3)])
    assert x.abs().max() <= 2.0 + 1e-6  # (1 - .5) / .25: the folder's own mean and std
    with torch.no_grad():
        attentions = subject.model(x, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        expected = nonlocality(weights, (3, 3), prefix)[0].mean(0)
        np.testing.assert_allclose(rows[rows["layer"] == layer]["d_loc"], expected, rtol=1e-4)


def test_clip_is_its_vision_tower(pictures):
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=TINY, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained("clip")
    run_ok("measure", "--model", "hf/clip", "--images", pictures, "--out", "out")
    assert len(NONLOCALITY.read("out/nonlocality.csv")) == 2 * 2


def test_text_is_for_python(here):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2Model(config).save_pretrained("text")
    with pytest.raises(
        ValueError, match=r"text takes input_ids, not images: measure it in Python, Probe\(model, grid="
    ):
        from_hf("text")


def test_pickled_huggingface_weights_are_not_read(here):
    transformers = pytest.importorskip("transformers")
    transformers.ViTModel(transformers.ViTConfig(**TINY)).save_pretrained("saved")
    Path("saved/model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, "saved/pytorch_model.bin")
    with pytest.raises(ValueError, match="saved cannot be made: "):
        from_hf("saved")


def test_torchvision_model(pictures):
    subject = from_model_option("torchvision/vit_b_32", None, False, lambda sentence: None)
    assert subject.preprocess(Image.open("pictures/0.png")).shape == (3, 224, 224)
    torch.save(subject.model.state_dict(), "weights.pth")
    for line in (("--weights", "weights.pth"), ()):
        run_ok("measure", "--model", "torchvision/vit_b_32", *line, "--images", pictures, "--out", "out", "--force")
        table = NONLOCALITY.read("out/nonlocality.csv")
        assert len(table) == 12 * 12 and table["d_uniform"].iloc[0] == pytest.approx(3.609465, abs=1e-6)


def convit(**options) -> ConVit:
    model = ConVit(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4, local_up_to_layer=2, num_classes=5, **options
    )
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model.eval()


@pytest.mark.parametrize("nest", ["state", "model", "ddp"])
def test_checkpoints_of_convits_trainer(nest, here):
    """Arguments and all, as it saves them; the architecture comes from the shapes."""
    model = convit(qkv_bias=nest == "ddp", mlp_ratio=2.0)
    state = model.state_dict()
    content = {
        "state": state,
        "model": {"model": state, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1},
                  "args": argparse.Namespace(lr=0.1, output_dir=Path("out"), model="convit")},
        "ddp": {"state_dict": {f"module.{name}": x for name, x in state.items()}},
    }[nest]  # fmt: skip
    torch.save(content, "checkpoint.pth")
    x = torch.randn(4, 3, 32, 32)
    np.save("x.npy", x.numpy())
    subject = from_file(Path("checkpoint.pth"))
    with torch.no_grad():
        torch.testing.assert_close(subject.model(x), model(x))
    run_ok("measure", "checkpoint.pth", "--images", "x.npy", "--out", "out")
    rows = pd.read_csv("out/nonlocality.csv")
    assert rows.groupby("layer")["kind"].first().tolist() == ["GPSA", "GPSA", "MHSA"]
    gate = model.blocks[1].attn.gating_param.sigmoid().tolist()
    assert rows[rows["layer"] == 1]["gate"].tolist() == pytest.approx(gate)


def test_weights_of_other_networks_are_told_where_to_go(here):
    import timm

    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), "vit.pth")
    with pytest.raises(ValueError, match="as in --model timm/NAME --weights FILE"):
        from_file(Path("vit.pth"))
