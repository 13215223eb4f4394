"""The commands as they are typed, on tiny real runs."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import golden
from PIL import Image
from safetensors.torch import save_file

from cil import data, recipes
from cil.augment import normalize
from cil.checkpoint import open_run
from cil.models import IncrementalViT
from cil.run import randomness
from cil.tables import AFTER
from cil.train import train
from locality_probe.cli import main
from locality_probe.measures import nonlocality
from locality_probe.record import record
from locality_probe.tables import INITIAL, INTERVALS, LAYERS, NONLOCALITY, NONLOCALITY_IMAGES

WRITTEN = ["intervals.csv", "layers.csv", "measurement.json", "nonlocality.csv", "nonlocality_images.parquet"]
TINY = {
    "num_classes": 4, "images_per_class": 6, "dim": 8, "num_heads": 2, "depth": 2,
    "epochs_first": 1, "epochs": 1, "finetune_epochs": 1, "batch_size": 8, "memory": 8,
}  # fmt: skip


def invoke(*arguments):
    """The command line in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def run_ok(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def settings(values):
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def beyond_recipe(toy):
    """What makes the recipe demo-baseline the toy."""
    recipe = recipes.find("demo-baseline").to_dict()
    return {key: value for key, value in toy.to_dict().items() if value != recipe[key]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(here, toy_runs):
    """A copy of the toy and its twin: ./runs/toy and ./runs/toy-joint."""
    shutil.copytree(toy_runs, "runs")
    return Path("runs")


@pytest.fixture
def picture(here):
    pixels = np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    return Path("picture.png")


def maps_of(name):
    with np.load(name) as arrays:
        return {key: arrays[key] for key in arrays.files}


def every_attention(model, x):
    """Attention [H, Q, K] of each layer for one image, as `record` sees it."""
    return [item.values["all"][0].numpy() for item in record(model, x, lambda attention, layer: {"all": attention})]


# help


def test_help_is_there_for_every_command_and_loads_nothing_heavy():
    code = """
import sys
from click.testing import CliRunner
from locality_probe.cli import main
for name in [None, *main.commands]:
    result = CliRunner().invoke(main, [name, "--help"] if name else ["-h"])
    assert result.exit_code == 0 and "Usage:" in result.stdout, result.output
assert CliRunner().invoke(main, ["--version"]).exit_code == 0
heavy = {"torch", "timm", "numpy", "pandas", "matplotlib", "PIL", "sklearn", "cil", "figures"} & set(sys.modules)
assert not heavy, heavy
"""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    helped = subprocess.run([sys.executable, "-m", "locality_probe", "-h"], check=True, cwd=root, capture_output=True)
    assert all(name in helped.stdout.decode() for name in main.commands)
    for command in main.commands.values():
        assert command.help
        assert all(option.help for option in command.params if option.param_type_name == "option")


def test_recipes_are_listed_with_their_cost():
    text = run_ok("recipes").stdout
    assert all(name in text for name in recipes.RECIPES) and "63.11 / 74.74 / 12.52" in text
    few = run_ok("recipes", "b50-5-dytox").stdout.splitlines()[::2]
    assert few and all("b50-5-dytox" in name for name in few)
    wrong = invoke("recipes", "b51")
    assert wrong.exit_code == 2 and "no recipe holds 'b51'" in wrong.stderr


# train


def test_train_and_go_on(here):
    train = ["train", "demo-baseline", *settings(TINY), "--threads", 1, "--device", "cpu"]
    result = run_ok(*train, "--out", "new/run")
    assert result.stdout.startswith("new/run: tasks 0 to 1 finished; Last ")
    assert "task 2/2 finetune" in result.stderr
    directory = open_run("new/run")
    assert directory.tasks == [0, 1] and directory.run == dataclasses.replace(recipes.find("demo-baseline"), **TINY)
    before = {p: p.stat().st_mtime_ns for p in directory.path.rglob("*") if p.name != ".lock"}
    again = run_ok(*train, "--out", "new/run")
    assert (again.stdout, again.stderr) == (result.stdout, "")
    assert before == {p: p.stat().st_mtime_ns for p in directory.path.rglob("*") if p.name != ".lock"}

    terminal = run_ok("train", "demo-baseline-joint-terminal", *settings(TINY), "--out", "new/run-joint-terminal")
    assert terminal.stdout.startswith("new/run-joint-terminal: tasks 1 to 1 finished; Last ")
    assert open_run("new/run-joint-terminal").twin_of == "run"


def test_train_goes_on_where_it_was(runs, toy):
    last = runs / "toy" / "task_02.safetensors"
    weights = last.read_bytes()
    last.unlink()
    run_ok("train", "demo-baseline", *settings(beyond_recipe(toy)), "--out", runs / "toy")
    assert last.read_bytes() == weights


def test_train_here_gives_the_run_its_folders_name(here, monkeypatch):
    Path("mine-joint").mkdir()
    monkeypatch.chdir("mine-joint")
    run_ok("train", "demo-baseline-joint", *settings(TINY), "--out", ".")
    assert (open_run(".").name, open_run(".").twin_of) == ("mine-joint", "mine")


def test_dry_run_writes_nothing(here):
    result = run_ok("train", "demo-baseline", *settings(TINY), "--dry-run", "--out", "run")
    # 4 classes x 6 images, 2 a task; 8 exemplars: 4 a class after task 0, 2 after task 1
    assert [line.split()[:6] for line in result.stdout.splitlines()[1:4]] == [
        ["0", "2", "fit", "12", "1", "1"],
        ["1", "4", "fit", "20", "1", "2"],
        ["1", "4", "finetune", "8", "1", "1"],
    ]
    assert "4 steps at batch 8, 32 images; 8 exemplars" in result.stdout
    assert result.stderr == "" and not list(here.iterdir())


# measure


def test_measure_a_run_with_its_twin(runs, toy):
    result = run_ok("measure", "runs/toy", "--n", 5)
    rows = NONLOCALITY.read("runs/toy/nonlocality.csv")
    assert set(rows["run"]) == {"toy", "toy-joint"} and set(rows["pair"]) == {"toy"}
    keys = rows[["run", "task", "layer", "head"]].apply(tuple, axis=1).tolist()
    assert keys == [(r, t, x, h) for r in ("toy", "toy-joint") for t in (-1, 0, 1, 2) for x in (0, 1) for h in range(4)]
    assert rows["kind"].tolist()[:8] == ["LPA"] * 4 + ["GPSA"] * 4 and set(rows["images"]) == {5}
    np.testing.assert_allclose(rows["d_ratio"], rows["d_loc"] / rows["d_uniform"])

    means = rows.groupby(["task", "layer", "training"])["d_loc"].mean()
    lines = [[w for w in line.split() if not w.startswith("±")] for line in result.stdout.splitlines()]
    assert ["task", "layer", "0", "LPA", "layer", "1", "GPSA"] in lines
    assert ["incremental", "joint", "incremental", "joint"] in lines
    for name, task in (("init", -1), ("0", 0), ("1", 1), ("2", 2)):
        cells = [f"{means[task, x, t]:.3f}" for x in (0, 1) for t in ("incremental", "joint")]
        assert [name, *cells] in lines
    assert ["uniform", *["4.136"] * 4] in lines
    assert "skipped layer 2 (task_block.attn, TaskAttention): only class or task tokens" in result.stdout
    assert result.stderr == "" and all(f"runs/toy/{name}" in result.stdout for name in WRITTEN)

    images = NONLOCALITY_IMAGES.read("runs/toy/nonlocality_images.parquet")
    per_image = images.groupby(["run", "task", "layer", "head"])["d_loc"]
    table = rows.set_index(["run", "task", "layer", "head"])
    np.testing.assert_allclose(per_image.mean(), table["d_loc"], rtol=1e-6)
    np.testing.assert_allclose(per_image.std(), table["d_loc_sd"], atol=1e-6)
    sure = INTERVALS.read("runs/toy/intervals.csv").set_index(["run", "task", "layer", "other"])
    row = sure.loc[("toy", 2, 1, "")]
    assert row["low"] < row["mean"] < row["high"] and row["over"] == "images" and row["n"] == 5
    assert row["mean"] == pytest.approx(means[2, 1, "incremental"], rel=1e-6)
    assert f"{row['mean']:.3f} ±{(row['high'] - row['low']) / 2:.3f}" in result.stdout
    gap = sure.loc[("toy", 2, 1, "toy-joint:2")]
    assert gap["over"] == "images, paired"
    assert gap["mean"] == pytest.approx(means[2, 1, "incremental"] - means[2, 1, "joint"], rel=1e-5)
    layers = LAYERS.read("runs/toy/layers.csv")
    assert layers["status"].tolist() == ["ok", "ok", "skipped"] * 8 and layers["reason"].ne("").sum() == 8
    used = json.loads(Path("runs/toy/measurement.json").read_text())["images"]
    assert used["source"] == "digits, test" and used["n"] == 5
    assert used["index"] == sorted(set(used["index"])) == images["image"].unique().tolist()
    test = data.load("digits").test
    assert set(test.labels[used["index"]].tolist()) <= set(range(toy.num_classes))  # only classes that the run learns


def test_initial_row_is_the_network_from_the_seed(runs, toy):
    run_ok("measure", "runs/toy", "--n", 3, "--out", "out")
    rows = NONLOCALITY.read("out/nonlocality.csv").query("run == 'toy' and task == @INITIAL")
    with randomness(toy.seed, "init", 0):
        model = IncrementalViT(toy, (8, 8))
        model.grow(2)
    directory = open_run("runs/toy")
    index = json.loads(Path("out/measurement.json").read_text())["images"]["index"]
    x = normalize(data.load("digits").test.images[index], directory.mean, directory.std)

    def measure(attention, layer):
        return {"d": nonlocality(attention, layer.grid)[0]} if layer.between_patches else {}

    expected = [item.values["d"].mean(0) for item in record(model.eval(), x, measure) if item.values]
    np.testing.assert_allclose(rows["d_loc"], torch.cat(expected), rtol=1e-6)


def test_json_is_the_table_and_nothing_else(runs):
    result = run_ok("measure", "runs/toy", "--n", 3, "--json", "--out", "out")
    assert result.stderr == "" and result.stdout.endswith("]\n") and result.stdout.count("\n") == 1
    rows = pd.DataFrame(json.loads(result.stdout))
    pd.testing.assert_frame_equal(NONLOCALITY.check(rows), NONLOCALITY.read("out/nonlocality.csv"), rtol=1e-12)
    assert sorted(os.listdir("out")) == WRITTEN
    assert not set(os.listdir("runs/toy")) & set(WRITTEN)


def test_images_and_tables_repeat_with_their_seed(runs):
    def measured(seed, out):
        run_ok("measure", "runs/toy", "--task", 0, "--n", 3, "--seed", seed, "--out", out)
        return Path(out, "nonlocality.csv").read_bytes(), json.loads(Path(out, "measurement.json").read_text())[
            "images"
        ]

    first = measured(1, "a")
    assert first == measured(1, "b")
    other = measured(2, "c")
    assert other[0] != first[0] and other[1]["index"] != first[1]["index"] and other[1]["sha256"] != first[1]["sha256"]


def test_several_runs_and_tasks(runs):
    shutil.copytree("runs/toy", "elsewhere/second")
    result = run_ok("measure", "runs/toy", "elsewhere/second", "--task", 2, "--task", 1, "--task", 1, "--n", 2)
    rows = NONLOCALITY.read("runs/toy/nonlocality.csv")
    measured = rows.groupby("run")["task"].unique().map(sorted)
    assert measured.to_dict() == {name: [INITIAL, 1, 2] for name in ("toy", "second", "toy-joint")}
    assert (
        "second: D_loc in patches, mean over heads and 2 images, ± half a 95 % interval over images; incremental\n"
        in result.stdout
    )
    assert not Path("elsewhere/second/nonlocality.csv").exists()


def test_a_twin_that_lacks_a_task_is_measured_where_it_is(runs):
    (runs / "toy-joint" / "task_02.safetensors").unlink()
    for tasks, there in (([], {-1, 0, 1}), ([1, 2], {-1, 1}), ([2], set())):
        run_ok("measure", "runs/toy", "--n", 1, *(word for task in tasks for word in ("--task", task)))
        rows = NONLOCALITY.read("runs/toy/nonlocality.csv")
        assert set(rows.query("run == 'toy'")["task"]) == {INITIAL, *(tasks or (0, 1, 2))}
        assert set(rows.query("run == 'toy-joint'")["task"]) == there


def test_a_renamed_run_keeps_its_twin(runs, monkeypatch):
    (runs / "toy").rename(runs / "mine")
    monkeypatch.chdir(runs / "mine")
    run_ok("measure", ".", "--n", 1)
    rows = NONLOCALITY.read("nonlocality.csv")
    assert set(rows["run"]) == {"mine", "toy-joint"} and set(rows["pair"]) == {"mine"}


def test_one_weights_file_of_a_run(runs):
    run_ok("measure", "runs/toy", "--n", 3, "--task", 1, "--out", "run")
    result = run_ok("measure", "runs/toy/task_01.safetensors", "--n", 3)
    run, file = (NONLOCALITY.read(f"{folder}/nonlocality.csv") for folder in ("run", "."))
    expected = run.query("run == 'toy' and task == 1").reset_index(drop=True)
    pd.testing.assert_frame_equal(file, expected)
    assert "init" not in result.stdout.split() and not (runs / "toy" / "nonlocality.csv").exists()


def test_checkpoints_inside_tasks_are_measured_like_the_tasks(here, toy):
    """A row for each, by its steps; the network after a task is what it is without them."""
    train(dataclasses.replace(toy, num_classes=4, checkpoints="0,2,3"), Path("kept"))
    result = run_ok("measure", "kept", "--n", "4")
    table = NONLOCALITY.read("kept/nonlocality.csv")
    points = table[["task", "at_step"]].drop_duplicates().values.tolist()
    assert points == [[-1, AFTER], [0, 0], [0, 2], [0, AFTER], [1, 3], [1, AFTER]]
    initial, first = (
        table[(table["task"] == t) & (table["at_step"] == s)]["d_loc"].tolist() for t, s in ((-1, AFTER), (0, 0))
    )
    assert initial == first
    words = [line.split()[:2] for line in result.output.splitlines()]
    assert [line for line in words if line and line[0] == "step"] == [["step", "0"], ["step", "2"], ["step", "3"]]
    assert set(INTERVALS.read("kept/intervals.csv")["task"]) == {-1, 0, 1}
    run_ok("measure", "kept/task_00_step_000002.safetensors", "--n", "4", "--out", "one")
    one = NONLOCALITY.read("one/nonlocality.csv")
    both = table[table["at_step"] == 2]
    np.testing.assert_allclose(one["d_loc"], both["d_loc"], rtol=1e-9)
    assert set(one["at_step"]) == {2}
    run = CliRunner().invoke(main, ["compare", "kept/task_00_step_000002.safetensors", "kept/task_00.safetensors"])
    assert run.exit_code == 1 and "is no network after a task of its run" in run.output


@pytest.mark.parametrize("nest", [lambda state: state, lambda state: {"model": state, "epoch": 3}])
def test_released_weights(here, nest):
    z = golden("model_raw_lpa")
    torch.save(nest({k[2:]: v for k, v in z.items() if k.startswith("w.")}), "released.pth")
    np.save("x.npy", z["x"].numpy())
    run_ok("measure", "released.pth", "--images", "x.npy")
    rows = NONLOCALITY.read("nonlocality.csv")
    assert (
        set(rows["run"]) == {"released"} and set(rows["task"]) == {int(z["tasks"]) - 1} and set(rows["images"]) == {4}
    )
    np.testing.assert_allclose(rows["d_loc"], z["nonlocality"].flatten(), rtol=1e-5)


def test_every_source_of_images(runs):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 8, 8)).astype(np.float32)
    np.save("x.npy", x)
    np.save("double.npy", x.astype(np.float64))
    np.savez("x.npz", labels=np.arange(4), images=x)
    np.savez_compressed("one.npz", whatever=x)
    Path("pngs").mkdir()
    Path("pngs/readme.txt").touch()
    for place, (height, width) in enumerate([(5, 9), (40, 7), (1, 1)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pngs/{place}.{'PNG' if place else 'png'}")
    tables = {}
    sources = {"x.npy": 4, "double.npy": 4, "x.npz": 4, "one.npz": 4, "pngs": 3, "digits": 256, "photos": 2}
    for source, n in sources.items():
        run_ok("measure", "runs/toy", "--task", 0, "--images", source, "--out", "out")
        tables[source] = NONLOCALITY.read("out/nonlocality.csv")
        assert set(tables[source]["images"]) == {n}, source
        assert json.loads(Path("out/measurement.json").read_text())["images"]["source"].startswith(source)
    for same in ("double.npy", "x.npz", "one.npz"):
        pd.testing.assert_frame_equal(tables[same], tables["x.npy"])


def test_pixels_of_16_bits_are_those_of_8(runs):
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    for folder, pixels in (("eight", grey), ("sixteen", grey.astype(np.uint16) * 257)):
        Path(folder).mkdir()
        Image.fromarray(pixels).save(f"{folder}/grey.png")
        run_ok("measure", "runs/toy", "--task", 2, "--images", folder, "--out", folder)
    assert Path("eight/nonlocality.csv").read_bytes() == Path("sixteen/nonlocality.csv").read_bytes()


def test_timm_model(here):
    untrained = run_ok("measure", "--model", "timm/test_vit", "--json")
    assert (
        untrained.stderr == "test_vit is untrained: without --weights or --pretrained its values are random (seed 0)\n"
    )
    rows = pd.DataFrame(json.loads(untrained.stdout))
    assert set(rows["run"]) == {"test_vit"} and set(rows["training"]) == {"model"} and set(rows["images"]) == {2}
    torch.manual_seed(3)
    model = timm.create_model("test_vit")
    assert rows[["layer", "head"]].drop_duplicates().shape[0] == len(rows) == 6 * model.blocks[0].attn.num_heads

    save_file(model.state_dict(), "w.safetensors")
    torch.save(model.state_dict(), "w.pth")
    tables = {}
    for weights in ("w.safetensors", "w.pth"):
        result = run_ok("measure", "--model", "timm/test_vit", "--weights", weights)
        assert result.stderr == ""
        titles = next(line for line in result.stdout.splitlines() if line.lstrip().startswith("task"))
        assert titles.split() == ["task", *(word for x in range(6) for word in ("layer", str(x), "Attention"))]
        tables[weights] = NONLOCALITY.read("nonlocality.csv")
    pd.testing.assert_frame_equal(*tables.values())
    assert (tables["w.pth"]["d_loc"] != rows["d_loc"]).all()


# heatmap


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
