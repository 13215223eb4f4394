"""The paper with one command, at the size of a toy: everything is made, nothing twice, and nothing is lost."""

import dataclasses
import os
import re
import shutil

import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import flat

from cil import recipes
from cil.sweep import choose_place
from figures.paper import cost, scales
from figures.paper import reproduce as making
from figures.paper.artifacts import ARTIFACTS
from figures.paper.reproduce import reproduce
from figures.paper.scales import Scale
from figures.paper.study import Sizes, Study
from locality_probe.cli import main
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
        patch.setitem(scales.SCALES, "demo", TINY)
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


@pytest.mark.slow
def test_everything_is_made(made):
    out, said = made
    for name in ARTIFACTS:
        assert (out / f"figures/{name}.csv").is_file(), name
        assert (out / f"figures/{name}.{'md' if name.startswith('table') else 'png'}").is_file(), name
    assert set(CLAIMS.read(out / "figures/claims.csv")["claim"]) == {*(f"C{i}" for i in range(1, 9)), "C2*"}
    assert (out / "report.html").stat().st_size > 100_000
    assert {path.name for path in (out / "runs").iterdir() if not path.name.startswith(".")} == RUNS
    assert "not run" not in said


@pytest.mark.slow
def test_the_plan_comes_first_with_steps_images_and_time(made):
    out, said = made
    plan = said.split("\nmeasuring")[0]
    assert re.search(r"^fig4 +2 +2 +\d+ +[\d,]+ +\S+ (seconds|minutes)", plan, flags=re.M)
    assert "10 runs to train (figures share them)" in flat(plan) and "training takes about" in flat(plan)
    total = Study(out / "tables").read("runs.csv")
    row = next(line.split() for line in plan.splitlines() if line.startswith("report"))
    assert int(row[3].replace(",", "")) == total["steps"].sum()  # as planned, so it came
    assert int(row[4].replace(",", "")) == total["images"].sum()


@pytest.mark.slow
def test_repeated_it_does_nothing(made):
    out, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert again(out).startswith("nothing to do")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_measured_runs_need_not_be_kept(made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    assert again(out).startswith("nothing to do")
    (out / "report.html").unlink()
    (out / ".drawn").unlink()
    said = again(out)
    assert "0 runs to train" in said and (out / "report.html").is_file() and not (out / "runs").exists()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_cluster_of_any_size_leaves_measuring_to_the_cores_of_this_machine(made, tmp_path, monkeypatch):
    out = shutil.copytree(made[0], tmp_path / "out")
    rows = Study(out / "tables").read("measurements.csv")
    rows[rows["kind"] != "accuracy"].to_csv(out / "tables/measurements.csv", index=False)
    seen = []
    monkeypatch.setattr(making, "measure_all", lambda *words: seen.append(words[-2]) or [])
    cluster = dataclasses.replace(here(out), workers=500, device="auto")
    reproduce("demo", ["table1"], out, "data", "cpu", cluster, echo=lambda line: None)
    assert seen == [min(len(os.sched_getaffinity(0)), 6)]


@pytest.mark.slow
def test_a_missing_run_is_trained_and_no_other(made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "out", ignore=shutil.ignore_patterns("demo-baseline-nlpa-1-s0"))
    for file in ("measurements.csv", "runs.csv", "accuracy.csv"):
        table = pd.read_csv(out / "tables" / file)
        table[table["run"] != "demo-baseline-nlpa-1-s0"].to_csv(out / "tables" / file, index=False)
    said = again(out, "fig9")
    assert "1 runs to train" in said and "fig4" not in said
    values = pd.read_csv(out / "figures/fig9.csv")["value"]
    assert sorted(values.unique()) == [0, 1, 2]


@pytest.mark.slow
def test_what_failed_is_said_at_the_end_and_the_rest_is_drawn(tiny, tmp_path, monkeypatch):
    bad = dataclasses.replace(recipes.find("demo-baseline"), scenario="B5-2")
    monkeypatch.setitem(recipes.RECIPES, "demo-dytox", lambda: dataclasses.replace(bad, method="dytox", seed=0))
    monkeypatch.setattr(cost, "cost_of", lambda jobs, *_: [(1, 1, 1.0)] * len(jobs))
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
    monkeypatch.setattr(cost, "cost_of", lambda jobs, *_: [(1, 1, 1.0)] * len(jobs))
    words = ["reproduce", "--scale", "small", "--only", "fig1", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(main, words)
    assert run.exit_code == 1 and "9 runs to train" in run.output
    assert f"no CIFAR-100 in {tmp_path}" in flat(run.output) and "--download" in run.output
    assert not list((tmp_path / "out").rglob("run.json"))
    run = CliRunner().invoke(main, [*words[:2], "paper", *words[3:], "--only", "fig1,table2", "--dry-run"])
    assert run.exit_code == 0
    said = flat(run.output)
    assert f"data: no CIFAR-100 in {tmp_path}" in said and f"data: no ImageNet in {tmp_path}" in said
