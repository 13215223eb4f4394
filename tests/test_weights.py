"""Weights files as people have them, for one small network: the same numbers from each, or a sentence that says why not."""

import argparse
import json
import pathlib
import sys
import types

import numpy as np
import pytest
import timm
import torch
from conftest import flat, invoke
from PIL import Image
from torch import Tensor

from locality_probe.hf import preprocessing
from locality_probe.subject import from_hf, from_model_option, from_open_clip, from_timm, from_torchvision
from locality_probe.typed import Typed

NAME = "test_vit"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=5).eval()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def trunk(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


HEADS = {"head.mlp.0.weight": torch.zeros(4, 64), "head.last_layer.weight_g": torch.zeros(4, 1)}
OTHERS = {"args": argparse.Namespace(lr=0.1), "epoch": np.int64(3), "loss": np.float32(0.5), "path": pathlib.PurePosixPath("x"),
          "windows": pathlib.PureWindowsPath("c:/x"), "dtype": np.dtype("float32")}  # fmt: skip
FILES = {  # what of a state dict (with another classifier) is saved
    "the whole": lambda s: s,
    "without a classifier": trunk,
    "DataParallel": lambda s: {"state_dict": under("module.", s)},
    "compiled": lambda s: {"model": under("_orig_mod.", s)},
    "Lightning": lambda s: {"state_dict": under("backbone.", trunk(s)) | {"classifier.weight": torch.zeros(9, 64)},
                            "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 1e-3}},
    "DINO": lambda s: {"student": under("module.backbone.", {k: v + 1 for k, v in s.items()}),
                       "teacher": under("backbone.", trunk(s)) | HEADS},
    "timm's average": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "MoCo": lambda s: {"state_dict": under("module.base_encoder.", {k: v + 1 for k, v in s.items()})
                       | under("module.momentum_encoder.", trunk(s)) | {"module.predictor.0.weight": torch.zeros(2, 2)}},
    "MAE": lambda s: {"model": trunk(s) | {"decoder_blocks.0.norm1.weight": torch.zeros(3), "mask_token": torch.zeros(3)}},
    "a tower": lambda s: under("visual.trunk.", trunk(s)) | {"text.token_embedding.weight": torch.zeros(3, 3)},
    "much beside it": lambda s: {"model": s, **OTHERS},
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_what_people_have_is_read(case, network, tmp_path):
    torch.save(FILES[case](network.state_dict()), tmp_path / "weights.pth")
    subject = from_timm(NAME, tmp_path / "weights.pth")
    for name, tensor in subject.model.state_dict().items():
        if not name.startswith("head."):
            torch.testing.assert_close(tensor, network.state_dict()[name], atol=2e-3, rtol=2e-3)
    said = " ".join(subject.notes)
    for word in {"DINO": ["'teacher'", "'backbone.'"], "Lightning": ["'backbone.'"], "MoCo": ["momentum_encoder"],
                 "timm's average": ["'state_dict_ema'"], "the whole": ["head is left out"]}.get(case, []):  # fmt: skip
        assert word in said, said


def test_it_is_made_at_the_size_of_the_files_position_embedding(tmp_path):
    torch.save(timm.create_model(NAME, img_size=64, num_classes=0).state_dict(), tmp_path / "w.pth")
    subject = from_timm(NAME, tmp_path / "w.pth")
    assert subject.model.patch_embed.img_size == (64, 64) and "images of 64 pixels" in " ".join(subject.notes)
    from PIL import Image

    assert subject.preprocess(Image.new("RGB", (90, 70))).shape == (3, 64, 64)


WRONG = {
    "no block": (lambda s: {k: v for k, v in s.items() if "blocks.1." not in k}, r"at 12 of \d+ tensors of its trunk"),
    "another width": (lambda s: trunk(s) | {"norm.weight": torch.zeros(7)}, r"at 1 of \d+ .*norm.weight: \(7,\) in the file"),
    "whole numbers": (lambda s: s | {"norm.weight": torch.ones(64).int()}, "norm.weight as int32: save it as float32"),
    "complex": (lambda s: s | {"norm.weight": torch.ones(64, dtype=torch.complex64)}, "norm.weight as complex64"),
    "eight bits": (lambda s: s | {"norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}, "norm.weight as float8_e4m3fn"),
    "sparse": (lambda s: s | {"norm.weight": torch.ones(64).to_sparse()}, "norm.weight as sparse_coo"),
    "not finite": (lambda s: s | {"norm.weight": torch.full((64,), torch.nan)}, "NaN or infinite values in norm.weight"),
    "another network": (lambda s: timm.create_model("test_resnet").state_dict(), "does not fit the model"),
    "no weights": (lambda s: {"epoch": 3}, "holds no state dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case, network, tmp_path):
    make, sentence = WRONG[case]
    torch.save(make(network.state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=sentence):
        from_timm(NAME, tmp_path / "weights.pth")


def test_the_command_says_what_was_read(network, tmp_path):
    torch.save({"teacher": under("backbone.", trunk(network.state_dict()))}, tmp_path / "weights.pth")
    result = invoke("doctor", f"timm/{NAME}", "--weights", tmp_path / "weights.pth")
    assert result.exit_code == 0 and "weights under 'teacher' are read" in flat(result.output)


# Folders of HuggingFace ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
    return transformers.ViTModel(transformers.ViTConfig(**size, image_size=64, patch_size=16))


def test_a_folder_without_a_tensor_is_no_random_layer(hf_model, tmp_path):
    from safetensors.torch import load_file, save_file

    hf_model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    state = load_file(file)
    gone = next(name for name in state if "attention" in name)
    save_file({k: v for k, v in state.items() if k != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of its model, like .*attention.*, which would be random"):
        from_hf(str(tmp_path / "m"))
    save_file(state | {gone: state[gone] * torch.nan}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinite values"):
        from_hf(str(tmp_path / "m"))


def test_a_folder_without_a_processor_says_what_is_done(hf_model, tmp_path):
    hf_model.save_pretrained(tmp_path / "m")
    (note,) = from_hf(str(tmp_path / "m")).notes
    assert note.startswith(
        "m has no preprocessor_config.json: images are scaled to 64 x 64 and normalised with ImageNet's"
    )


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_images_are_taken_as_the_processor_does(file, tmp_path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    for settings in (
        {
            "size": {"shortest_edge": 40},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True,
            "resample": 3,
        },
        {"size": {"height": 32, "width": 48}, "do_center_crop": False, "resample": 2},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_rescale": False},
    ):
        processor = transformers.CLIPImageProcessorPil(**settings) if hasattr(transformers, "CLIPImageProcessorPil") else (
            transformers.CLIPImageProcessor(**settings))  # fmt: skip
        given = json.loads(processor.to_json_string())
        (tmp_path / file).write_text(json.dumps({"image_processor": given} if file.startswith("processor") else given))
        how = preprocessing(tmp_path, None)
        pixels = torch.from_numpy(np.asarray(how.crop(picture)).copy()).permute(2, 0, 1) / 255
        mine = (pixels - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None]
        theirs = processor(picture, return_tensors="pt")["pixel_values"][0].float()
        assert mine.shape == theirs.shape
        scale = (theirs.max() - theirs.min()).item()
        assert (mine - theirs).abs().mean() < 0.01 * scale, settings


# open_clip and peft, which tests do without: their names and doors, as far as they are used here ---------------------------


class Tower(torch.nn.Module):
    """An image tower with what open_clip's have."""

    image_size, image_mean, image_std = 32, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.trunk = timm.create_model(NAME, img_size=32, num_classes=0)

    def forward(self, x):
        return self.trunk(x)


def test_open_clip_models_are_their_image_towers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match="needs the package open_clip_torch: pip install open_clip_torch"):
        from_open_clip("ViT-B-32")
    made = types.SimpleNamespace(
        list_models=lambda: ["ViT-B-32"], list_pretrained_tags_by_model=lambda name: [],
        create_model=lambda name, pretrained=None: types.SimpleNamespace(visual=Tower()), OPENAI_DATASET_MEAN=(0.5,) * 3,
        OPENAI_DATASET_STD=(0.5,) * 3,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "open_clip", made)
    with pytest.raises(Typed, match="open_clip has no model 'ViT-B-33'; near: ViT-B-32"):
        from_open_clip("ViT-B-33")
    with pytest.raises(ValueError, match="no pretrained weights of ViT-B-32"):
        from_open_clip("ViT-B-32", pretrained=True)
    tower = Tower()
    torch.save({"state_dict": under("module.visual.", tower.state_dict())}, tmp_path / "w.pt")
    subject = from_open_clip("ViT-B-32", tmp_path / "w.pt")
    assert subject.mean == (0.1, 0.2, 0.3) and "'module.visual.'" in subject.notes[0]
    assert all(torch.equal(a, b) for a, b in zip(subject.model.parameters(), tower.parameters(), strict=True))
    said = []
    named = from_model_option(f"open_clip/ViT-B-32:{tmp_path / 'w.pt'}", None, False, said.append)
    assert named.run == "ViT-B-32" and not any("untrained" in sentence for sentence in said)
    assert all(torch.equal(a, b) for a, b in zip(named.model.parameters(), tower.parameters(), strict=True))
    with pytest.raises(Typed, match="leave --weights away"):
        from_open_clip("ViT-B-32:w.pt", tmp_path / "w.pt")


def test_image_size_makes_the_network_for_images_of_that_size(tmp_path):
    subject = from_timm(NAME, image_size=48)
    assert subject.model.patch_embed.img_size == (48, 48)
    assert subject.preprocess(Image.new("RGB", (60, 80))).shape == (3, 48, 48)
    torch.save(timm.create_model(NAME, num_classes=0).state_dict(), tmp_path / "w.pth")
    resampled = from_timm(NAME, tmp_path / "w.pth", image_size=48)  # as timm resamples the position embedding of a file
    expected = timm.create_model(NAME, num_classes=0)
    expected.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    expected.set_input_size(img_size=(48, 48))
    assert torch.equal(resampled.model.pos_embed, expected.pos_embed)

    tv = from_torchvision("vit_b_16", image_size=64)
    assert tv.model.image_size == 64 and tv.preprocess(Image.new("RGB", (60, 80))).shape == (3, 64, 64)
    with pytest.raises(ValueError, match=r"resnet18 cannot be made: .*img_size"):
        from_timm("resnet18", image_size=64)
    with pytest.raises(Typed, match="--image-size does not go with hf/"):
        from_model_option("hf/folder", None, False, print, 64)


def test_an_adapters_folder_is_its_base_with_the_adapter(hf_model, tmp_path, monkeypatch):
    hf_model.save_pretrained(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="which needs the package peft: pip install peft"):
        from_hf(str(tmp_path / "lora"))

    def with_adapter(model, folder):
        model.adapter = folder
        return model

    loader = types.SimpleNamespace(from_pretrained=with_adapter)
    monkeypatch.setitem(sys.modules, "peft", types.SimpleNamespace(PeftModel=loader))
    subject = from_hf(str(tmp_path / "lora"))
    assert subject.run == "lora" and subject.model.adapter == str(tmp_path / "lora")
    assert "is an adapter of" in subject.notes[-1]
