"""The command heatmap: what is drawn is the attention, of several checkpoints, for any image, in any format."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import run_ok
from PIL import Image
from safetensors.torch import save_file

from cil import data
from cil.augment import normalize
from cil.checkpoint import open_run
from locality_probe.record import record

pytestmark = pytest.mark.usefixtures("here")


def maps_of(name):
    with np.load(name) as arrays:
        return {key: arrays[key] for key in arrays.files}


def every_attention(model, x):
    """Attention [H, Q, K] of each layer for one image, as `record` sees it."""
    return [item.values["all"][0].numpy() for item in record(model, x, lambda attention, layer: {"all": attention})]


@pytest.mark.parametrize(
    ("options", "shape", "columns"),
    [
        ([], (1, 2), ["layer 0", "layer 1"]),
        (["--layer", "1"], (1, 1), ["toy"]),
        (["--head", "all", "--scale", "each"], (2, 4), ["head 0", "head 1", "head 2", "head 3"]),
        (["--query", "cls"], (1, 1), ["toy"]),
    ],
)
def test_heatmap_options(runs, picture, options, shape, columns):
    run_ok("heatmap", picture, "--ckpt", "runs/toy", *options, "-o", "out.png")
    found = maps_of("out.npz")
    assert found["maps"].shape == (*shape, 8, 8) and found["columns"].tolist() == columns
    assert found["image"].shape == (8, 8, 3) and "query: " in str(found["title"])


@pytest.mark.parametrize(
    ("query", "layer", "head"), [("3,4", 1, "2"), ("mean", 0, "mean"), ("cls", 2, "1"), ("0,7", 1, "mean")]
)
def test_heatmap_is_the_attention(runs, picture, query, layer, head):
    options = ["--layer", layer, "--head", head, "--query", query]
    run_ok("heatmap", picture, "--ckpt", "runs/toy:1", *options, "-o", "out.png")
    directory = open_run("runs/toy")
    seen = data.cover(Image.open(picture), (8, 8))
    x = normalize(data.to_tensor(seen)[None], directory.mean, directory.std)
    attention = every_attention(directory.model(1), x)[layer]
    attention = attention.mean(0) if head == "mean" else attention[int(head)]
    if query == "cls":
        expected = attention[-1, 1:]  # the token looks at itself and the patches
    elif query == "mean":
        expected = attention.mean(0)
    else:
        row, column = map(int, query.split(","))
        expected = attention[row * 8 + column]
    found = maps_of("out.npz")
    np.testing.assert_allclose(found["maps"].reshape(-1), expected, atol=1e-6)
    assert (found["image"] == np.asarray(seen)).all()


def test_heatmap_of_several_checkpoints(runs, picture):
    specs = ["--ckpt", "runs/toy:init", "--ckpt", "runs/toy:all", "--ckpt", "runs/toy-joint:2"]
    result = run_ok("heatmap", picture, *specs, "--layer", 1, "-o", "new/folder/out.svg")
    assert result.stdout == "wrote new/folder/out.svg and new/folder/out.npz\n" and result.stderr == ""
    found = maps_of("new/folder/out.npz")
    assert found["columns"].tolist() == ["task init", "task 0", "task 1", "task 2"]
    assert found["rows"].tolist() == ["toy", "toy-joint"]
    there = ~np.isnan(found["maps"]).all((2, 3))
    assert there.tolist() == [[True] * 4, [False] * 3 + [True]]
    np.testing.assert_allclose(found["maps"].sum((2, 3))[there], 1, atol=1e-5)


def test_heatmap_takes_any_image_and_writes_any_format(runs):
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 31, 3), dtype=np.uint8))
    images = {
        "photo.jpg": colour,
        "alpha.png": colour.convert("RGBA"),
        "grey.jpeg": colour.convert("L"),
        "palette.gif": colour.convert("P"),
        "transparent.png": colour.convert("P"),
        "sixteen.png": Image.fromarray(rng.integers(0, 65536, (20, 31), dtype=np.uint16)),
        "tiny.bmp": colour.crop((0, 0, 1, 1)),
        "flat.webp": colour.resize((300, 2)),
        "large.png": Image.new("RGB", (3000, 2000), "teal"),
    }
    formats = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}
    for place, (name, image) in enumerate(images.items()):
        image.save(name, **({"transparency": bytes(range(256))} if name == "transparent.png" else {}))
        suffix, begin = list(formats.items())[place % 4]
        result = run_ok("heatmap", name, "--ckpt", "runs/toy", "--layer", 0, "-o", f"out_{place}{suffix}")
        assert result.stderr == "" and Path(f"out_{place}{suffix}").read_bytes().startswith(begin)
        assert maps_of(f"out_{place}.npz")["maps"].shape == (1, 1, 8, 8)


def test_heatmap_uses_the_newest_run(runs, picture):
    shutil.copytree("runs/toy", "runs/deeper/newest")
    for task, age in ((0, 1e6), (1, 2e6), (2, 3e6)):  # the copy is older in all but one
        os.utime(f"runs/toy/task_0{task}.safetensors", (age, age))
        os.utime(f"runs/toy-joint/task_0{task}.safetensors", (age, age))
        os.utime(f"runs/deeper/newest/task_0{task}.safetensors", (age / 2, age / 2))
    os.utime("runs/deeper/newest/task_01.safetensors", (4e6, 4e6))
    result = run_ok("heatmap", picture)
    assert result.stdout == "wrote picture_heatmap.png and picture_heatmap.npz\n"
    assert str(maps_of("picture_heatmap.npz")["title"]).startswith("newest, task 2, ")


def test_heatmap_of_a_timm_model(picture):
    torch.manual_seed(3)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), "w.safetensors")
    options = ["--weights", "w.safetensors", "--query", "cls", "--layer", 2, "--head", "all"]
    result = run_ok("heatmap", picture, "--model", "timm/test_vit", *options, "-o", "out.pdf")
    assert result.stderr == ""
    found = maps_of("out.npz")
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    attention = every_attention(model, transform(Image.open(picture))[None])[2]
    np.testing.assert_allclose(found["maps"][0].reshape(len(attention), -1), attention[:, 0, 1:], atol=1e-5)
    untrained = run_ok("heatmap", picture, "--model", "timm/test_vit", "--layer", 0, "--query", "1,2")
    assert "test_vit is untrained" in untrained.stderr and "Error" not in untrained.stderr
