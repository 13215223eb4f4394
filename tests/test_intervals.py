"""Intervals: their coverage, their pairing, and what they say they are over."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from locality_probe.intervals import (
    bootstrap,
    group_by_seed,
    intervals,
    layer_means,
    over_seeds,
    resamples,
    simultaneous,
)
from locality_probe.tables import INTERVALS


def frame(values: dict[tuple[str, int, int], np.ndarray]) -> pd.DataFrame:
    """Per-image rows of two heads around each layer's values [images]."""
    return pd.concat(
        pd.DataFrame({"run": run, "task": task, "layer": layer, "head": head, "image": range(3, 3 + len(x)),
                      "d_loc": x + (-1) ** head * 0.5})
        for (run, task, layer), x in values.items() for head in range(2)
    )  # fmt: skip


def normal(n: int, mean: float = 2.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, n)


def test_bootstrap_is_close_to_the_normal_interval():
    x = normal(400)[:, None]
    low, high = bootstrap(x)[:, 0]
    half = 1.96 * x.std(ddof=1) / 20
    assert (low, high) == (pytest.approx(x.mean() - half, abs=0.01), pytest.approx(x.mean() + half, abs=0.01))
    assert resamples(400).sum(1) == pytest.approx(1) and resamples(400) is resamples(400)


def test_coverage():
    """400 samples of 100: 95 % intervals hold the true mean about as often as they say; all of 20 means, too."""
    draws = np.random.default_rng(1).exponential(1.0, (400, 100, 20))
    one = [(low[0] <= 1 <= high[0]) for low, high in map(bootstrap, draws)]
    assert 0.91 < np.mean(one) < 0.97
    every = [((low <= 1) & (1 <= high)).all() for low, high in map(simultaneous, draws)]
    assert 0.91 < np.mean(every) < 0.98  # of skewed values; cell by cell it would be a third
    assert np.mean([((low <= 1) & (1 <= high)).all() for low, high in map(bootstrap, draws)]) < 0.6


def test_simultaneous_intervals_are_wider_and_stand_still_where_nothing_moves():
    x = np.concatenate([np.random.default_rng(2).normal(0, 1, (200, 5)), np.full((200, 1), 3.0)], axis=1)
    low, high = simultaneous(x)
    one_low, one_high = bootstrap(x)
    assert (high - low)[:5].min() > (one_high - one_low)[:5].max()
    assert (low[5], high[5]) == (3.0, 3.0)
    still = simultaneous(np.ones((10, 2)))
    assert (still == 1).all()


def test_over_seeds_is_students_t():
    x = np.array([1.0, 2.0, 4.0])
    expected = stats.t.interval(0.95, 2, x.mean(), stats.sem(x))
    assert over_seeds(x) == pytest.approx(np.array(expected))
    wide = stats.t.interval(1 - 0.05 / 10, 2, x.mean(), stats.sem(x))
    assert over_seeds(x, 10) == pytest.approx(np.array(wide))


def test_layer_means_are_over_heads():
    x = normal(10)
    means = layer_means(frame({("a", 0, 1): x}))
    np.testing.assert_allclose(means["a", 0, 1], x)
    assert means.index.tolist() == list(range(3, 13))


def test_table_of_intervals():
    base = normal(50)
    values = {("a", t, x): base + 0.1 * t + 0.3 * x for t in (-1, 0, 1) for x in (0, 1)}
    values |= {("a-joint", t, x): base + 0.05 * t + 0.3 * x for t in (0, 1) for x in (0, 1)}
    table = intervals(frame(values), twins={"a": "a-joint"})
    assert list(table) == list(INTERVALS.columns)
    rows = table.set_index(["run", "task", "layer", "other"])
    own = rows.loc[("a", 1, 0, "")]
    assert (own["over"], own["n"]) == ("images", 50)
    assert own["mean"] == pytest.approx((base + 0.1).mean()) and own["low"] < own["mean"] < own["high"]
    # Differences do not vary over images here: pairing takes all of the images' own variation away.
    for key, expected in ((("a", 1, 0, "a:0"), 0.1), (("a", 1, 1, "a-joint:1"), 0.05), (("a", 0, 1, "a-joint:0"), 0.0)):
        row = rows.loc[key]
        assert row["over"] == "images, paired"
        assert [row["mean"], row["low"], row["high"]] == pytest.approx([expected] * 3, abs=1e-9)
    assert set(rows.loc[("a", -1)].index.get_level_values("other")) == {""}
    assert set(rows.loc[("a-joint", 1)].index.get_level_values("other")) == {"", "a-joint:0"}


def test_over_seeds_within_a_seed():
    base = normal(20)
    values = {}
    for seed, shift in enumerate((0.0, 0.3, 0.9)):
        values |= {(f"a-s{seed}", t, 0): base + shift + t for t in (0, 1)}
        values |= {(f"a-s{seed}-joint", t, 0): base + shift + 0.5 * t for t in (0, 1)}
    seeds = group_by_seed({run: ("joint" if "joint" in run else "cil", int(run[3])) for run, *_ in values})
    assert seeds["a-s1"] == ("a (3 seeds)", 1) and seeds["a-s2-joint"] == ("a-joint (3 seeds)", 2)
    table = intervals(frame(values), {f"a-s{s}": f"a-s{s}-joint" for s in range(3)}, seeds)
    rows = table[table["over"].str.startswith("seeds")].set_index(["run", "task", "other"])
    own = rows.loc[("a (3 seeds)", 1, "")]
    assert own["over"] == "seeds" and own["n"] == 3
    expected = base.mean() + 1 + np.array([0, 0.3, 0.9])
    assert own["mean"] == pytest.approx(expected.mean())
    assert (own["low"], own["high"]) == pytest.approx(stats.t.interval(0.95, 2, expected.mean(), stats.sem(expected)))
    gap = rows.loc[("a (3 seeds)", 1, "a-joint (3 seeds):1")]
    assert gap["over"] == "seeds, paired" and [gap["low"], gap["high"]] == pytest.approx([0.5, 0.5])
    assert rows.loc[("a (3 seeds)", 1, "a (3 seeds):0")]["mean"] == pytest.approx(1)


def test_groups_need_several_seeds_of_the_same_settings():
    assert group_by_seed({"a": ("x", 0), "b": ("y", 1), "c": ("x", 0)}) == {}
    assert group_by_seed({"run-s3": ("x", 3), "run-s4": ("x", 4)})["run-s4"] == ("run (2 seeds)", 4)


def test_one_image_has_no_interval():
    assert intervals(frame({("a", 0, 0): normal(1)})).empty


def test_other_images_cannot_be_paired():
    table = pd.concat([frame({("a", 0, 0): normal(5)}), frame({("b", 2, 0): normal(4)})])
    with pytest.raises(ValueError, match="image 7 is not among those that b, task 2, was measured on"):
        intervals(table)
