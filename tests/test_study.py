"""A study's tables: what is put in, in which order, and that it is what the instrument says of the runs."""

import json
import os
import signal
from concurrent.futures import Future

import numpy as np
import pandas as pd
import pytest
import torch

from cil import recipes
from cil.checkpoint import open_run
from cil.evaluate import scores
from figures.paper.study import KINDS, Measuring, Sizes, Study, examples, measure, measure_all
from locality_probe import survey
from locality_probe.images import load_images
from locality_probe.subject import from_run
from locality_probe.tables import ATTENTION, STUDY

SIZES = Sizes(nonlocality=16, spectrum=None, transfer=(6, 4))


@pytest.fixture(scope="module")
def study(toy_runs, tmp_path_factory):
    """The toy run and its twin, measured in every way, in two processes."""
    found = Study(tmp_path_factory.mktemp("study"))
    wanted = [(kind, toy_runs / name) for name in ("toy", "toy-joint") for kind in KINDS]
    assert measure_all(found, wanted, SIZES, "data", "cpu", 2) == []
    return found


def test_every_measurement_is_there_with_its_images(study):
    assert study.done() == {(run, kind) for run in ("toy", "toy-joint") for kind in KINDS}
    rows = study.read("measurements.csv").set_index(["run", "kind"])
    assert rows.loc[("toy", "nonlocality"), "images"] == 16
    by_images = rows["sha256"].unstack("run")
    assert (by_images["toy"] == by_images["toy-joint"]).all()  # the same images, so that they can be paired
    assert by_images["toy"].nunique() == 4  # accuracy and attention are named by what they are of


def test_row_of_a_run(study, toy_run):
    row = study.read("runs.csv").set_index("run").loc["toy"]
    assert (row["scale"], row["setting"], row["system"], row["training"]) == ("demo", "", "baseline", "incremental")
    assert (row["tasks"], row["classes"], row["n_lpa"], row["lpa_blocks"]) == (3, 6, 1, 2)
    training = toy_run.table("training")
    assert row["steps"] == training["steps"].sum()
    assert row["images"] == sum(min(r.images, r.steps * toy_run.run.batch_size) for r in training.itertuples())
    assert json.loads(row["settings"]) == toy_run.run.to_dict() | {"data_dir": ""}


def test_steps_are_those_that_each_network_has_taken(study, toy_runs):
    steps = study.read("steps.csv").set_index(["run", "task"])["steps"]
    for run in ("toy", "toy-joint"):
        of_task = open_run(toy_runs / run).table("training").groupby("task")["steps"].sum()
        expected = of_task.cumsum() if run == "toy" else of_task  # joint training starts afresh at each task
        assert steps[run].to_dict() == expected.to_dict()


def test_accuracy_is_that_of_training(study, toy_run):
    rows = study.read("accuracy.csv")
    mine = rows[rows["run"] == "toy"].drop(columns="run").reset_index(drop=True)
    assert scores(mine) == scores(toy_run.table("accuracy"))


def test_distances_are_those_of_the_instrument(study, toy_run):
    images = load_images("digits", 16, 0, "data", sorted(toy_run.class_order))
    rows, per_image, _ = survey.measure(from_run(toy_run, 2), images)
    mine = study.read("nonlocality.parquet")
    mine = mine[(mine["run"] == "toy") & (mine["task"] == 2)]
    np.testing.assert_allclose(mine["d_loc"], rows["d_loc"])
    means = study.read("layer_images.parquet")
    means = means[(means["run"] == "toy") & (means["task"] == 2)].set_index(["layer", "image"])["d_loc"]
    np.testing.assert_allclose(means, per_image.groupby(["layer", "image"])["d_loc"].mean(), rtol=1e-6)


def test_attention_adds_up_to_its_distance(study, toy_run):
    rows = study.read("attention.parquet")
    rows = rows[(rows["run"] == "toy") & (rows["task"] == 1) & (rows["layer"] == 0)]
    weights = np.stack([np.frombuffer(w, np.uint8) for w in rows["weights"]]) / 255 * rows["peak"].to_numpy()[:, None]
    np.testing.assert_allclose(weights.sum(1), 1, atol=64 / 255 * rows["peak"].max())
    y, x = np.divmod(np.arange(64), 8)
    away = np.hypot(y[:, None] - y, x[:, None] - x)[rows["query"].to_numpy()]
    np.testing.assert_allclose((weights * away).sum(1) / weights.sum(1), rows["distance"], atol=0.1)
    # Its mean over queries is the instrument's D_loc of that image.
    picture = examples("digits")["digit 3"][0]
    images = from_run(toy_run, 1).preprocess(picture)[None]
    from locality_probe import Probe

    with Probe(from_run(toy_run, 1).model) as probe:
        probe.update(images)
    expected = probe.result().table().query("layer == 0")["d_loc"].to_numpy()
    of_image = rows[rows["image"] == "digit 3"].groupby("head")["distance"].mean()
    np.testing.assert_allclose(of_image, expected, rtol=1e-5)


def test_examples_may_be_passed_on():
    for dataset, size in (("digits", (8, 8)), ("cifar100", None)):
        found = examples(dataset)
        assert len(found) >= 2 and all("CC BY" in credit for _, credit in found.values())
        assert size is None or {image.size for image, _ in found.values()} == {size}


def test_measuring_again_replaces(study, toy_runs, tmp_path):
    again = Study(tmp_path)
    for file in STUDY:
        if (study.folder / file).is_file():
            STUDY[file].write(study.read(file), tmp_path / file)
    again.add("toy", *measure("nonlocality", toy_runs / "toy", Sizes(nonlocality=4), "data"))
    for file in ("nonlocality.parquet", "layer_images.parquet", "measurements.csv"):
        assert len(again.read(file)) <= len(study.read(file))
    assert again.read("measurements.csv").set_index(["run", "kind"]).loc[("toy", "nonlocality"), "images"] == 4
    before, after = (s.read("nonlocality.parquet").query("run == 'toy-joint'") for s in (study, again))
    pd.testing.assert_frame_equal(before.reset_index(drop=True), after.reset_index(drop=True))


def test_one_that_fails_is_named_and_the_others_are_there(toy_runs, tmp_path):
    study = Study(tmp_path)
    wanted = [("nonlocality", toy_runs / "absent"), ("accuracy", toy_runs / "toy")]
    (sentence,) = measure_all(study, wanted, SIZES, "data", "cpu", 1)
    assert sentence.startswith("nonlocality of absent: no run directory")
    assert study.done() == {("toy", "accuracy")}


def deadly(kind, path, *settings):
    """As `measure`, in a process that is killed by one kind and stumbles over another."""
    if kind == "nonlocality":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "spectrum":
        raise RuntimeError("CUDA out of memory\nand more")
    return measure(kind, path, *settings)


def test_one_whose_process_is_killed_fails_alone(toy_runs, tmp_path, monkeypatch):
    monkeypatch.setattr("figures.paper.study.measure", deadly)
    study = Study(tmp_path)
    wanted = [
        (kind, toy_runs / run) for kind in ("nonlocality", "spectrum", "accuracy") for run in ("toy", "toy-joint")
    ]
    failed = measure_all(study, wanted, SIZES, "data", "cpu", 2)
    assert sorted(failed) == [
        "nonlocality of toy-joint: its process was killed; is memory full?",
        "nonlocality of toy: its process was killed; is memory full?",
        "spectrum of toy-joint: RuntimeError: CUDA out of memory",
        "spectrum of toy: RuntimeError: CUDA out of memory",
    ]
    assert study.done() == {("toy", "accuracy"), ("toy-joint", "accuracy")}


@pytest.mark.parametrize("device, gpus, given", [
    ("cuda", 2, ["cuda:0", "cuda:1", "cuda:0"]), ("cuda", 1, ["cuda"] * 3), ("cuda:1", 2, ["cuda:1"] * 3),
    ("cpu", 2, ["cpu"] * 3),
])  # fmt: skip
def test_measurements_go_round_the_gpus(device, gpus, given, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    asked = []
    with Measuring(Study(tmp_path), SIZES, "data", device, 1) as measuring:
        monkeypatch.setattr(measuring.pool, "submit", lambda *arguments: asked.append(arguments[-1]) or Future())
        for n in range(3):
            measuring.ask("accuracy", tmp_path / f"run{n}")
        measuring.jobs.clear()
    assert asked == given


def test_torn_between_two_tables_a_measurement_counts_as_missing(study, toy_runs, tmp_path, monkeypatch):
    torn = Study(tmp_path)
    frames, row = measure("nonlocality", toy_runs / "toy", SIZES, "data")
    write = Study._write

    def stop_before_the_last(self, file, parts):
        if file == "measurements.csv":
            raise KeyboardInterrupt
        write(self, file, parts)

    monkeypatch.setattr(Study, "_write", stop_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        torn.add("toy", frames, row)
    monkeypatch.undo()
    assert torn.done() == set() and len(torn.read("nonlocality.parquet"))
    torn.add("toy", frames, row)
    assert len(torn.read("nonlocality.parquet")) == len(frames["nonlocality.parquet"])


def test_attention_opens_nowhere_but_in_parquet(tmp_path):
    with pytest.raises(ValueError, match="is a folder, not a file"):
        ATTENTION.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("small-b10-10-dytox-lpa-joint", ("small", "b10-10", "dytox-lpa")),
        ("demo-baseline-lambda-0.02", ("demo", "", "baseline-lambda-0.02")),
        ("paper-imagenet-b50-5-baseline", ("paper", "imagenet-b50-5", "baseline")),
        ("paper-as-released-b5-5-baseline-nlpa-3", None),
    ],
)
def test_parts_of_a_recipes_name(name, expected):
    if expected is None:
        with pytest.raises(ValueError, match="not of the form"):
            recipes.parts(name)
    else:
        assert recipes.parts(name) == expected


def test_every_recipe_has_parts():
    for name in recipes.RECIPES:
        assert "-".join(filter(None, recipes.parts(name))) == name
