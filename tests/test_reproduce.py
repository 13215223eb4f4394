"""The paper with one command, at the size of a toy: everything is made, nothing twice, and nothing is lost."""

import dataclasses
import os
import re
import shutil

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from cil import recipes
from cil.device import processor
from figures.paper import reproduce as making
from figures.paper.drawings import ARTIFACTS
from figures.paper.reproduce import Scale, cost_of, jobs_of, needs, nominal, reproduce
from figures.paper.study import Sizes, Study
from locality_probe.cli import main
from locality_probe.sweep import choose_place
from locality_probe.tables import CLAIMS

TINY = Scale(
    {"": {"baseline": 1, "baseline-lpa": 1, "dytox": 1, "dytox-lpa": 1}}, {"baseline": 1, "baseline-lpa": 1},
    {"baseline": 1, "baseline-lpa": 1}, (0.02, 0.2), sizes=Sizes(8, None, (6, 4)),
)  # fmt: skip
RUNS = {f"demo-{name}" for name in (
    "baseline-s0", "baseline-s0-joint", "baseline-lpa-s0", "baseline-lpa-s0-joint", "dytox-s0", "dytox-lpa-s0",
    "baseline-nlpa-1-s0", "baseline-lambda-0.2-s0", "baseline-s0-joint-as-long", "baseline-lpa-s0-joint-as-long")}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    """The demo's recipes and scale, cut to seconds."""
    cut = dict(num_classes=4, images_per_class=12, dim=24, num_heads=4, depth=3, epochs_first=1, epochs=1, warmup_epochs=0,
               finetune_epochs=1, batch_size=16, memory=8)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(making.SCALES, "demo", TINY)
        patch.setattr(recipes, "SCALES", recipes.SCALES | {"demo": lambda: dataclasses.replace(recipes.demo(), **cut)})
        for name, build in list(recipes.RECIPES.items()):
            if name.startswith("demo-"):
                run = build()
                run = dataclasses.replace(run, **cut | {"n_lpa": min(run.n_lpa, 2)})
                patch.setitem(recipes.RECIPES, name, lambda run=run: run)
        yield


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    said = []
    reproduce("demo", [], out, "data", "cpu", here(out), echo=said.append)
    return out, "\n".join(said)


def here(out):
    return choose_place("local", 10, out, "cpu", 2, None, [])


def again(out, *only, said=None, **options):
    said = [] if said is None else said
    reproduce("demo", only, out, "data", "cpu", here(out), echo=said.append, **options)
    return "\n".join(said)


def test_everything_is_made(made):
    out, said = made
    for name in ARTIFACTS:
        assert (out / f"figures/{name}.csv").is_file(), name
        assert (out / f"figures/{name}.{'md' if name.startswith('table') else 'png'}").is_file(), name
    assert set(CLAIMS.read(out / "figures/claims.csv")["claim"]) == {*(f"C{i}" for i in range(1, 9)), "C2*"}
    assert (out / "report.html").stat().st_size > 100_000
    assert {path.name for path in (out / "runs").iterdir() if not path.name.startswith(".")} == RUNS
    assert "not run" not in said


def test_the_plan_comes_first_with_steps_images_and_time(made):
    out, said = made
    plan = said.split("\nmeasuring")[0]
    assert re.search(r"^fig4 +2 +2 +\d+ +[\d,]+ +\S+ (seconds|minutes)", plan, flags=re.M)
    assert "10 runs to train (figures share them)" in plan and "training takes about" in plan
    total = Study(out / "tables").read("runs.csv")
    row = next(line.split() for line in plan.splitlines() if line.startswith("report"))
    assert int(row[3].replace(",", "")) == total["steps"].sum()  # as planned, so it came
    assert int(row[4].replace(",", "")) == total["images"].sum()


def test_repeated_it_does_nothing(made):
    out, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert again(out).startswith("nothing to do")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_measured_runs_need_not_be_kept(made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    assert again(out).startswith("nothing to do")
    (out / "report.html").unlink()
    (out / ".drawn").unlink()
    said = again(out)
    assert "0 runs to train" in said and (out / "report.html").is_file() and not (out / "runs").exists()


def test_interrupted_while_it_measures_it_goes_on_and_trains_nothing_again(made, tmp_path, monkeypatch):
    out = shutil.copytree(made[0], tmp_path / "out")
    study = Study(out / "tables")
    rows = study.read("measurements.csv")
    lost = (rows["run"] == "demo-baseline-s0") & (rows["kind"] == "spectrum")
    rows[~lost].to_csv(out / "tables/measurements.csv", index=False)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "measure_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again(out)
    monkeypatch.undo()
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    said = again(out)
    assert "measuring: 1 measurements of 1 runs" in said and "0 runs to train" in said
    assert weights == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert ("demo-baseline-s0", "spectrum") in study.done()


def test_a_cluster_of_any_size_leaves_measuring_to_the_cores_of_this_machine(made, tmp_path, monkeypatch):
    out = shutil.copytree(made[0], tmp_path / "out")
    rows = Study(out / "tables").read("measurements.csv")
    rows[rows["kind"] != "accuracy"].to_csv(out / "tables/measurements.csv", index=False)
    seen = []
    monkeypatch.setattr(making, "measure_all", lambda *words: seen.append(words[-2]) or [])
    cluster = dataclasses.replace(here(out), workers=500, device="auto")
    reproduce("demo", ["table1"], out, "data", "cpu", cluster, echo=lambda line: None)
    assert seen == [min(len(os.sched_getaffinity(0)), 6)]


def test_a_missing_run_is_trained_and_no_other(made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "out", ignore=shutil.ignore_patterns("demo-baseline-nlpa-1-s0"))
    for file in ("measurements.csv", "runs.csv", "accuracy.csv"):
        table = pd.read_csv(out / "tables" / file)
        table[table["run"] != "demo-baseline-nlpa-1-s0"].to_csv(out / "tables" / file, index=False)
    said = again(out, "fig9")
    assert "1 runs to train" in said and "fig4" not in said
    values = pd.read_csv(out / "figures/fig9.csv")["value"]
    assert sorted(values.unique()) == [0, 1, 2]


def test_what_failed_is_said_at_the_end_and_the_rest_is_drawn(tiny, tmp_path, monkeypatch):
    bad = dataclasses.replace(recipes.find("demo-baseline"), scenario="B5-2")
    monkeypatch.setitem(recipes.RECIPES, "demo-dytox", lambda: dataclasses.replace(bad, method="dytox", seed=0))
    monkeypatch.setattr(making, "cost_of", lambda jobs, *_: [(1, 1, 1.0)] * len(jobs))
    with pytest.raises(ValueError, match=r"the same command tries again:\ndemo-dytox-s0: .*B5-2"):
        again(tmp_path / "out", "table1")
    assert "DyTox+ | - / - / - | not run" in (tmp_path / "out/figures/table1.md").read_text()


def test_dry_run_touches_nothing(tiny, tmp_path):
    said = again(tmp_path / "out", dry_run=True)
    assert "10 runs to train" in said and not (tmp_path / "out").exists()


def test_names_are_checked_first(tmp_path):
    run = CliRunner().invoke(main, ["reproduce", "--only", "fig44", "--out", str(tmp_path)])
    assert run.exit_code == 2 and "no 'fig44' at scale demo; there are: fig1, fig2" in run.output
    run = CliRunner().invoke(main, ["reproduce", "--scale", "huge", "--out", str(tmp_path)])
    assert run.exit_code == 2 and "no scale 'huge'; there are: demo, learned, small, paper" in run.output
    for words, sentence in (
        (["--executor", "foo"], "no executor 'foo'"),
        (["--workers", "0"], "--workers 0 must be at"),
    ):
        run = CliRunner().invoke(main, ["reproduce", *words, "--out", str(tmp_path)])
        assert run.exit_code == 2 and sentence in run.output


def test_data_that_are_not_there_are_asked_for_after_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "cost_of", lambda jobs, *_: [(1, 1, 1.0)] * len(jobs))
    words = ["reproduce", "--scale", "small", "--only", "fig1", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(main, words)
    assert run.exit_code == 1 and "9 runs to train" in run.output
    assert f"no CIFAR-100 in {tmp_path}" in run.output and "--download" in run.output
    assert not list((tmp_path / "out").rglob("run.json"))
    run = CliRunner().invoke(main, [*words[:2], "paper", *words[3:], "--only", "fig1,table2", "--dry-run"])
    assert run.exit_code == 0
    assert f"data: no CIFAR-100 in {tmp_path}" in run.output and f"data: no ImageNet in {tmp_path}" in run.output


@pytest.mark.parametrize("scale", ["demo", "learned", "small", "paper"])
def test_runs_of_equal_settings_are_one(scale, tmp_path):
    of = needs(scale)
    jobs = jobs_of(of["report"], tmp_path, "data")
    start = {"demo": "demo", "learned": "learned-b2-2", "small": "small-b10-10", "paper": "paper-b10-10"}[scale]
    assert jobs[f"{start}-baseline-nlpa-0", 0].name == f"{start}-baseline-s0"
    assert jobs[f"{start}-baseline-lambda-0.02", 0].name == f"{start}-baseline-lpa-s0"
    distinct = set(jobs.values())
    settings = {dataclasses.replace(job.run, recipe="") for job in distinct}
    assert len(settings) == len(distinct)
    assert set(of) - {"claims", "report"} <= set(ARTIFACTS)


def test_what_a_drawing_shows_is_what_it_needs():
    for name, artifact in ARTIFACTS.items():
        assert {kind for _, _, kind in needs("small")[name]} - {"accuracy"} == set(artifact.kinds), name


def test_scales_cover_what_the_issue_of_each_is():
    small, paper = (jobs_of(needs(scale)["report"], making.Path("runs"), "data") for scale in ("small", "paper"))
    names = {job.name for job in small.values()}
    for system in making.FOUR:
        for seed in range(3):
            assert {f"small-b10-10-{system}-s{seed}", f"small-b10-10-{system}-s{seed}-joint"} <= names
    assert {f"small-{s}-baseline{lpa}-s0" for s in ("b50-10", "b5-5", "b50-5") for lpa in ("", "-lpa")} <= names
    assert len([name for name in names if "-lambda-" in name]) == len(recipes.LAMBDAS) - 1
    assert len([name for name in names if "-nlpa-" in name]) == 4
    cells = {job.name for job in paper.values() if job.run.training == "incremental"}
    assert {f"paper-{setting}-{system}-s0" for setting in recipes.PUBLISHED for system in making.FOUR} <= cells


def test_learned_trains_what_was_registered_in_its_order():
    jobs = list(dict.fromkeys(making.all_jobs("learned", making.Path("runs"), "data").values()))
    jobs.sort(key=lambda job: job.turn)
    names = [job.name.removeprefix("learned-") for job in jobs]
    assert len(names) == 116
    main = [f"b2-2-baseline{lpa}-s{seed}{training}" for seed in range(8) for lpa in ("", "-lpa")
            for training in ("", "-joint-as-long", "-joint-terminal")]  # fmt: skip
    assert set(names[:48]) == set(main) and set(names[:6]) == {name for name in main if "-s0" in name}
    later = [
        "joint",
        "mhsa",
        "gate",
        "lpa-frozen",
        "lpa-random",
        "lambda-0.002",
        "lambda-1",
        "nlpa-2",
        "b6-2",
        "dytox",
        "alphabetical",
    ]
    first = [next(i for i, name in enumerate(names) if part in name and name not in main) for part in later]
    assert min(first) == 48 and [jobs[i].turn // 1000 for i in first] == [1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 7]
    assert all(job.run.checkpoints.startswith("0,10,30,100,") for job in jobs)


def test_cost_is_at_the_pace_of_what_was_run(tmp_path):
    jobs = list(dict.fromkeys(jobs_of(needs("paper")["fig1"], tmp_path, "data").values()))
    study = Study(tmp_path)
    row = {
        "run": "x", "scale": "paper", "setting": "b10-10", "system": "baseline", "method": "baseline", "n_lpa": 0,
        "lpa_blocks": 5, "lambda_init": 0.02, "training": "incremental", "seed": 0, "tasks": 1, "classes": 10, "steps": 10,
        "images": 1000, "seconds": 20.0, "git": "", "trainer": 2, "torch": "", "device": processor("cpu"), "settings": "{}",
    }  # fmt: skip
    elsewhere = row | {"run": "z", "seconds": 99.0, "device": "another"}
    joint = row | {"run": "y", "training": "joint", "seconds": 10.0}
    study.add("x", {"runs.csv": pd.DataFrame([row])}, {"run": "x", "kind": "accuracy"} | dict.fromkeys(
        ("images", "seconds"), 1) | dict.fromkeys(("source", "sha256", "git"), ""))  # fmt: skip
    study.add("y", {"runs.csv": pd.DataFrame([joint])}, {"run": "y", "kind": "accuracy"} | dict.fromkeys(
        ("images", "seconds"), 1) | dict.fromkeys(("source", "sha256", "git"), ""))  # fmt: skip
    study.add("z", {"runs.csv": pd.DataFrame([elsewhere])}, {"run": "z", "kind": "accuracy"} | dict.fromkeys(
        ("images", "seconds"), 1) | dict.fromkeys(("source", "sha256", "git"), ""))  # fmt: skip
    for job, (steps, images, seconds) in zip(jobs, cost_of(jobs, study, 1, "cpu"), strict=True):
        assert steps == (640_100 if job.run.training == "joint" else 156_560)
        assert images == 256 * steps and seconds == pytest.approx(
            images * (0.01 if job.run.training == "joint" else 0.02)
        )


def test_nominal_images_take_no_memory():
    run = recipes.find("paper-imagenet-b10-10-baseline")
    dataset = nominal(run)
    assert len(dataset.train) == 130_000 and dataset.image_size == (224, 224)
    assert dataset.train.images.untyped_storage().nbytes() == 3 * 224 * 224
    assert torch.equal(torch.bincount(dataset.test.labels), torch.full((100,), 50))
