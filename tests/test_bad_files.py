"""Files that are not right are named in one sentence, with exit code 1, and nothing is left half-written."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, beyond_recipe, golden, refused, settings
from PIL import Image
from safetensors.torch import load_file, save_file

from cil import resume
from cil.checkpoint import open_run
from cil.run import FORMAT

pytestmark = pytest.mark.usefixtures("here")


class Bomb:
    """Unpickled, it leaves the file `exploded`."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def arrays(shape=(4, 3, 8, 8), dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_run_without_a_finished_task(runs, picture):
    for weights in Path("runs/toy").glob("task_*"):
        weights.unlink()
    refused("measure", "runs/toy", names="runs/toy has no finished task yet")
    refused("heatmap", picture, "--ckpt", "runs/toy", names="runs/toy has no finished task yet")
    refused("heatmap", picture, "--ckpt", "runs/toy:all", names="runs/toy has no finished task yet")


def test_two_runs_of_one_name(runs, picture):
    shutil.copytree("runs/toy", "other/toy")
    refused("measure", "runs/toy", "other/toy", names=["toy", "runs/toy", "other/toy"])
    refused("heatmap", picture, "--ckpt", "runs/toy", "--ckpt", "other/toy", names=["toy", "task 2"])


@pytest.mark.parametrize("length", [0, 1, 8, 100, 5000, -1])
def test_truncated_weights_of_a_run(runs, picture, length):
    path = Path("runs/toy/task_01.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    refused("measure", "runs/toy", "--n", 1, "--out", "out", names=[path, "truncated"])
    refused("measure", path, "--n", 1, names=[path, "truncated"])
    refused("heatmap", picture, "--ckpt", "runs/toy:1", names=[path, "truncated"])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda state: state["blocks.0.mlp.fc1.weight"].view(-1)[7:8].fill_(float("nan")), "NaN or infinite"),
        (lambda state: state["pos_embed"].fill_(float("inf")), ["NaN or infinite", "pos_embed"]),
        (lambda state: state.pop("pos_embed"), ["does not fit", "pos_embed: missing in the file"]),
        (lambda state: state.update(stranger=torch.zeros(2)), ["does not fit", "stranger"]),
        (lambda state: state.update(pos_embed=torch.zeros(1, 9, 24)), ["pos_embed", "(1, 9, 24)", "(1, 64, 24)"]),
    ],
)
def test_weights_of_a_run_that_are_not_its_own(runs, picture, change, names):
    path = Path("runs/toy/task_01.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path)
    names = [path, *([names] if isinstance(names, str) else names)]
    refused("measure", "runs/toy", "--n", 1, names=names)
    refused("heatmap", picture, "--ckpt", "runs/toy:1", names=names)


def test_finite_weights_that_overflow(runs, picture):
    path = Path("runs/toy/task_01.safetensors")
    save_file({k: v * 1e25 if ".qk." in k or ".norm" in k else v for k, v in load_file(path).items()}, path)
    refused("measure", "runs/toy", "--n", 1, names=["toy", "not finite"])
    refused("heatmap", picture, "--ckpt", "runs/toy:1", names=["layer 0", "toy", "not finite"])


def test_weights_file_that_is_no_task_of_the_run(runs):
    shutil.copy("runs/toy/task_01.safetensors", "runs/toy/best.safetensors")
    refused("measure", "runs/toy/best.safetensors", names=["best.safetensors", "[0, 1, 2]"])
    shutil.copy("runs/toy/task_01.safetensors", "alone.safetensors")
    refused("measure", "alone.safetensors", names=["alone.safetensors", "--images"])


def without(values, key):
    return {k: v for k, v in values.items() if k != key}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda run: "", "damaged"),
        (lambda run: json.dumps(run)[:300], "damaged"),
        (lambda run: "\0\0\0", "damaged"),
        (lambda run: [], "damaged"),
        (lambda run: {}, "damaged"),
        (lambda run: without(run, "format"), "damaged"),
        (lambda run: run | {"format": FORMAT + 1}, [f"format {FORMAT + 1}", f"formats 1 to {FORMAT}"]),
        (lambda run: run | {"format": None}, "format None"),
        (lambda run: without(run, "classes"), "lacks classes"),
        (lambda run: without(run, "run"), "lacks run"),
        (lambda run: run | {"surprise": 1}, "unknown surprise"),
        (lambda run: run | {"run": without(run["run"], "kd_tau")}, "kd_tau"),
        (lambda run: run | {"run": run["run"] | {"surprise": 1}}, "surprise"),
        (lambda run: run | {"run": run["run"] | {"method": "icarl"}}, "method='icarl'"),
        (lambda run: run | {"run": run["run"] | {"scenario": "foo"}}, "'foo'"),
        (lambda run: run | {"image_size": 8}, "does not fit this version"),
    ],
)
def test_run_json(runs, picture, toy, change, names):
    path = Path("runs/toy/run.json")
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    names = ["runs/toy", *([names] if isinstance(names, str) else names)]
    refused("measure", "runs/toy", names=names)
    refused("heatmap", picture, "--ckpt", "runs/toy", names=names)
    refused("train", "demo-baseline", *settings(beyond_recipe(toy)), "--out", "runs/toy", names=names)


def test_resume_state_that_is_torn_counts_as_none(runs):
    directory = open_run("runs/toy")
    whole_state = dict.fromkeys(resume.KEYS, 0) | {"task": 1, "model": {"weight": torch.zeros(100)}}
    for step in (5, 6, 7):
        resume.save(directory, step, whole_state | {"step": step})
    path, previous = resume.states(directory)  # the last two are kept
    assert (path.stem, previous.stem) == ("000000007", "000000006")
    whole = path.read_bytes()
    assert resume.load(directory, 1)["step"] == 7 and resume.load(directory, 0) is None
    flipped = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    for torn in (b"", b"\0", b"junk", whole[:100], whole[:-1], flipped):
        path.write_bytes(torn)
        assert resume.load(directory, 1)["step"] == 6
    previous.write_bytes(b"junk")
    assert resume.load(directory, 1) is None
    resume.save(directory, 5, whole_state | {"step": 5})  # anew from before the torn ones, which must not push it out
    assert resume.load(directory, 1)["step"] == 5 and [p.stem for p in resume.states(directory)] == ["000000005"]


# foreign weights


@pytest.fixture
def released(here):
    """Weights under the released names; released.npy is an input."""
    z = golden("model_raw_lpa")
    np.save("released.npy", z["x"].numpy())
    return {k[2:]: v for k, v in z.items() if k.startswith("w.")}


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_truncated_pth(released, length):
    torch.save(released, "w.pth")
    Path("w.pth").write_bytes(Path("w.pth").read_bytes()[:length])
    refused("measure", "w.pth", "--images", "released.npy", names="w.pth")
    refused("measure", "--model", "timm/test_vit", "--weights", "w.pth", names="w.pth")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("content", [lambda w: Bomb(), lambda w: {"model": w, "args": Bomb()}, lambda w: [w, Bomb()]])
def test_pth_that_would_run_code(released, content, protocol):
    torch.save(content(released), "w.pth", pickle_protocol=protocol)
    refused("measure", "w.pth", "--images", "released.npy", names=["w.pth", "run code"])
    refused("measure", "--model", "timm/test_vit", "--weights", "w.pth", names=["w.pth", "run code"])
    Path("w.pth").write_bytes(pickle.dumps(content(released), protocol=protocol))
    refused("measure", "w.pth", "--images", "released.npy", names=["w.pth", "run code"])
    assert not Path("exploded").exists()
    pickle.loads(Path("w.pth").read_bytes())
    assert Path("exploded").exists()  # it was live


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda w: [w], "no state dict"),
        (lambda w: {}, "no state dict"),
        (lambda w: torch.zeros(3), "no state dict"),
        (lambda w: {1: torch.zeros(3)}, "no state dict"),
        (lambda w: {"fc.weight": torch.zeros(3, 3)}, "does not hold the weights of"),
        (lambda w: without(w, "pos_embed"), "does not hold the weights of"),
        (lambda w: without(w, "sabs.0.mlp.fc1.weight"), "does not hold the weights of"),
        (lambda w: w | {"sabs.0.attn.pos_proj.weight": torch.zeros(4)}, "does not hold the weights of"),
        (lambda w: w | {"pos_embed": torch.zeros(7)}, "does not hold the weights of"),
        (lambda w: w | {"pos_embed": torch.zeros(1, 7, 32)}, ["does not fit", "pos_embed"]),
        (lambda w: without(w, "head.0.norm.weight"), ["does not fit", "heads.0.norm.weight"]),
        (lambda w: w | {"pos_embed": torch.full((1, 64, 32), float("nan"))}, ["NaN", "pos_embed"]),
    ],
)
def test_pth_with_other_weights(released, change, names):
    torch.save(change(released), "w.pth")
    names = ["w.pth", *([names] if isinstance(names, str) else names)]
    refused("measure", "w.pth", "--images", "released.npy", names=names)


def test_timm_weights_that_are_not_finite(here):
    state = timm.create_model("test_vit").state_dict()
    state["norm.weight"][0] = float("nan")
    save_file(state, "w.safetensors")
    refused("measure", "--model", "timm/test_vit", "--weights", "w.safetensors", names=["w.safetensors", "norm.weight"])


# images


PNG = "not an image that Pillow can read"


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", None])
def test_image_that_is_no_image(runs, content):
    Image.effect_noise((60, 60), 50).save("whole.png")
    Path("folder").mkdir()
    Path("folder/bad.png").write_bytes(Path("whole.png").read_bytes()[:900] if content is None else content)
    refused("heatmap", "folder/bad.png", "--ckpt", "runs/toy", names=["folder/bad.png", PNG])
    shutil.copy("whole.png", "folder/good.png")
    refused("measure", "runs/toy", "--images", "folder", names=["folder/bad.png", PNG])


def test_image_beyond_pillows_limit(runs, picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused("heatmap", picture, "--ckpt", "runs/toy", names=["picture.png", "200 pixels"])


def test_pixels_without_a_range(runs):
    Image.fromarray(np.random.default_rng(0).random((9, 9), dtype=np.float32)).save("float.tiff")
    refused("heatmap", "float.tiff", "--ckpt", "runs/toy", names=["float.tiff", "32 bits"])


def test_folder_without_images(runs):
    Path("folder/class").mkdir(parents=True)
    Path("folder/notes.txt").touch()
    Image.new("RGB", (8, 8)).save("folder/class/0.png")
    refused("measure", "runs/toy", "--images", "folder", names="no image files in folder")


def with_value(value):
    x = arrays(dtype=np.float64)
    x[2, 0, 1, 1] = value
    return x


@pytest.mark.parametrize(
    ("array", "names"),
    [
        (with_value(np.nan), ["NaN", "image 2"]),
        (with_value(np.inf), ["infinite", "image 2"]),
        (with_value(1e300), ["infinite", "image 2"]),  # as the network would see it
        (arrays(dtype=np.int64), "int64"),
        ((arrays() > 0).astype(np.uint8), "uint8"),
        (arrays()[0], "(3, 8, 8)"),
        (arrays()[:, :1], "(4, 1, 8, 8)"),
        (arrays((4, 8, 8, 3)), "(4, 8, 8, 3)"),
        (arrays()[:0], "no images in x.npy"),
        (arrays((4, 3, 10, 10)), ["10x10", "toy"]),
        (arrays((4, 3, 8, 0)), ["8x0", "toy"]),
        (np.array([Bomb(), 1], dtype=object), "Python objects"),
    ],
)
@pytest.mark.parametrize("file", ["x.npy", "x.npz"])
def test_arrays_that_are_no_images(runs, array, names, file):
    np.save(file, array, allow_pickle=True) if file == "x.npy" else np.savez(file, images=array)
    names = [names] if isinstance(names, str) else names
    names = names if any("toy" in n for n in names) else [file, *(n.replace("x.npy", file) for n in names)]
    refused("measure", "runs/toy", "--images", file, "--task", 0, names=names)


@pytest.mark.parametrize("file", ["x.npy", "x.npz"])
@pytest.mark.parametrize("length", [0, 3, 50, 200, -1])
def test_torn_arrays(runs, file, length):
    np.save(file, arrays()) if file == "x.npy" else np.savez_compressed(file, images=arrays())
    Path(file).write_bytes(Path(file).read_bytes()[:length])
    refused("measure", "runs/toy", "--images", file, names=file)


def test_npz_that_is_damaged_inside_or_holds_something_else(runs):
    np.savez_compressed("x.npz", images=arrays())
    content = bytearray(Path("x.npz").read_bytes())
    content[len(content) // 2] ^= 255
    Path("x.npz").write_bytes(content)
    refused("measure", "runs/toy", "--images", "x.npz", names="x.npz")
    np.savez("x.npz", a=arrays(), b=arrays())
    refused("measure", "runs/toy", "--images", "x.npz", names=["x.npz", "a, b"])
    np.savez("x.npz")
    refused("measure", "runs/toy", "--images", "x.npz", names=["x.npz", "nothing"])
    Path("x.npy").write_bytes(pickle.dumps(Bomb()))
    refused("measure", "runs/toy", "--images", "x.npy", names=["x.npy", "Python objects"])
    Path("d.npy").mkdir()
    refused("measure", "runs/toy", "--images", "d.npy", names="d.npy")


# data sets to train on


def test_cifar100_files(here):
    def train(names):
        refused("train", "paper-b10-10-baseline", "--data", "data", "--out", "out", names=names)

    Path("data").mkdir()
    train("no CIFAR-100 in data")
    content = {
        "x_train": np.zeros((200, 4, 4, 3), np.uint8), "y_train": np.arange(200) % 100,
        "x_test": np.zeros((100, 4, 4, 3), np.uint8), "y_test": np.arange(100), "classes": np.arange(100).astype(str),
    }  # fmt: skip
    np.savez("data/cifar100.npz", **content)
    whole = Path("data/cifar100.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[200] ^= 255
    for torn in (b"", whole[:300], whole[:-1], damaged):
        Path("data/cifar100.npz").write_bytes(torn)
        train("data/cifar100.npz is no npz")
    for key, value, names in (
        ("x_train", content["x_train"].astype(np.float32), "float32"),
        ("x_test", content["x_test"][:, 0], "(100, 4, 3)"),
        ("y_train", content["y_train"] + 1, "0 to 99"),
        ("y_train", content["y_train"][:, None], "(200, 1)"),
        ("y_train", content["y_train"][:-1], "199 labels"),
        ("classes", content["classes"][:-1], "0 to 98"),
    ):
        np.savez("data/cifar100.npz", **(content | {key: value}))
        train(["data/cifar100.npz", names])
    Path("data/cifar100.npz").unlink()
    Path("data/cifar-100-python").mkdir()
    Path("data/cifar-100-python/train").write_bytes(pickle.dumps(Bomb()))
    train(["data/cifar-100-python", "MD5"])


def test_image_folders(here):
    def train(names):
        options = settings(TINY | {"num_classes": 2, "dataset": "folder:set", "patch_size": 2})
        refused("train", "demo-baseline", *options, "--out", "out", names=names)

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            Path(f"set/{split}/{name}").mkdir(parents=True)
            for place in range(3):
                Image.new("RGB", (8, 8), "teal").save(f"set/{split}/{name}/{place}.png")
    Image.new("RGB", (9, 8), "teal").save("set/train/cat/9.png")
    train(["9.png 9x8", "image_size"])
    Path("set/train/cat/9.png").write_bytes(b"no")
    train(["set/train/cat/9.png", PNG])
    Path("set/train/cat/9.png").unlink()
    Path("set/test/bird").mkdir()
    train(["set", "bird"])
    Path("set/test/bird").rmdir()
    shutil.rmtree("set/test/dog")
    train("set/test/dog")
    shutil.rmtree("set/train/dog")
    train(["set", "1 classes"])
    shutil.rmtree("set/test")
    train("set does not hold")


def test_unfit_run_is_refused_before_a_directory_is_made(here, toy):
    for change, code in (({"patch_size": 3}, 1), ({"scenario": "B0-2"}, 2), ({"num_classes": 12}, 1)):
        values = dataclasses.asdict(toy) | change
        recipe = beyond_recipe(toy)
        refused(
            "train", "demo-baseline", *settings({k: values[k] for k in {*recipe, *change}}), "--out", "a/b", code=code
        )
