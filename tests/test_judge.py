"""The rules that judge claims: verdicts, the exact interval and the power."""

import itertools
import math

import numpy as np
import pytest

from figures.paper.judge import (
    FAILS,
    HOLDS,
    NO_EFFECT,
    UNDECIDED,
    exact,
    interval,
    power,
    verdict,
    verdict_by_margin,
)
from locality_probe.intervals import over_seeds

THREE = np.ones(3)


@pytest.mark.parametrize(
    ("values", "low", "high", "low_images", "high_images", "expected"),
    [
        (THREE, 0.1, 0.3, math.nan, math.nan, HOLDS),
        (THREE, 0.1, 0.3, 0.1, 0.2, HOLDS),
        (THREE, 0.1, 0.3, -0.1, 0.2, UNDECIDED),
        (THREE, -0.3, -0.1, math.nan, math.nan, FAILS),
        (THREE, -0.3, -0.1, -0.2, 0.1, UNDECIDED),
        (THREE, -0.1, 0.1, 0.1, 0.2, UNDECIDED),
        (np.ones(2), 0.1, 0.3, 0.1, 0.2, UNDECIDED),
        (np.ones(1), math.nan, math.nan, 0.1, 0.2, UNDECIDED),
    ],
)
def test_rule_where_all_parts_decide(values, low, high, low_images, high_images, expected):
    assert verdict(values, low, high, low_images, high_images) == expected


@pytest.mark.parametrize(
    ("seeds", "low", "high", "expected", "says"),
    [
        (2, 0.5, 0.6, UNDECIDED, "2 of at least 3 seeds"),
        (2, -0.01, 0.01, UNDECIDED, "2 of at least 3 seeds"),
        (8, -0.09, 0.09, NO_EFFECT, "inside -0.1 to 0.1 points"),
        (8, 0.01, 0.09, NO_EFFECT, "inside"),  # before "holds"
        (8, -0.09, -0.01, NO_EFFECT, "inside"),  # before "does not hold"
        (8, 0.01, 0.1, HOLDS, "above 0"),  # the margin itself is not inside
        (3, 0.2, 0.4, HOLDS, "above 0"),
        (8, -0.1, -0.01, FAILS, "below 0"),
        (8, -0.4, 0.05, UNDECIDED, "an effect of 0.1 points in the paper's direction is ruled out"),
        (8, -0.4, 0.4, UNDECIDED, "the interval includes 0"),
        (8, -0.05, 0.4, UNDECIDED, "the interval includes 0"),
        (8, 0.0, 0.4, UNDECIDED, "the interval includes 0"),
    ],
)
def test_rule_where_a_primary_part_decides(seeds, low, high, expected, says):
    found, reason = verdict_by_margin(seeds, low, high, 0.1, "points")
    assert found == expected and says in reason
    assert ("ruled out" in reason) == ("ruled out" in says)


def test_a_part_without_a_margin_never_shows_that_there_is_no_effect():
    assert verdict_by_margin(8, -1e-9, 1e-9, math.nan) == (UNDECIDED, "the interval includes 0")
    assert verdict_by_margin(8, 1e-9, 2e-9, math.nan)[0] == HOLDS


# The interval and the power.


def rejected(values: np.ndarray, effects: np.ndarray, error: float = 0.05) -> np.ndarray:
    """Whether the two-sided sign-flip test of values - effect rejects, for each effect: by all 2^n sign patterns."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(values))))
    sums = np.abs(signs @ (values[:, None] - effects))  # [2^n, effects]
    seen = np.abs((values[:, None] - effects).sum(0))
    return (sums >= seen - 1e-12).mean(0) <= error


@pytest.mark.parametrize("n", [6, 8])
@pytest.mark.parametrize("at_once", [1, 2])
def test_exact_interval_inverts_the_sign_flip_test(n, at_once):
    generator = np.random.default_rng(n)
    for _ in range(5):
        values = generator.normal(0.3, 1, n) * generator.uniform(0.2, 3, n)
        low, high = exact(values, at_once)
        if n == 6 and at_once == 2:  # 64 patterns are too few for 1.25 % a side
            assert math.isnan(low) and math.isnan(high)
            continue
        effects = np.concatenate(
            [np.linspace(low - 1, high + 1, 300), [low - 1e-6, low + 1e-6, high - 1e-6, high + 1e-6]]
        )
        inside = (low <= effects) & (effects <= high)
        np.testing.assert_array_equal(~rejected(values, effects, 0.05 / at_once), inside)


@pytest.mark.parametrize(("n", "coverage"), [(6, 1 - 2 / 64), (8, 1 - 12 / 256)])
def test_exact_interval_covers_the_effect_as_often_as_it_says(n, coverage):
    generator = np.random.default_rng(0)
    # Far from normal, and each seed with a scale of its own: symmetric about the effect is all that is asked for.
    samples = 0.7 + generator.laplace(0, 1, (2000, n)) * 10.0 ** np.linspace(-1, 1, n)
    ends = np.array([exact(values) for values in samples])
    assert np.mean((ends[:, 0] <= 0.7) & (0.7 <= ends[:, 1])) == pytest.approx(coverage, abs=0.015)


def test_the_interval_is_the_wider_of_the_two():
    outlier = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 9.0])
    even = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7])
    for values in (outlier, even):
        both = np.array([over_seeds(values), exact(values)])
        assert interval(values) == (both.min(), both.max())
    assert exact(outlier) == pytest.approx((1.0, 9.0))  # the smallest and the largest value
    few = outlier[:5]
    assert interval(few) == pytest.approx(tuple(over_seeds(few))) and math.isnan(exact(few)[0])
    assert math.isnan(exact(np.arange(20.0))[0])  # too many subsets
    assert np.isnan(interval(few[:1])).all()


@pytest.mark.parametrize(("n", "sd", "margin"), [(3, 1.0, 0.8), (4, 1.0, 0.5), (8, 1.0, 0.4), (8, 1.0, 0.1)])
def test_power_is_how_often_a_simulated_study_shows_twice_the_margin(n, sd, margin):
    generator = np.random.default_rng(1)
    studies = generator.normal(2 * margin, sd, (n, 20000))
    simulated = np.mean(over_seeds(studies)[0] > 0)
    values = generator.normal(size=n)
    values = 5 + sd * (values - values.mean()) / values.std(ddof=1)  # of this standard deviation, wherever it lies
    assert power(values, margin) == pytest.approx(simulated, abs=0.015)


def test_power_at_its_ends():
    values = np.array([1.0, 1.1, 0.9, 1.05])
    assert power(values, 1.0) > 0.999 and 0.025 < power(values, 0.001) < 0.03
    assert power(values, 0.05, 5) < power(values, 0.05)  # of five parts at once
    assert power(np.ones(4), 1.0) == 1 and power(1e-7 * values, 1.0) == 1
    assert math.isnan(power(values, math.nan)) and math.isnan(power(values[:2], 1.0))
