"""The paper's figures and tables from a study's tables: what is in the drawing, never pixels."""

import made_up
import numpy as np
import pandas as pd
import pytest

from cil import recipes
from figures import accuracy_curves, attention_examples, eigenvalues, forgetting, gap, sweeps
from figures.attention_examples import Example
from figures.paper.artifacts import NotRun, build
from figures.paper.claims.quantities import percents
from locality_probe.tables import STUDY


@pytest.fixture(scope="module")
def tables():
    return made_up.make()


@pytest.fixture(scope="module")
def built(tables):
    return build(tables)


def test_everything_is_drawn_from_a_whole_study(built):
    assert list(built) == [*(f"fig{i}" for i in range(1, 10)), "gap", "steps", "curves", "table1", "table2"]
    assert not [name for name, found in built.items() if isinstance(found, NotRun)]


def test_accuracy_matrix(built):
    frame, figure, _ = built["fig1"]
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["baseline, CIL", "baseline, joint", "baseline + LPA, CIL"]
    drawn = panels[0].images[0].get_array()
    assert drawn.shape == (made_up.TASKS, made_up.TASKS)
    expected = np.mean([made_up.accuracy(False, False, seed, 3, 1) for seed in range(3)])
    assert drawn[3, 1] == pytest.approx(100 * expected, abs=0.05) and np.isnan(drawn.filled(np.nan)[1, 3])
    assert panels[0].texts[0].get_text() == f"{drawn[0, 0]:.0f}"
    assert {axes.images[0].norm.vmax for axes in panels} == {100 * frame["accuracy"].max()}


def test_attention_of_the_middle_patch(built):
    frame, figure, _ = built["fig3"]
    assert list(dict.fromkeys(frame["title"])) == ["joint", "CIL"]
    cells = frame[(frame["title"] == "CIL") & (frame["task"] == 0)].pivot(
        index="row", columns="column", values="attention"
    )
    expected = np.full(made_up.GRID, 0.5 * 51 / 255)
    expected[1, 1] = 0.5
    np.testing.assert_allclose(cells, expected)
    drawn = [axes.images[-1].get_array() for axes in figure.axes if len(axes.images) == 2]
    assert len(drawn) == 2 * made_up.TASKS
    np.testing.assert_allclose(drawn[0], expected)
    lines = {line.get_label(): line.get_ydata() for axes in built["fig2"][1].axes for line in axes.lines}
    rows = built["fig2"][2]
    assert rows == ["demo-baseline-s0", "demo-baseline-s0-joint"]
    deepest = [np.mean([made_up.d_loc(False, 0, t, 2, h, i) for h in range(2) for i in range(8)]) for t in range(4)]
    np.testing.assert_allclose(lines["CIL"], deepest)


def test_distances_are_means_over_seeds_with_their_intervals(built):
    frame, figure, runs = built["fig4"]
    assert len(runs) == 6
    row = frame[(frame["training"] == "incremental") & (frame["task"] == 2) & (frame["layer"] == 1)].iloc[0]
    seeds = [np.mean([made_up.d_loc(False, s, 2, 1, h, i) for h in range(2) for i in range(8)]) for s in range(3)]
    half = 4.302653 * np.std(seeds, ddof=1) / 3**0.5
    assert row["d_loc"] == pytest.approx(np.mean(seeds), abs=1e-6)
    assert (row["low"], row["high"]) == pytest.approx((np.mean(seeds) - half, np.mean(seeds) + half), abs=1e-5)
    assert (row["over"], row["n"]) == ("seeds", 3)
    panel = figure.axes[1]
    line = next(line for line in panel.lines if line.get_label() == "CIL")
    assert line.get_ydata()[2] == pytest.approx(row["d_loc"])
    band = panel.collections[0].get_paths()[0].vertices
    assert sorted(band[np.isclose(band[:, 0], 3)][:, 1]) == pytest.approx([row["low"], row["high"]], abs=1e-5)
    assert "baseline, 3 seeds" in figure.subfigs[0].get_suptitle()


def test_distances_against_steps_show_where_joint_training_as_long_stands(built):
    frame, figure, runs = built["steps"]
    assert len(runs) == 2 * 3 * 3
    panel = figure.axes[0]  # baseline, layer 1
    lines = {line.get_label(): line for line in panel.lines}
    np.testing.assert_allclose(lines["CIL"].get_xdata(), np.array([25, 50, 75, 100]) / 1000)
    np.testing.assert_allclose(lines["joint"].get_xdata(), np.array([20, 40, 60, 80]) / 1000)
    (x,), (y,) = lines["joint, as many steps as CIL"].get_data()
    row = frame[(frame["training"] == "joint-as-long") & (frame["layer"] == 0) & (frame["task"] == 3)].iloc[0]
    assert (x, y) == (pytest.approx(0.099), pytest.approx(row["d_loc"])) and row["steps"] == 99
    assert panel.collections[-1].get_segments()[0][:, 1] == pytest.approx([row["low"], row["high"]])
    assert "steps since initialisation" in figure.subfigs[0].get_supxlabel()


def test_the_baseline_is_above_lpa_in_whatever_order_they_were_measured(tables):
    rows = tables["nonlocality.parquet"]
    for order in (rows, rows[::-1]):
        _, figure, _ = build(tables | {"nonlocality.parquet": order}, ["fig6"])["fig6"]
        assert ["LPA" in part.get_suptitle() for part in figure.subfigs[:2]] == [False, True]


def test_one_seed_has_its_interval_over_images():
    frame, _, _ = build(made_up.make(seeds=1), ["fig4"])["fig4"]
    assert set(frame["over"]) == {"images"} and set(frame["n"]) == {made_up.IMAGES}
    assert (frame["low"] <= frame["d_loc"]).all() and (frame["high"] >= frame["d_loc"]).all()


def test_gap_is_cil_minus_joint(built):
    frame, figure, _ = built["gap"]
    row = frame[(frame["title"] == "baseline") & (frame["task"] == 3) & (frame["layer"] == 2)].iloc[0]
    assert row["difference"] == pytest.approx(0.005 * 3 * 3, abs=1e-6)
    axes = figure.axes[0]
    assert axes.get_title() == "baseline" and axes.images[0].get_array()[2, 3] == pytest.approx(100 * row["difference"])
    text = next(t for t in axes.texts if t.get_position() == (3, 2))
    assert text.get_text() == "4" and text.get_weight() == "bold"
    assert next(t for t in axes.texts if t.get_position() == (0, 0)).get_weight() == "normal"  # task 1: no difference


def test_gap_of_more_seeds_than_twins_is_over_images():
    tables = made_up.make(seeds=2)
    for file in STUDY:
        if "run" in tables[file]:
            tables[file] = tables[file][~tables[file]["run"].str.endswith("-s1-joint")]
    frame, _, _ = build(tables, ["gap"])["gap"]
    assert set(frame["over"]) == {"images, paired"} and len(frame) == 4 * made_up.TASKS * made_up.LAYERS


def test_spectra_are_beside_each_other(built):
    frame, figure, _ = built["fig7"]
    above, below, ratios = (figure.axes[row * made_up.TASKS] for row in range(3))
    lines = {line.get_label(): line.get_ydata() for line in above.lines}
    np.testing.assert_allclose(lines["baseline"], 0.5 ** np.arange(made_up.DIM))
    np.testing.assert_allclose(lines["baseline + LPA"], 2 * 0.5 ** np.arange(made_up.DIM) ** 0.5)
    assert [line.get_ydata().sum() for line in below.lines] == pytest.approx([1, 1])
    assert above.get_xscale() == above.get_yscale() == "log"
    np.testing.assert_allclose(ratios.lines[-1].get_ydata(), lines["baseline + LPA"] / lines["baseline"])
    assert (frame.loc[frame["title"] == "baseline", ["ratio", "low", "high"]] == 1).all(axis=None)


def test_ratios_of_eigenvalues_have_their_interval_over_seeds(tables):
    rows = tables["spectrum.parquet"].copy()
    for seed, factor in ((1, np.e), (2, 1 / np.e)):
        rows.loc[rows["run"] == f"demo-baseline-lpa-s{seed}", "eigenvalue"] *= factor
    frame = build(tables | {"spectrum.parquet": rows}, ["fig7"])["fig7"][0]
    row = frame[(frame["title"] == "baseline + LPA") & (frame["rank"] == 1) & (frame["task"] == 3)].iloc[0]
    half = 4.302653 / 3**0.5  # of the logarithms 0, 1 and -1
    assert (row["ratio"], row["low"], row["high"]) == pytest.approx((2, 2 * np.exp(-half), 2 * np.exp(half)), rel=1e-5)


def test_sweeps_use_the_runs_of_the_systems_where_settings_are_theirs(built):
    frame, figure, runs = built["fig8"]
    assert sorted(frame["value"].unique()) == [0.002, 0.02, 1.0] and "demo-baseline-lpa-s0" in runs
    assert figure.axes[0].get_xscale() == "log" and figure.axes[0].lines[0].get_xdata()[0] == 0.02
    frame, figure, runs = built["fig9"]
    assert sorted(frame["value"].unique()) == [0, 1, 2, 3] and {"demo-baseline-s0", "demo-baseline-lpa-s0"} <= set(runs)
    means = frame[frame["metric"] == "Avg"].groupby("value")["percent"].mean()
    assert [axes.get_title() for axes in figure.axes] == ["Last", "Avg", "Fgt"]
    np.testing.assert_allclose(figure.axes[1].lines[-1].get_ydata(), means)


def test_the_line_of_a_sweep_is_over_seeds_that_are_at_every_value():
    rows = [
        (value, seed, metric, 10 * value + 5 * seed) for value in (0, 1) for seed in (0, 1) for metric in sweeps.METRICS
    ]
    frame = pd.DataFrame(rows, columns=sweeps.COLUMNS)
    figure = sweeps.draw(frame[~((frame["value"] == 1) & (frame["seed"] == 1))], "x")  # seed 1 is at 0 alone
    dots, hollow, line = figure.axes[0].lines
    assert line.get_ydata().tolist() == [0, 10] and dots.get_ydata().tolist() == [0, 10]
    assert hollow.get_ydata().tolist() == [5] and hollow.get_fillstyle() == "none"
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["seed 0", "seed 1, not run at every value"]
    assert not sweeps.draw(frame, "x").legends
    apart = frame[(frame["value"] == 0) == (frame["seed"] == 0)]  # no seed is at both
    words = [text.get_text() for text in sweeps.draw(apart, "x").legends[0].get_texts()]
    assert words == ["seeds 0, 1, not run at every value"]


def test_curves_are_over_all_classes_seen(built):
    frame, figure, _ = built["curves"]
    row = frame[(frame["title"] == "baseline") & (frame["training"] == "incremental") & (frame["classes"] == 4)].iloc[0]
    shares = [np.mean([made_up.accuracy(False, False, s, 1, j) for j in range(2)]) for s in range(3)]
    assert row[["accuracy", "low", "high"]].tolist() == pytest.approx(
        [np.mean(shares), min(shares), max(shares)], abs=1e-3
    )
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        f"{t}{j}" for j in ("", ", joint") for t in ("baseline", "baseline + LPA", "DyTox", "DyTox + LPA")
    ]


def test_transfer_is_averaged_over_seeds(built):
    frame, figure, _ = built["fig5"]
    assert figure.axes[0].get_title() == "baseline, 3 seeds"
    rows = frame[(frame["layer"] == "block 1") & (frame["control"] == "none") & (frame["task"] == 0)]
    assert set(rows["run"]) == {f"{t}, 3 seeds" for t in ("baseline", "baseline + LPA", "DyTox", "DyTox + LPA")}
    assert rows["accuracy"].iloc[0] == pytest.approx(0.5 - 0.01)


def test_tables_have_ours_beside_the_published(built, tables):
    frame, page, _ = built["table1"]
    percent = percents(tables)
    ours = [percent[f"demo-baseline-lpa-s{s}"]["Avg"] for s in range(3)]
    row = frame[(frame["system"] == "baseline-lpa") & (frame["metric"] == "Avg")].iloc[0]
    assert (row["ours"], row["sd"], row["seeds"]) == (
        pytest.approx(np.mean(ours)),
        pytest.approx(np.std(ours, ddof=1)),
        3,
    )
    assert f"{row['ours']:.2f} ± {row['sd']:.2f}" in page
    frame, page, runs = built["table2"]
    assert runs == [] and page.count("not run") == 12 + 1
    first = recipes.PUBLISHED["imagenet-b10-10"][3]
    assert frame[(frame["setting"] == "imagenet-b10-10") & (frame["system"] == "dytox-lpa")]["published"].tolist() == [
        float(number) for number in first.split("/")
    ]


def test_published_numbers_are_beside_cifar():
    tables = made_up.make()
    tables["runs.csv"]["setting"], tables["runs.csv"]["scale"] = "b10-10", "small"
    frame, page, _ = build(tables, ["table1"])["table1"]
    assert "63.11 / 74.74 / 12.52" in page and page.count("not run") == 12 and "scale small" in page
    assert frame["ours"].notna().sum() == 12


def test_nothing_run_nothing_drawn():
    built = build({file: table.check(pd.DataFrame(columns=list(table.columns))) for file, table in STUDY.items()})
    assert [name for name, found in built.items() if not isinstance(found, NotRun)] == ["table1", "table2"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: forgetting.draw(pd.DataFrame(columns=forgetting.COLUMNS)),
        lambda: accuracy_curves.draw(pd.DataFrame(columns=accuracy_curves.COLUMNS)),
        lambda: eigenvalues.draw(pd.DataFrame(columns=eigenvalues.COLUMNS)),
        lambda: gap.draw(pd.DataFrame(columns=gap.COLUMNS)),
        lambda: sweeps.draw(pd.DataFrame(columns=sweeps.COLUMNS), "x"),
        lambda: attention_examples.draw(pd.DataFrame(columns=attention_examples.COLUMNS), {"x": Example(None, (0, 0))}),
    ],
)
def test_empty_tables_are_refused(call):
    with pytest.raises(ValueError, match=r"no .* to draw"):
        call()
