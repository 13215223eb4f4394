"""The claims at the scale `learned`: their statistics, registered on 2026-11-26, before its main runs had ended.

Every statistic is signed so that above 0 is what the paper says, and gives one value per seed; two sides of a comparison are
runs of the same seed. Each claim has one primary statistic, named in `decides`, which alone decides the claim. It is the
claim's first part; on the page it is in bold and marked "(decides)". The other parts are secondary: layers, further
metrics, further scenarios. They have the same numbers and a verdict each, and never decide. The rule that judges them is
that of figures.paper.judge where a primary part decides.

`margin` is the smallest effect that matters, in the statistic's unit. Secondary parts have it where their unit is that of the
primary statistic and the same size matters; the others have none, and so never show that there is no effect.

Systems are selected by their name in RUNS, so that controls (plain MHSA, another GPSA gate, LPA with frozen or random weights)
are never mistaken for the baseline or for LPA. Which pairs are refused: figures.paper.selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from figures.paper.claim import Collect, Evidence, Part, claim
from figures.paper.claims.quantities import (
    eigenvalue_ratios,
    images_of,
    over_layers,
    percents,
    rank_gains,
    slopes,
    tested,
)
from figures.paper.selection import HALF_AN_EPOCH, Tables, initial_layers_of, layers_of, measured, pairs

SCALE = "learned"
MAIN, SECOND, OTHER_ORDER = "b2-2", "b6-2", "b2-2-alphabetical"
PATCHES, POINTS, DECADES, RHO = 0.02, 1.0, math.log10(1.05), 0.2  # margins, in these units
OTHER_LAMBDAS = (0.002, 0.2, 1.0)


def registered(name: str, decides: str) -> Callable[[Collect], Collect]:
    """Declare the statistics of a claim at SCALE; its sentence is that of the claim of this name at all scales."""
    return claim(name, scale=SCALE, decides=decides)


def of_system(runs: pd.DataFrame, system: str, training: str = "incremental", setting: str = MAIN) -> pd.DataFrame:
    """Runs of a system by its very name."""
    return runs[(runs["system"] == system) & (runs["training"] == training) & (runs["setting"] == setting)]


def _part(name: str, statistic: str, unit: str, values: np.ndarray, margin: float, images: int) -> Part:
    return Part(name, statistic, unit, np.asarray(values, float), None, images, margin)


def _each_layer(statistic: str, values: np.ndarray, images: int) -> list[Part]:
    """Secondary parts of D_loc: values [seeds, layers]; the paper counts layers from 1."""
    return [
        _part(f"layer {i + 1}", f"{statistic}, layer {i + 1}", "patches", values[:, i], PATCHES, images)
        for i in range(values.shape[1])
    ]


def _levels(tables: Tables, runs: list[str]) -> np.ndarray:
    """D_loc, mean over heads and images: [runs, tasks, layers], patches."""
    return layers_of(tables, runs).mean(1)


def _sides(found: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [left for left, _ in found], [right for _, right in found]


@registered("C1", decides="growth")
def grows(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline's D_loc, mean over heads and images, after the last task minus after the first; patches.

    - growth (decides): mean over layers. Above 0: the network looks farther
    - layer l: the same of one layer
    - most in deep layers: least-squares slope over layers of the layers' growth, patches a layer; no margin
    """
    plain = measured(tables, of_system(runs, "baseline"), "nonlocality")
    if not plain:
        return Evidence()
    levels, n = _levels(tables, plain), images_of(tables, plain[0], "nonlocality")
    growth = levels[:, -1] - levels[:, 0]  # [seeds, layers]
    what = "D_loc of the baseline after the last task minus after the first"
    return Evidence([
        _part("growth", f"{what}, mean over layers", "patches", growth.mean(1), PATCHES, n),
        *_each_layer(what, growth, n),
        _part("most in deep layers", f"slope over layers of: {what}", "patches a layer", slopes(growth, 1), math.nan, n),
    ])  # fmt: skip


@registered("C2", decides="CIL minus joint")
def joint_is_less(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline against joint training; patches. Above 0: joint training looks less far.

    - CIL minus joint (decides): D_loc after the last task minus D_loc of joint training on all classes for the same epochs
      (joint-terminal), mean over layers
    - layer l: the same of one layer
    - task by task: D_loc of CIL minus D_loc of joint training for each task, mean over layers and the tasks after the first
    """
    what = "D_loc of CIL after the last task minus D_loc of joint training on all classes for the same epochs"
    evidence = _minus_joint(tables, runs, "joint-terminal", math.inf, what)
    found, refused = _twins(tables, runs, "joint", math.inf)
    if found:
        cil, joint = (_levels(tables, side)[:, 1:] for side in _sides(found))  # at task 0 both are the same training
        what = "D_loc of CIL minus D_loc of joint training task by task, mean over layers and the tasks after the first"
        n = images_of(tables, found[0][0], "nonlocality")
        evidence.parts.append(_part("task by task", what, "patches", (cil - joint).mean((1, 2)), PATCHES, n))
    return Evidence(evidence.parts, evidence.refused + refused)


@registered("C2*", decides="CIL minus joint")
def joint_as_long_is_less(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """As C2, against joint training on all classes that takes as many steps as CIL takes in all; patches.

    - CIL minus joint (decides): mean over layers. Above 0: joint training looks less far, though it is as long
    - layer l: the same of one layer
    """
    what = "D_loc of CIL after the last task minus D_loc of joint training on all classes with as many steps"
    return _minus_joint(tables, runs, "joint-as-long", HALF_AN_EPOCH, what)


def _twins(tables: Tables, runs: pd.DataFrame, training: str, steps: float):
    """(baseline, its joint twin) of each seed, and sentences for those refused."""
    cil, joint = of_system(runs, "baseline"), of_system(runs, "baseline", training)
    return pairs(cil, joint, {"training"}, tables, "nonlocality", steps)


def _minus_joint(tables: Tables, runs: pd.DataFrame, training: str, steps: float, what: str) -> Evidence:
    """Parts of claims C2 and C2*: D_loc of CIL minus that of a joint training, after the last task, patches."""
    found, refused = _twins(tables, runs, training, steps)
    if not found:
        return Evidence(refused=refused)
    cil, joint = (_levels(tables, side)[:, -1] for side in _sides(found))
    gap, n = cil - joint, images_of(tables, found[0][0], "nonlocality")  # [seeds, layers]
    whole = _part("CIL minus joint", f"{what}, mean over layers", "patches", gap.mean(1), PATCHES, n)
    return Evidence([whole, *_each_layer(what, gap, n)], refused)


def _lpa_pairs(tables: Tables, runs: pd.DataFrame, kind: str, system: str = "baseline", setting: str = MAIN):
    """(run with LPA, run without) of each seed, and sentences for those refused."""
    with_lpa, without = of_system(runs, f"{system}-lpa", setting=setting), of_system(runs, system, setting=setting)
    return pairs(with_lpa, without, {"n_lpa"}, tables, kind)


@registered("C3", decides="growth")
def lpa_stays_low(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline against the baseline with LPA; D_loc, mean over layers; patches.

    - growth (decides): from after the first task to after the last, without LPA minus with. Above 0: with LPA it grows less
    - level: after the last task, without LPA minus with. Above 0: LPA looks less far
    - level less its start: D_loc after the last task less that before training, without LPA minus with; only of seeds that
      were measured before training
    """
    found, refused = _lpa_pairs(tables, runs, "nonlocality")
    if not found:
        return Evidence(refused=refused)
    lpa, plain = (_levels(tables, side).mean(2) for side in _sides(found))  # [seeds, tasks]
    start_lpa, start_plain = (initial_layers_of(tables, side).mean(1) for side in _sides(found))  # [seeds]
    level = plain[:, -1] - lpa[:, -1]
    since_start = level - (start_plain - start_lpa)
    n, unit = images_of(tables, found[0][0], "nonlocality"), "patches"
    parts = [
        _part("growth", "growth of D_loc from after the first task to after the last, mean over layers: baseline minus "
              "that with LPA", unit, level - (plain[:, 0] - lpa[:, 0]), PATCHES, n),
        _part("level", "D_loc after the last task, mean over layers: baseline minus that with LPA (much of it is there from "
              "the start)", unit, level, PATCHES, n),
    ]  # fmt: skip
    known = ~np.isnan(since_start)
    if known.any():
        what = "D_loc after the last task less that before training, mean over layers: baseline minus that with LPA"
        parts.append(_part("level less its start", what, unit, since_start[known], PATCHES, n))
    return Evidence(parts, refused)


@registered("C4", decides="Avg")
def lpa_pays(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """Systems with LPA against those without, percentage points.

    - Avg (decides), Last: with LPA minus without, of the baseline in the main scenario. Above 0: LPA is better
    - Fgt: without LPA minus with. Above 0: LPA forgets less
    - Avg, SCENARIO or METHOD: Avg with LPA minus without, in a further scenario, order of classes or method
    """
    percent, parts, refused = percents(tables), [], []
    asked = [
        ("Avg", "Avg", 1, "baseline", MAIN),
        ("Last", "Last", 1, "baseline", MAIN),
        ("Fgt", "Fgt", -1, "baseline", MAIN),
        ("Avg, B6-2", "Avg", 1, "baseline", SECOND),
        ("Avg, DyTox+", "Avg", 1, "dytox", MAIN),
        ("Avg, alphabetical", "Avg", 1, "baseline", OTHER_ORDER),
    ]
    for name, metric, sign, system, setting in asked:
        found, not_these = _lpa_pairs(tables, runs, "accuracy", system, setting)
        refused += [sentence for sentence in not_these if sentence not in refused]
        if found:
            values = [sign * (percent[lpa][metric] - percent[plain][metric]) for lpa, plain in found]
            sides = "with LPA minus without" if sign > 0 else "without LPA minus with"
            words = f"{metric} of {system}, {setting}, {sides}"
            parts.append(_part(name, words, "points", np.array(values), POINTS, tested(tables, found[0][0])))
    return Evidence(parts, refused)


@registered("C5", decides="eigenvalues")
def eigenvalues_grow(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """Eigenvalues of the covariance of the token that the newest head is fed, over test images of all classes.

    - eigenvalues (decides): log10 of (eigenvalue with LPA / eigenvalue without), mean over ranks and tasks, decades.
      Above 0: they are larger with LPA
    - effective rank: with LPA minus without, mean over tasks, dimensions; no margin
    - largest five: as `eigenvalues`, over the five largest
    """
    found, refused = _lpa_pairs(tables, runs, "spectrum")
    if not found:
        return Evidence(refused=refused)
    ratios, n = eigenvalue_ratios(tables, found), images_of(tables, found[0][0], "spectrum")
    of_what = "token that the newest head is fed, all classes, mean over tasks"
    largest = [logs[logs.index.get_level_values("rank") < 5].mean() for logs in ratios]
    ratio = "log10 of eigenvalue with LPA over that without, mean over"
    return Evidence([
        _part("eigenvalues", f"{ratio} ranks; {of_what}", "decades", np.array([logs.mean() for logs in ratios]), DECADES, n),
        _part("effective rank", f"effective rank with LPA minus without; {of_what}", "dimensions",
              rank_gains(tables, found), math.nan, n),
        _part("largest five", f"{ratio} the five largest; {of_what}", "decades", np.array(largest), DECADES, n),
    ], refused)  # fmt: skip


def _gains(tables: Tables, runs: pd.DataFrame, systems: Mapping[Any, tuple[str, str]], free: set[str]):
    """Avg of a system minus that of another one, points, for each (system, other): key -> Series by seed; and sentences."""
    percent, seed = percents(tables), runs.set_index("run")["seed"]
    gains, refused = {}, []
    for key, (system, other) in systems.items():
        found, not_these = pairs(of_system(runs, system), of_system(runs, other), free, tables, "accuracy")
        by_seed = {seed[left]: percent[left]["Avg"] - percent[right]["Avg"] for left, right in found}
        gains[key] = pd.Series(by_seed, dtype=float)
        refused += not_these
    return gains, refused


@registered("C6", decides="0.02 against the others")
def best_near(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline with LPA at lambda_init 0.02, as published, against OTHER_LAMBDAS; Avg, points. Above 0: 0.02 is better.

    - 0.02 against the others (decides): Avg minus the mean of Avg of the others, of seeds that have them all
    - against VALUE: Avg minus Avg with this value
    """
    systems = {value: ("baseline-lpa", f"baseline-lambda-{value:g}") for value in OTHER_LAMBDAS}
    gains, refused = _gains(tables, runs, systems, {"lambda_init"})
    parts, n = [], _tested_baseline(tables, runs)
    complete = pd.DataFrame(gains).dropna()  # [seeds, other values]
    if len(complete):
        others = ", ".join(f"{value:g}" for value in OTHER_LAMBDAS)
        what = f"Avg with lambda_init 0.02 minus the mean of Avg with {others}"
        parts.append(_part("0.02 against the others", what, "points", complete.mean(axis=1), POINTS, n))
    for value, gain in gains.items():
        if len(gain):
            words = f"Avg with lambda_init 0.02 minus Avg with {value:g}"
            parts.append(_part(f"against {value:g}", words, "points", gain, POINTS, n))
    return Evidence(parts, refused)


@registered("C7", decides="slope")
def more_layers(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """The baseline with LPA in 0, 1, 2 ... layers, of seeds that have them all; Avg. Above 0: more layers are better.

    - slope (decides): least-squares slope of Avg over the number of LPA layers, points a layer
    - k to k + 1: Avg with k + 1 LPA layers minus Avg with k, points
    """
    plain = of_system(runs, "baseline")
    if plain.empty:
        return Evidence()
    layers = int(plain["lpa_blocks"].iloc[0])
    systems = {k: (f"baseline-nlpa-{k}" if k < layers else "baseline-lpa", "baseline") for k in range(1, layers + 1)}
    gains, refused = _gains(tables, runs, systems, {"n_lpa"})
    complete = pd.DataFrame(gains).dropna()
    if complete.empty:
        return Evidence(refused=refused)
    above_none = np.column_stack([np.zeros(len(complete)), complete])  # Avg minus that without LPA: [seeds, 1 + layers]
    margin, n = POINTS / 3, _tested_baseline(tables, runs)
    what = f"least-squares slope of Avg over 0 to {layers} LPA layers"
    parts = [_part("slope", what, "points a layer", slopes(above_none, 1), margin, n)]
    for k, step in enumerate(np.diff(above_none).T):
        words = f"Avg with {k + 1} LPA layers minus Avg with {k}"
        parts.append(_part(f"{k} to {k + 1}", words, "points", step, margin, n))
    return Evidence(parts, refused)


def _tested_baseline(tables: Tables, runs: pd.DataFrame) -> int:
    """Test images of the main setting."""
    names = measured(tables, runs[runs["setting"] == MAIN], "accuracy")
    return tested(tables, names[0]) if names else 0


@registered("C8", decides="local and useful")
def shallow_serves(tables: Tables, runs: pd.DataFrame) -> Evidence:
    """Layers of the baseline: the three parts of `over_layers`, of which "local and useful" decides; rho, -1 to 1.

    Above 0: local layers transfer better; shallow layers are more local; shallow layers transfer better.
    """
    plain = of_system(runs, "baseline")
    located = set(measured(tables, plain, "nonlocality"))
    names = [run for run in measured(tables, plain, "transfer") if run in located]
    return Evidence([replace(part, margin=RHO) for part in over_layers(tables, names)] if names else [])
