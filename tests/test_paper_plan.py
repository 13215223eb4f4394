"""The plan of each scale: runs of equal settings are one, and what was registered or published is among them."""

import dataclasses
from pathlib import Path

import pytest

from cil import recipes
from figures.paper.artifacts import ARTIFACTS
from figures.paper.plan import all_jobs, jobs_of, needs
from figures.paper.scales import FOUR


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
    small, paper = (jobs_of(needs(scale)["report"], Path("runs"), "data") for scale in ("small", "paper"))
    names = {job.name for job in small.values()}
    for system in FOUR:
        for seed in range(3):
            assert {f"small-b10-10-{system}-s{seed}", f"small-b10-10-{system}-s{seed}-joint"} <= names
    assert {f"small-{s}-baseline{lpa}-s0" for s in ("b50-10", "b5-5", "b50-5") for lpa in ("", "-lpa")} <= names
    assert len([name for name in names if "-lambda-" in name]) == len(recipes.LAMBDAS) - 1
    assert len([name for name in names if "-nlpa-" in name]) == 4
    cells = {job.name for job in paper.values() if job.run.training == "incremental"}
    assert {f"paper-{setting}-{system}-s0" for setting in recipes.PUBLISHED for system in FOUR} <= cells


def test_learned_trains_what_was_registered_in_its_order():
    jobs = list(dict.fromkeys(all_jobs("learned", Path("runs"), "data").values()))
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
