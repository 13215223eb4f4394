"""The command measure, on tiny real runs, weights of releases, and models of timm."""

import dataclasses
import json
import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import flat, golden, invoke, run_ok
from PIL import Image
from safetensors.torch import save_file

from cil import data
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
pytestmark = pytest.mark.usefixtures("here")


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
    assert [*["layer", "0", "LPA"] * 2, *["layer", "1", "GPSA"] * 2] in lines
    assert ["task", "incremental", "joint", "incremental", "joint"] in lines
    for name, task in (("init", -1), ("0", 0), ("1", 1), ("2", 2)):
        cells = [f"{means[task, x, t]:.3f}" for x in (0, 1) for t in ("incremental", "joint")]
        assert [name, *cells] in lines
    assert ["uniform", *["4.136"] * 4] in lines
    assert "skipped layer 2 (task_block.attn, TaskAttention): only class or task tokens" in flat(result.stdout)
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
    title = "second: D_loc in patches, mean over heads and 2 images, ± half a 95 % interval over images; incremental"
    assert f"{title} task layer 0 LPA" in flat(result.stdout)
    assert not Path("elsewhere/second/nonlocality.csv").exists()


def test_a_twin_that_lacks_a_task_is_measured_where_it_is(runs):
    (runs / "toy-joint" / "task_02.safetensors").unlink()
    for tasks, there in (([], {-1, 0, 1}), ([1, 2], {-1, 1}), ([2], set())):
        run_ok("measure", "runs/toy", "--n", 1, *(word for task in tasks for word in ("--task", task)), "--force")
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
        run_ok("measure", "runs/toy", "--task", 0, "--images", source, "--out", "out", "--force")
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
        result = run_ok("measure", "--model", "timm/test_vit", "--weights", weights, "--force")
        assert result.stderr == ""
        titles = [line.split()[1:] for line in result.stdout.splitlines() if line.lstrip().startswith("task")]
        assert list(chain(*titles)) == [word for x in range(6) for word in ("layer", str(x), "Attention")]
        tables[weights] = NONLOCALITY.read("nonlocality.csv")
    pd.testing.assert_frame_equal(*tables.values())
    assert (tables["w.pth"]["d_loc"] != rows["d_loc"]).all()


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("again", "words"),
    [
        (["runs/toy", "--n", 3], "on 4 images of digits, test, now 3 of digits, test"),
        (["runs/toy", "--n", 4, "--seed", 1], "on 4 images of digits, test, now others"),
        (["runs/toy", "--n", 4, "--images", "photos", "--n", 2], "on 4 images of digits, test, now 2 of photos"),
        (["runs/toy", "--n", 4, "--task", 1], "of task 0, 2 too"),
        (["runs/toy-joint", "--n", 4, "--out", "runs/toy"], "of toy, now of toy-joint"),
    ],
)
def test_another_measurement_is_not_replaced_without_a_word(runs, again, words):
    run_ok("measure", "runs/toy", "--n", 4)
    before = files_of("runs/toy")
    result = invoke("measure", *again)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert f"runs/toy holds another measurement ({words}): give another --out, or --force to replace it" in flat(
        result.output
    )
    assert files_of("runs/toy") == before
    run_ok("measure", "runs/toy", "--n", 4)  # the same again
    assert files_of("runs/toy").keys() == before.keys()
    run_ok("measure", *again, "--force")
    assert files_of("runs/toy")["nonlocality.csv"] != before["nonlocality.csv"]


def test_a_run_that_has_gone_on_is_measured_again(runs):
    run_ok("measure", "runs/toy", "--n", 2, "--task", 0)
    run_ok("measure", "runs/toy", "--n", 2)
    assert set(NONLOCALITY.read("runs/toy/nonlocality.csv").query("run == 'toy'")["task"]) == {INITIAL, 0, 1, 2}


def test_json_alone_writes_nothing(runs):
    before = files_of("runs/toy")
    rows = json.loads(run_ok("measure", "runs/toy", "--n", 2, "--json").stdout)
    assert files_of("runs/toy") == before and not Path("nonlocality.csv").exists()
    assert json.loads(run_ok("measure", "runs/toy", "--n", 2, "--json", "--out", "tables").stdout) == rows
    assert len(NONLOCALITY.read("tables/nonlocality.csv")) == len(rows)


def test_other_weights_of_the_same_model_are_another_measurement(here):
    save_file(timm.create_model("test_vit").state_dict(), "a.safetensors")
    run_ok("measure", "--model", "timm/test_vit", "--weights", "a.safetensors")
    result = invoke("measure", "--model", "timm/test_vit")
    assert result.exit_code == 1 and "of timm/test_vit a.safetensors, now of timm/test_vit untrained" in flat(
        result.output
    )


def test_files_that_are_passed_over_are_counted(runs):
    Path("mixed").mkdir()
    for name in ("a.png", "b.TIF", "c.webp"):
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(f"mixed/{name}")
    run = ["measure", "runs/toy", "--task", 0, "--images", "mixed", "--out", "out"]
    assert "passed over" not in run_ok(*run).stderr
    for name in ("d.heic", "e.heic", "notes", ".hidden.txt"):
        Path("mixed", name).write_text("no image")
    Path("mixed/folder").mkdir()
    result = run_ok(*run)
    assert flat(result.stderr).endswith("3 of the files in mixed are passed over (1 without a suffix, 2 .heic)")
    kept = json.loads(Path("out/measurement.json").read_text())["images"]
    assert kept["passed_over"] == {"": 1, ".heic": 2} and kept["n"] == 3
