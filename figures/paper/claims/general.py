"""The paper's eight claims, each with a statistic that was written down before the small study was looked at.

C2* is none of the eight: a control that was added after C2 was looked at, with the same rule.

Every statistic is signed so that above 0 is what the paper says, and gives one value per seed (C4: per scenario, method and
seed). The rule that judges them is that of figures.paper.judge where all parts decide. Two sides of a comparison may differ
in what the claim is about and in nothing else: settings, steps and probe images are compared, and a pair that breaks this is
refused and named in `reason`. Which runs and pairs there are: figures.paper.selection.

The scale `learned` has statistics and a rule of its own: figures.paper.claims.registered.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from figures.paper.claim import Evidence, Part, claim
from figures.paper.claims.quantities import (
    eigenvalue_ratios,
    images_of,
    over_layers,
    percents,
    rank_gains,
    slopes,
    tested,
)
from figures.paper.selection import (
    HALF_AN_EPOCH,
    Tables,
    alike,
    depth_sweep,
    first_setting,
    lambda_sweep,
    layers_of,
    measured,
    pairs,
    systems,
)

NEAR = (0.01, 0.05)  # the lambda_init that count as near the paper's 0.02


@claim("C1", "D_loc grows as tasks go on, most in deep layers (figure 4)")
def grows(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline's D_loc, mean over heads, against the task 0, 1, 2 ...: one value per seed, and per image.

    - layer l: least-squares slope of D_loc over tasks, patches a task. Above 0: the layer looks farther with every task
    - most in deep layers: least-squares slope over layers of these slopes, patches a task and layer. Above 0: deep layers
      drift more than shallow ones
    """
    mine = measured(tables, systems(first_setting(runs), lpa=False), "nonlocality")
    if not mine:
        return Evidence()
    drift = slopes(layers_of(tables, mine), 2)  # [runs, images, layers]
    what = "slope of D_loc over tasks"
    parts = [_of_images(f"layer {i + 1}", what, "patches a task", drift[..., i]) for i in range(drift.shape[-1])]
    deep = _of_images(
        "most in deep layers", f"slope over layers of the {what}", "patches a task and layer", slopes(drift, 2)
    )
    return Evidence([*parts, deep])


@claim("C2", "joint learning has less nonlocality in each layer (figure 4)")
def joint_is_less(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline against its joint twin, trained for each task afresh on all classes seen by then, of the same seed.

    - layer l: D_loc of CIL minus D_loc of joint training, mean over the tasks after the first, patches. Above 0: joint
      training looks less far. At the first task both are the same training
    """
    mine = first_setting(runs)
    found, refused = pairs(
        systems(mine, lpa=False),
        systems(mine, lpa=False, training="joint"),
        {"training"},
        tables,
        "nonlocality",
        math.inf,
    )
    if not found:
        return Evidence(refused=refused)
    gap = (_side(tables, found, 0) - _side(tables, found, 1))[:, :, 1:].mean(2)  # at task 0 both are the same training
    what = "D_loc of CIL minus D_loc of joint, mean over the tasks after the first"
    return Evidence([_of_images(f"layer {i + 1}", what, "patches", gap[..., i]) for i in range(gap.shape[-1])], refused)


@claim("C2*", "joint learning with as many steps as CIL has less nonlocality in each layer (control)")
def joint_as_long_is_less(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline against joint training on all classes with as many steps as CIL takes in all, of the same seed.

    - layer l: D_loc of CIL after the last task minus D_loc of that joint training, patches. Above 0: joint training looks
      less far, though it has taken as many steps
    """
    mine = first_setting(runs)
    found, refused = pairs(
        systems(mine, lpa=False), systems(mine, lpa=False, training="joint-as-long"), {"training"}, tables, "nonlocality",
        HALF_AN_EPOCH,
    )  # fmt: skip
    if not found:
        return Evidence(refused=refused)
    gap = _side(tables, found, 0)[:, :, -1] - _side(tables, found, 1)[:, :, -1]
    what = "D_loc of CIL after the last task minus D_loc of joint training on all classes with as many steps"
    return Evidence([_of_images(f"layer {i + 1}", what, "patches", gap[..., i]) for i in range(gap.shape[-1])], refused)


@claim("C3", "with LPA, D_loc stays low over tasks (figure 6)")
def lpa_stays_low(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline against the baseline with LPA, of the same seed.

    - level: D_loc without LPA minus D_loc with LPA, mean over tasks and layers, patches. Above 0: LPA looks less far
    - slope: least-squares slope of D_loc over tasks without LPA minus that with LPA, mean over layers, patches a task.
      Above 0: with LPA it grows less
    """
    found, refused = _lpa_pairs(tables, first_setting(runs), "nonlocality")
    if not found:
        return Evidence(refused=refused)
    lpa, plain = (_side(tables, found, side) for side in (0, 1))
    level = (plain - lpa).mean((2, 3))
    drift = (slopes(plain, 2) - slopes(lpa, 2)).mean(-1)
    return Evidence([
        _of_images("level", "D_loc of the baseline minus that with LPA, mean over tasks and layers", "patches", level),
        _of_images("slope", "slope of D_loc over tasks of the baseline minus that with LPA, mean over layers",
                   "patches a task", drift),
    ], refused)  # fmt: skip


@claim("C4", "LPA raises Last and Avg, and lowers Fgt (tables 1 and 2)")
def lpa_pays(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """Systems with LPA against those without, in percentage points; one value per scenario, method and seed.

    - Last, Avg: with LPA minus without. Above 0: LPA classifies more images rightly
    - Fgt: without LPA minus with. Above 0: LPA forgets less
    """
    found: list[tuple[str, str]] = []
    refused: list[str] = []
    for method in ("baseline", "dytox"):
        more, not_these = _lpa_pairs(tables, runs, "accuracy", method)
        found, refused = found + more, refused + not_these
    if not found:
        return Evidence(refused=refused)
    percent = percents(tables)
    parts = []
    for metric, sign, statistic in (("Last", 1, "with LPA minus without"), ("Avg", 1, "with LPA minus without"),
                                    ("Fgt", -1, "without LPA minus with")):  # fmt: skip
        values = [sign * (percent[lpa][metric] - percent[plain][metric]) for lpa, plain in found]
        words = f"{metric} {statistic}, over scenarios, methods and seeds"
        parts.append(Part(metric, words, "points", np.array(values), number_of_images=tested(tables, found[0][0])))
    return Evidence(parts, refused)


@claim("C5", "with LPA the covariance eigenvalues are larger (figure 7)")
def eigenvalues_grow(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """Eigenvalues of the covariance of the token that the newest head is fed, over test images of all classes.

    - as they are: log10 of (eigenvalue with LPA / eigenvalue without), mean over ranks and tasks, decades. Above 0: they
      are larger with LPA
    - scale-free: effective rank (exp of the entropy of the normalised eigenvalues) with LPA minus without, mean over tasks,
      dimensions. Above 0: with LPA more dimensions are in use
    """
    found, refused = _lpa_pairs(tables, first_setting(runs), "spectrum")
    if not found:
        return Evidence(refused=refused)
    ratios = [logs.mean() for logs in eigenvalue_ratios(tables, found)]
    n = images_of(tables, found[0][0], "spectrum")
    of_what = "token that the newest head is fed, all classes, mean over tasks"
    return Evidence([
        Part("as they are", f"log10 of eigenvalue with LPA over that without, mean over ranks; {of_what}", "decades",
             np.array(ratios), number_of_images=n),
        Part("scale-free", f"effective rank with LPA minus without; {of_what}", "dimensions", rank_gains(tables, found),
             number_of_images=n),
    ], refused)  # fmt: skip


@claim("C6", "the best lambda_init is near 0.02 (figure 8)")
def best_near(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline with LPA in all blocks at several lambda_init, of the same seed.

    - near 0.02: mean Avg of the lambda_init in NEAR, minus mean Avg of all others that were tried, points. Above 0: near
      0.02 is better. A seed counts where there is a run on either side
    """
    rows = lambda_sweep(runs)
    rows, refused = alike(rows, {"lambda_init"})
    percent, values = percents(tables), []
    for _, of_seed in rows.groupby("seed"):
        average = np.array([percent[run]["Avg"] for run in of_seed["run"]])
        near = of_seed["lambda_init"].between(*NEAR).to_numpy()
        if near.any() and not near.all():
            values.append(average[near].mean() - average[~near].mean())
    if not values:
        return Evidence(refused=refused)
    what = f"mean Avg of lambda_init in {NEAR[0]:g} to {NEAR[1]:g}, minus that of all others tried"
    n = tested(tables, rows["run"].iloc[0])
    return Evidence([Part("near 0.02", what, "points", np.array(values), number_of_images=n)], refused)


@claim("C7", "more LPA layers are better, steadily (figure 9)")
def more_layers(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline with LPA in the first 0, 1, 2 ... blocks; a seed counts where all numbers of layers were run.

    - slope: least-squares slope of Avg over the number of LPA layers, points a layer. Above 0: more layers are better
    - k to k + 1: Avg with k + 1 LPA layers minus Avg with k, points. Above 0: the next layer helps, too
    """
    rows, refused = alike(depth_sweep(runs), {"n_lpa"})
    percent, by_seed = percents(tables), []
    for _, of_seed in rows.groupby("seed"):
        of_seed = of_seed.sort_values("n_lpa")
        if list(of_seed["n_lpa"]) == list(range(of_seed["lpa_blocks"].iloc[0] + 1)):
            by_seed.append([percent[run]["Avg"] for run in of_seed["run"]])
    if not by_seed:
        return Evidence(refused=refused)
    average, n = np.array(by_seed), tested(tables, rows["run"].iloc[0])
    parts = [Part("slope", "slope of Avg over the number of LPA layers", "points a layer", slopes(average, 1), None, n)]
    for k, step in enumerate(np.diff(average).T):
        parts.append(Part(f"{k} to {k + 1}", f"Avg with {k + 1} LPA layers minus with {k}", "points", step, None, n))
    return Evidence(parts, refused)


@claim("C8", "shallow layers transfer better and are more local (figure 5)")
def shallow_serves(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """Layers of the baseline: Spearman's rho over layers after each task but the last, mean over tasks (`over_layers`).

    - local and useful: minus rho of D_loc and accuracy of a linear probe on future classes, -1 to 1. Above 0: local layers
      transfer better
    - shallow is local: rho of depth and D_loc. Above 0: D_loc rises with depth
    - shallow is useful: minus rho of depth and that accuracy. Above 0: accuracy falls with depth
    """
    mine = measured(tables, systems(first_setting(runs), lpa=False), "transfer")
    mine = [run for run in mine if run in measured(tables, systems(first_setting(runs), lpa=False), "nonlocality")]
    return Evidence(over_layers(tables, mine) if mine else [])


# What they share.


def _lpa_pairs(tables: Tables, runs: pd.DataFrame, kind: str, method: str = "baseline"):
    return pairs(systems(runs, True, method), systems(runs, False, method), {"n_lpa"}, tables, kind)


def _side(tables: Tables, found: list[tuple[str, str]], side: int) -> np.ndarray:
    return layers_of(tables, [pair[side] for pair in found])


def _of_images(name: str, statistic: str, unit: str, values: np.ndarray) -> Part:
    """A statistic that is a mean over images: values [runs, images]."""
    return Part(name, statistic, unit, values.mean(1), values.mean(0), values.shape[1])
