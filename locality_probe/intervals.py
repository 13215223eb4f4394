"""Intervals over images and over seeds, of layer means and of their paired differences.

An interval over images tells how far the number would move with other images of the same kind, for these very weights. It
does not include the randomness of training; an interval over seeds does.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import pandas as pd
from scipy import stats

from locality_probe.tables import INITIAL, INTERVALS, after_tasks

LEVEL, RESAMPLES = 0.95, 2000
CODES = ["run", "task", "layer"]


@functools.lru_cache(maxsize=4)
def resamples(n: int, seed: int = 0) -> np.ndarray:
    """Weights of n images in each bootstrap sample: float64 [RESAMPLES, n], rows sum to 1.

    The same for every table of n images, so that differences of bootstrapped means are bootstrapped mean differences.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def bootstrap(values: np.ndarray) -> np.ndarray:
    """Percentile interval (Efron 1979) of the mean over images: [n, ...] -> [2, ...], low and high. n is at least 2."""
    means = np.tensordot(resamples(len(values)), values, axes=1)
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def simultaneous(values: np.ndarray) -> np.ndarray:
    """Intervals that hold for all means at once: [n, cells] -> [2, cells].

    mean +- c se, with c the quantile of the largest |t| over cells in the bootstrap samples, each studentised by itself
    (max-|t|: Westfall & Young 1993; Romano & Wolf 2005). A cell without spread has an interval of no width.
    """
    mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
    moving = error > 1e-12 * np.abs(mean)
    if not moving.any():
        return np.stack([mean, mean])
    centred = (values - mean)[:, moving]
    weights = resamples(len(values))
    means = weights @ centred
    errors = np.sqrt(np.maximum(weights @ centred**2 - means**2, 0) / (len(values) - 1))
    away = np.abs(means) / np.where(errors > 0, errors, np.inf)
    half = np.quantile(away.max(1), LEVEL) * np.where(moving, error, 0.0)
    return np.stack([mean - half, mean + half])


def over_seeds(values: np.ndarray, cells: int = 1) -> np.ndarray:
    """Student's t interval of the mean over seeds: [n, ...] -> [2, ...]; `cells` at once by Bonferroni. n is at least 2."""
    mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
    half = stats.t.ppf(1 - (1 - LEVEL) / (2 * cells), len(values) - 1) * error
    return np.stack([mean - half, mean + half])


def layer_means(per_image: pd.DataFrame, measure: str = "d_loc") -> pd.DataFrame:
    """Mean over heads of each image: index image, columns (run, task, layer), from a table NONLOCALITY_IMAGES. Checkpoints
    inside tasks are left out.

    Raises ValueError where two networks were not measured on the same images.
    """
    means = after_tasks(per_image).groupby([*CODES, "image"])[measure].mean().astype(float).unstack(CODES).sort_index()
    return means.sort_index(axis=1)


def check_same_images(means: pd.DataFrame) -> None:
    """Raises ValueError naming an image that not every network was measured on: nothing can be paired then."""
    lacking = means.isna()
    if lacking.any(axis=None):
        image = lacking.any(axis=1).idxmax()
        run, task, _ = lacking.loc[image].idxmax()
        raise ValueError(
            f"image {image} is not among those that {run}, task {task}, was measured on: nothing can be paired"
        )


def intervals(
    per_image: pd.DataFrame,
    twins: dict[str, str] | None = None,
    seeds: dict[str, tuple[str, int]] | None = None,
    measure: str = "d_loc",
) -> pd.DataFrame:
    """The table INTERVALS of layer means (mean over heads), from NONLOCALITY_IMAGES; without checkpoints inside tasks.

    - each network: over images; its difference to the run at task 0 and, for an incremental run, to its joint twin at the
      same task (`twins`: run -> twin), over the same images
    - each group of runs that differ in the seed alone (`seeds`: run -> (name of the group, seed)), where there are two or
      more: the same over seeds, differences within a seed
    """
    twins, seeds = twins or {}, seeds or {}
    if after_tasks(per_image).empty:
        return INTERVALS.check(pd.DataFrame(columns=list(INTERVALS.columns)))
    means = layer_means(per_image, measure)
    check_same_images(means)
    cells_there = set(means.columns)
    pairs = {}  # (run, task, layer) -> what it is compared with
    for run, task, layer in means.columns:
        start, twin = (run, 0, layer), (twins.get(run), task, layer)
        wanted = [start] * (task > 0) + [twin] * (task != INITIAL)
        pairs[run, task, layer] = [other for other in wanted if other in cells_there]
    series = [(cell, None) for cell in means] + [(cell, other) for cell in means for other in pairs[cell]]
    values = np.stack(
        [means[cell].to_numpy() - (means[other].to_numpy() if other else 0) for cell, other in series], axis=1
    )
    rows = []
    if len(values) > 1:
        low, high = bootstrap(values)
        rows += [
            _row(measure, cell, other, "images", values[:, i].mean(), low[i], high[i], len(values))
            for i, (cell, other) in enumerate(series)
        ]
    rows += _seed_rows(measure, series, values.mean(0), seeds)
    return INTERVALS.check(pd.DataFrame(rows, columns=list(INTERVALS.columns)))


def _seed_rows(measure: str, series: list, means: np.ndarray, seeds: dict[str, tuple[str, int]]) -> list[dict]:
    groups: dict[tuple, dict[int, float]] = {}
    for (cell, other), mean in zip(series, means, strict=True):
        if cell[0] in seeds:
            (name, seed), against = seeds[cell[0]], None
            if other:
                # A twin that is in no group of its own is still of this seed.
                against = (seeds.get(other[0], (other[0], seed))[0], *other[1:])
            groups.setdefault(((name, *cell[1:]), against), {})[seed] = mean
    rows = []
    for (cell, other), by_seed in groups.items():
        if len(by_seed) > 1:
            values = np.array(list(by_seed.values()))
            low, high = over_seeds(values)
            rows.append(_row(measure, cell, other, "seeds", values.mean(), low, high, len(values)))
    return rows


def _row(measure, cell, other, over, mean, low, high, n) -> dict[str, object]:
    run, task, layer = cell
    against = f"{other[0]}:{other[1]}" if other else ""
    return {"measure": measure, "run": run, "task": task, "layer": layer, "other": against,
            "over": f"{over}, paired" if other else over, "mean": mean, "low": low, "high": high, "n": n}  # fmt: skip


def group_by_seed(runs: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """run -> (settings, seed) to run -> (name of its group, seed), for settings that two or more runs share.

    The group is named as its runs are, less -sSEED; runs of equal settings and seed are no group.
    """
    groups: dict[str, dict[int, str]] = {}
    for run, (settings, seed) in runs.items():
        groups.setdefault(settings, {}).setdefault(seed, run)
    named: dict[str, tuple[str, int]] = {}
    for by_seed in groups.values():
        if len(by_seed) > 1:
            seed, first = next(iter(by_seed.items()))
            name = re.sub(rf"-s{seed}(?=-|$)", "", first) + f" ({len(by_seed)} seeds)"
            named |= {run: (name, seed) for seed, run in by_seed.items()}
    return named
