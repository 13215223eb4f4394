"""A run directory is checked when it is opened: what is missing or cannot be is one sentence, and nothing trains on."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import beyond_recipe, flat, invoke, refused, run_ok, settings
from safetensors.torch import load_file

from cil import resume
from cil.checkpoint import open_run
from cil.files import atomically, together

pytestmark = pytest.mark.usefixtures("runs")
TOY = Path("runs/toy")


def described(change):
    path = TOY / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change(content)))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda c: {"format": True}, "format True"),
        (lambda c: {"run": []}, "run holds no settings"),
        (lambda c: {"image_size": [8.0, 8]}, "image_size is not two whole numbers"),
        (lambda c: {"image_size": [10**9, 8]}, "image_size"),
        (lambda c: {"mean": [0.1, float("nan"), 0.1]}, "mean is not three numbers"),
        (lambda c: {"std": [0.1, 0, 0.1]}, "std is not three numbers above 0"),
        (lambda c: {"class_order": [0, 0, 1, 2, 3, 4]}, "class_order is not different whole numbers"),
        (lambda c: {"class_order": None}, "class_order"),
        (lambda c: {"class_order": [90, 91, 92, 93, 94, 95]}, "class 95 of the run is none of the 10 of digits"),
        (lambda c: {"classes": c["classes"][:4]}, "classes is not as many names as class_order"),
        (lambda c: {"joint_twin": "x" * 5000}, "joint_twin is not the name of a run directory"),
        (lambda c: {"twin_of": "../elsewhere"}, "twin_of"),
        (lambda c: {"run": c["run"] | {"dim": 4 * 10**6}}, "dim=4000000 must be at least 1 and at most"),
        (lambda c: {"run": c["run"] | {"dim": 60_000}}, "weights; at most"),
        (lambda c: {"run": c["run"] | {"depth": 10**7}}, "depth=10000000"),
        (lambda c: {"run": c["run"] | {"memory_mode": "per-process:" + "9" * 5000}}, "memory_mode='per-process:999"),
    ],
)
def test_run_json(change, names):
    described(change)
    refused(
        "measure", "runs/toy", "--n", "2", "--task", "0", names=["run", names] if "class 95" not in names else [names]
    )


def test_json_that_is_no_json():
    for content in ("[" * 200_000, '{"format": 1' + "0" * 5000 + "}", "\ud800"):
        (TOY / "run.json").write_text(content, errors="surrogatepass")
        refused("measure", "runs/toy", names="run.json is damaged")
    (TOY / "run.json").unlink()
    os.mkfifo(TOY / "run.json")
    assert invoke("measure", "runs/toy").exit_code == 1


def train_on(toy, *more):
    return ["train", "demo-baseline", *settings(beyond_recipe(toy)), "--out", "runs/toy", *more]


def rewritten(name, change):
    frame = pd.read_csv(TOY / name)
    change(frame).to_csv(TOY / name, index=False)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda f: f.assign(accuracy=7.0), "column accuracy holds 7, which is not from 0 to 1"),
        (lambda f: f.assign(accuracy=float("nan")), "column accuracy holds nan"),
        (lambda f: f.assign(accuracy=0.5), "are no accuracy of 0.5"),
        (lambda f: f.assign(correct=2.7), "column correct holds values that are not int64"),
        (lambda f: f.assign(images=0), "column images holds 0"),
        (lambda f: f.assign(correct=f["images"] + 1), "are no accuracy of"),
        (lambda f: f.assign(images="9" * 30), "column images holds values that are not int64"),
        (lambda f: f.iloc[:-1], "lacks the accuracy after task 2 on task 2"),
        (lambda f: f.iloc[:0], "lacks the accuracy after task 0 on task 0"),
    ],
)
def test_accuracy_that_cannot_be(toy, change, names):
    rewritten("accuracy.csv", change)
    refused(*train_on(toy), names=["accuracy.csv", names])


def unfinished():
    """Its last task is to be trained."""
    for name in ("task_02.safetensors", "memory/task_02.csv"):
        (TOY / name).unlink()
    rewritten("accuracy.csv", lambda f: f[f["task"] < 2])
    rewritten("training.csv", lambda f: f[f["task"] < 2])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (None, "is missing, and task 2 trains with its exemplars"),
        (lambda f: f.assign(image=10**11), "holds image 100000000000, and there are"),
        (lambda f: f.assign(image=0.5), "column image holds values that are not int64"),
        (lambda f: f.assign(image=f["image"].to_numpy()[::-1]), "which it is not"),
        (
            lambda f: f.assign(image=f["image"].iloc[0], label=f["label"].iloc[0], rank=range(len(f))),
            "no exemplar of class",
        ),
        (lambda f: pd.concat([f, f.assign(rank=f["rank"] + 50)]), "holds images twice, or more than"),
        (lambda f: f.iloc[:0], "holds no exemplar of class 0"),
    ],
)
def test_memory_that_cannot_be(toy, change, names):
    unfinished()
    memory = TOY / "memory/task_01.csv"
    memory.unlink() if change is None else rewritten("memory/task_01.csv", change)
    before = {path: path.read_bytes() for path in TOY.rglob("*") if path.is_file() and path.name != ".lock"}
    result = invoke(*train_on(toy))
    assert result.exit_code == 1 and "memory/task_01.csv" in flat(result.stderr) and names in flat(result.stderr)
    assert {path: path.read_bytes() for path in before} == before


def test_a_gap_is_trained_and_what_is_there_stays(toy):
    whole = {path: path.read_bytes() for path in TOY.glob("task_0?.safetensors")}
    (TOY / "task_01.safetensors").unlink()
    assert open_run(TOY).tasks == [0, 2]
    run_ok(*train_on(toy))
    assert open_run(TOY).finished
    assert {path: path.read_bytes() for path in whole} == whole  # the same weights again


def test_states_that_no_trainer_wrote_count_as_none(toy):
    unfinished()
    directory = open_run(TOY)
    resume.save(directory, 50, {"task": 2})
    os.mkfifo(directory.resume_folder / "000000051.state")
    (directory.resume_folder / "abc.state").write_bytes(b"x")
    assert resume.load(directory, 2) is None
    run_ok(*train_on(toy))
    assert load_file(TOY / "task_02.safetensors")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    target, seen = tmp_path / "table.csv", []

    def write(part):
        seen.append(part.name)
        if len(seen) == 1:  # another thread writes the same file meanwhile
            import threading

            other = threading.Thread(target=lambda: atomically(target, write))
            other.start()
            other.join()
            assert target.read_text() == seen[1]
        part.write_text(part.name)

    atomically(target, write)
    assert len(set(seen)) == 2 and target.read_text() == seen[0] and not list(tmp_path.glob(".*.part"))


def test_files_of_a_set_get_their_names_together_or_not_at_all(tmp_path):
    old = {name: tmp_path / name for name in ("a", "b", "c")}
    for path in old.values():
        path.write_text("old")

    def texts():
        return {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}

    def write(names, content="new"):
        for name in names:
            atomically(tmp_path / name, lambda part: part.write_text(content))
            assert texts()[name] == "old"

    with together():
        write(["a", "b", "c"])
    assert texts() == dict.fromkeys("abc", "new")
    for path in old.values():
        path.write_text("old")
    with pytest.raises(OSError, match="no space"), together():
        write(["a", "b"])
        raise OSError("no space left")
    old["c"].unlink()
    old["c"].mkdir()
    with pytest.raises(IsADirectoryError), together():
        write(["a"])
        atomically(old["c"], lambda part: part.write_text("new"))
    assert texts() == {"a": "old", "b": "old"}
    atomically(old["a"], lambda part: part.write_text("alone"))
    assert texts()["a"] == "alone"
