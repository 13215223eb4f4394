"""compare: differences, verdicts, what pairs and what does not; the command and its figure."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_ok
from safetensors.torch import load_file, save_file
from test_intervals import frame, normal

from figures import comparison as figure
from locality_probe.compare import compare, format_table
from locality_probe.tables import ALL_TASKS, COMPARISON


def tables(values: dict, uniform: float = 4.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """NONLOCALITY_IMAGES and the columns of NONLOCALITY that compare reads, of values[run, task, layer] = [images]."""
    per_image = frame(values)
    nonlocality = per_image.groupby(["run", "task", "layer", "head"], as_index=False)["d_loc"].mean()
    return per_image, nonlocality.assign(d_uniform=uniform)


def noisy(shift: float, seed: int, n: int = 100) -> np.ndarray:
    return normal(n) + shift + 0.1 * normal(n, 0, seed)


VALUES = {("a", t, x): noisy(0.2 * t * x, 10 * t + x + 1) for t in range(3) for x in range(2)}
VALUES |= {("b", t, x): noisy(0.0, 100 + 10 * t + x) for t in range(3) for x in range(2)}
PAIR = [(("a", None), ("b", None))]


def test_differences_and_verdicts():
    found = compare(*tables(VALUES), PAIR).set_index(["task", "layer"])
    for (task, layer), row in found.iterrows():
        tasks = range(3) if task == ALL_TASKS else [task]
        expected = np.mean([VALUES["a", t, layer].mean() - VALUES["b", t, layer].mean() for t in tasks])
        assert row["difference"] == pytest.approx(expected, abs=1e-6)
        assert row["difference"] == pytest.approx(row["d_loc"] - row["d_loc_other"])
        assert row["low_all"] <= row["low"] < row["difference"] < row["high"] <= row["high_all"]
    assert found.loc[(2, 1), "verdict"] == found.loc[(ALL_TASKS, 1), "verdict"] == "farther"
    assert set(found.loc[[(0, 0), (1, 0)], "verdict"]) <= {"undecided", "equal"}
    assert set(found["over"]) == {"images, paired"} and set(found["n"]) == {100}


def test_the_other_way_round_is_the_opposite():
    there = compare(*tables(VALUES), PAIR)
    back = compare(*tables(VALUES), [PAIR[0][::-1]])
    np.testing.assert_allclose(there["difference"], -back["difference"])
    np.testing.assert_allclose(there["low"], -back["high"], atol=1e-12)
    np.testing.assert_allclose(there["low_all"], -back["high_all"])
    opposite = {"farther": "closer", "closer": "farther"}
    assert [opposite.get(v, v) for v in there["verdict"]] == back["verdict"].tolist()


def test_equal_networks_look_as_far():
    values = VALUES | {("b", t, x): VALUES["a", t, x] for t in range(3) for x in range(2)}
    found = compare(*tables(values), PAIR)
    assert (found["difference"] == 0).all() and set(found["verdict"]) == {"equal"}
    wave = 0.01 * np.cos(np.arange(100) * np.pi)  # of mean 0
    noise = {key: x + wave for key, x in values.items() if key[0] == "b"}
    assert set(compare(*tables(values | noise), PAIR)["verdict"]) == {"equal"}  # surely within .04 patches
    assert "undecided" in set(compare(*tables(values | noise), PAIR, margin=1e-5)["verdict"])


def test_seeds():
    values, pairs = {}, []
    for seed, gap in enumerate((0.28, 0.3, 0.32)):
        for t in range(2):
            values[f"a-s{seed}", t, 0] = noisy(0.5 * seed + gap, 10 * seed + t + 1)
            values[f"j-s{seed}", t, 0] = noisy(0.5 * seed, 10 * seed + t + 51)
        pairs.append(((f"a-s{seed}", None), (f"j-s{seed}", None)))
    found = compare(*tables(values), pairs)
    assert set(found["over"]) == {"seeds, paired"} and set(found["n"]) == {3}
    by_seed = [[values[f"a-s{s}", t, 0].mean() - values[f"j-s{s}", t, 0].mean() for t in range(2)] for s in range(3)]
    np.testing.assert_allclose(found["difference"][:2], np.mean(by_seed, 0), atol=1e-6)
    np.testing.assert_allclose(found["low_all"], found["low"])  # one layer, so nothing to correct for
    assert found["run"].iloc[0] == "a-s0 + a-s1 + a-s2"
    assert "seeds, paired" in format_table(found) and "another seed" not in format_table(found)


def test_single_checkpoints_pair_whatever_their_task():
    found = compare(*tables(VALUES), [(("a", 2), ("a", 0))])
    assert found[["task", "other_task"]].drop_duplicates().to_numpy().tolist() == [[2, 0]]
    assert found.set_index("layer").loc[1, "difference"] == pytest.approx(
        VALUES["a", 2, 1].mean() - VALUES["a", 0, 1].mean(), abs=1e-6
    )


def test_what_does_not_pair_is_refused():
    one_layer = {k: v for k, v in VALUES.items() if k[0] == "a" or k[2] == 0}
    with pytest.raises(ValueError, match=r"layers or grids do not pair: a has layers 0, 1 .*; b has layers 0 "):
        compare(*tables(one_layer), PAIR)
    per_image, nonlocality = tables(VALUES)
    nonlocality.loc[nonlocality["run"] == "b", "d_uniform"] = 7.0
    with pytest.raises(ValueError, match=r"D_uniform 4.000; b has .* D_uniform 7.000"):
        compare(per_image, nonlocality, PAIR)
    late = {(run, t + 5 * (run == "b"), x): v for (run, t, x), v in VALUES.items()}
    with pytest.raises(ValueError, match=r"a has tasks \[0, 1, 2\] and b has \[5, 6, 7\]: none in common"):
        compare(*tables(late), PAIR)
    with pytest.raises(ValueError, match="one image has no interval"):
        compare(*tables({k: v[:1] for k, v in VALUES.items()}), PAIR)


def test_text_has_every_number_and_a_sentence_a_layer():
    found = compare(*tables(VALUES), PAIR)
    text = format_table(found)
    for row in found.itertuples():
        assert f"{row.difference:+.3f} [{row.low_all:+.3f}, {row.high_all:+.3f}]" in text
    assert "layer 1: a looks farther at 2" in text and "over images alone" in text


def test_figure_draws_the_table():
    found = compare(*tables(VALUES), PAIR)
    drawn = figure.draw(found)
    for layer, axes in enumerate(drawn.axes):
        rows = found[(found["layer"] == layer) & (found["task"] != ALL_TASKS)]
        (line,) = [line for line in axes.lines if line.get_label() == "difference"]
        assert line.get_xdata().tolist() == [0, 1, 2]
        np.testing.assert_allclose(line.get_ydata(), rows["difference"])
        for band, ends in zip(axes.collections, (("low_all", "high_all"), ("low", "high")), strict=True):
            path = band.get_paths()[0].vertices
            assert path[:, 1].min() == pytest.approx(rows[ends[0]].min())
            assert path[:, 1].max() == pytest.approx(rows[ends[1]].max())
    single = figure.draw(compare(*tables(VALUES), [(("a", 2), ("a", 0))]))
    assert len(single.axes) == 2 and single.axes[0].lines[-1].get_xdata().tolist() == [2]
    with pytest.raises(ValueError, match="no task to draw"):
        figure.draw(found[found["task"] == ALL_TASKS])


def test_command(runs):
    result = run_ok("compare", "runs/toy", "runs/toy-joint", "--n", 6)
    found = COMPARISON.read("runs/toy/comparison.csv")
    assert set(found["task"]) == {0, 1, 2, ALL_TASKS} and set(found["layer"]) == {0, 1}
    same = found[found["task"] == 0]  # per-step joint training of the first task is the first task
    assert (same["difference"] == 0).all() and set(same["verdict"]) == {"equal"}
    run_ok("measure", "runs/toy", "--n", 6, "--out", "measured")
    means = pd.read_csv("measured/nonlocality.csv").groupby(["run", "task", "layer"])["d_loc"].mean()
    row = found[(found["task"] == 2) & (found["layer"] == 1)].iloc[0]
    assert row["difference"] == pytest.approx(means["toy", 2, 1] - means["toy-joint", 2, 1], rel=1e-4)
    assert "runs/toy/comparison.png" in result.stdout and result.stderr == ""
    printed = run_ok("compare", "runs/toy", "runs/toy-joint", "--n", 6, "--json").stdout
    assert len(json.loads(printed)) == len(found)


def test_command_on_checkpoints_and_other_settings(runs):
    run_ok("compare", "runs/toy/task_02.safetensors", "runs/toy/task_00.safetensors", "--n", 4, "--out", "drift")
    found = COMPARISON.read("drift/comparison.csv")
    assert found[["run", "task", "other", "other_task"]].drop_duplicates().to_numpy().tolist() == [["toy", 2, "toy", 0]]
    values = json.loads((runs / "toy-joint/run.json").read_text())
    values["run"]["memory"] = 7
    (runs / "toy-joint/run.json").write_text(json.dumps(values))
    weights = load_file(runs / "toy-joint/task_01.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, runs / "toy-joint/task_01.safetensors")
    result = run_ok("compare", "runs/toy", "runs/toy-joint", "--task", 1, "--n", 4)
    assert result.stderr == "toy and toy-joint differ in more than training: memory (20, 7)\n"
