"""What a user adds to the paper from outside: a figure or a claim is one function, and plan, page and report know it."""

import made_up
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from figures.paper import page, report
from figures.paper.artifacts import ARTIFACTS, NotRun, artifact, build
from figures.paper.claim import CLAIMS_OF, Evidence, Part, claim
from figures.paper.claims import judge
from figures.paper.plan import check, needs
from figures.paper.selection import systems


@pytest.fixture
def own_registries():
    """The registries, which are put back as they were."""
    before, of_scales = dict(ARTIFACTS), {scale: dict(of_scale) for scale, of_scale in CLAIMS_OF.items()}
    yield
    for there, were in ((ARTIFACTS, before), (CLAIMS_OF, of_scales)):
        there.clear()
        there.update(were)


@pytest.fixture(scope="module")
def tables():
    return made_up.make()


def bars(frame: pd.DataFrame) -> Figure:
    """A drawing module in one line."""
    figure = Figure()
    figure.subplots().bar(frame["run"], frame["seconds"])
    return figure


@pytest.mark.slow
def test_own_figure_is_planned_drawn_written_and_reported(own_registries, tables, tmp_path):
    @artifact(
        "pace",
        "How long training took",
        needs=lambda runs: runs.of(["baseline"]),
        kinds=("spectrum",),
        section="accuracy",
    )
    def pace(tables):
        runs = tables["runs.csv"]
        if runs.empty:
            raise NotRun("no run")
        return runs[["run", "seconds"]], bars(runs), runs["run"]

    of = needs("small")
    keys = [("small-b10-10-baseline", seed) for seed in range(3)]
    assert of["pace"] == [(*key, kind) for kind in ("spectrum", "accuracy") for key in keys]
    assert list(of)[9:] == ["gap", "steps", "curves", "pace", "table1", "table2", "claims", "report"]
    check("small", ["pace"])

    built = build(tables)
    page.write({"pace": built["pace"]}, tables, tmp_path, echo=lambda line: None)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".pdf", ".png", ".txt"]
    line = (tmp_path / "pace.txt").read_text()
    assert line.startswith("How long training took. Scale demo") and "spectrum: 8 images" in line
    text = report.render(tables, built, judge(tables))
    places = [text.index(f'<figure id="{name}">') for name in ("gap", "fig6", "curves", "pace", "fig2", "fig9")]
    assert places == sorted(places)
    empty = build(tables | {"runs.csv": tables["runs.csv"].iloc[:0]}, ["pace"])["pace"]
    assert isinstance(empty, NotRun)


@pytest.mark.slow
def test_own_claim_is_judged_and_on_page_and_report(own_registries, tables):
    @claim("C9", "training takes no time")
    def quick(tables, runs):
        """Minus the seconds that a run of the baseline took. Above 0: less than none."""
        seconds = systems(runs, lpa=False)["seconds"].to_numpy()
        return Evidence([Part("quick", "minus the time of training", "s", -seconds + np.arange(len(seconds)))])

    judged = judge(tables)
    assert list(judged["claim"])[-2:] == ["C9", "C9"]
    whole, part = judged.iloc[-2], judged.iloc[-1]
    assert (whole["statistic"], whole["verdict"]) == ("training takes no time", "does not hold")
    assert (part["value"], part["unit"], part["seeds"]) == (-9.0, "s", 3)
    assert "| C9: training takes no time | **does not hold** |" in page.claims_page(judged)
    assert '<th scope="row">C9</th>' in report.render(tables, build(tables), judged)
    pd.testing.assert_frame_equal(judged.iloc[:-2], judge_without("C9", tables))


def judge_without(name, tables):
    CLAIMS_OF[""].pop(name)
    return judge(tables)


def test_own_claim_with_a_primary_part_is_of_its_scale_alone(own_registries, tables):
    @claim("T1", "seeds differ", scale="demo", decides="spread")
    def spread(tables, runs):
        """Seeds. Above 0: they differ."""
        return Evidence([
            Part("spread", "seed", "1", np.array([1.0, 1.1, 1.2]), margin=0.1), Part("other", "seed", "1", -np.ones(3)),
        ])  # fmt: skip

    judged = judge(tables)
    assert list(judged["claim"]) == ["T1"] * 3 and list(judged["verdict"]) == ["holds", "holds", "does not hold"]
    assert "| **spread (decides)** | seed (1) |" in page.claims_page(judged)


def test_what_cannot_be_declared_is_said(own_registries):
    def gather(tables):
        """Nothing."""

    with pytest.raises(ValueError, match="there is a figure or table 'fig4' already: Figure 4"):
        artifact("fig4", "again", needs=lambda runs: [], section="distances")(gather)
    with pytest.raises(ValueError, match="no section 'other'; there are: distances, accuracy"):
        artifact("fig10", "more", needs=lambda runs: [], section="other")(gather)
    with pytest.raises(ValueError, match="there is a claim 'C1' already: D_loc grows"):
        claim("C1", "again")(gather)
    with pytest.raises(ValueError, match="claim 'C10' has no sentence"):
        claim("C10", scale="learned")(gather)
    with pytest.raises(ValueError, match="needs a docstring"):
        claim("C10", "more")(lambda tables, runs: Evidence())


def test_every_statistic_says_its_sign():
    for of_scale in CLAIMS_OF.values():
        for declared in of_scale.values():
            assert "Above 0" in declared.collect.__doc__, declared.name
    for name, declared in ARTIFACTS.items():
        assert declared.build.__doc__, name
