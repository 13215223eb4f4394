"""The claims at the scale `learned`: their statistics and the rule, registered on 2026-11-26, before its main runs had ended.

Every statistic is signed so that above 0 is what the paper says, and gives one value per seed; two sides of a comparison are
runs of the same seed. Each claim has one primary statistic, named in PRIMARY, which alone decides the claim. It is the
claim's first part; on the page it is in bold and marked "(decides)". The other parts are secondary: layers, further
metrics, further scenarios. They have the same numbers and a verdict each, and never decide.

The interval of n values is for 95 %:

- Student's t over seeds
- where n is enough (6 for a primary statistic; at most MOST_SEEDS): also the exact interval `exact`, which inverts the
  sign-flip test of paired differences. It is exact if the differences are symmetric about the effect.
- the interval reported is the wider one: from the lesser of the low ends to the greater of the high ends

A primary statistic is one, so it is not corrected for multiplicity. The secondary parts of a claim hold at once (Bonferroni).
There are no intervals over images.

`margin` is the smallest effect that matters, in the statistic's unit. Secondary parts have it where their unit is that of the
primary statistic and the same size matters; the others have none, and so never show that there is no effect. The verdict is
the first of these that is true:

1. fewer than MIN_SEEDS seeds: undecided at this scale
2. the interval lies inside (-margin, margin): no effect that matters
3. the interval lies above 0: holds
4. the interval lies below 0: does not hold
5. else: undecided at this scale; the reason says so if an effect of the margin in the paper's direction is ruled out

Systems are selected by their name in RUNS, so that controls (plain MHSA, another GPSA gate, LPA with frozen or random weights)
are never mistaken for the baseline or for LPA. Which pairs are refused: figures.selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from figures.paper.claims import (
    FAILS,
    HOLDS,
    MIN_SEEDS,
    REGISTERED,
    UNDECIDED,
    Evidence,
    Part,
    eigenvalue_ratios,
    images_of,
    over_layers,
    over_seeds,
    part_row,
    percents,
    rank_gains,
    slopes,
    tested,
    whole_row,
)
from figures.paper.selection import HALF_AN_EPOCH, Tables, initial_layers_of, layers_of, measured, pairs, scope
from locality_probe.tables import CLAIMS

NO_EFFECT = "no effect that matters"
ERROR = 0.05  # of the intervals, both sides together
MOST_SEEDS = 16  # the exact interval takes 2^n subsets
MAIN, SECOND, OTHER_ORDER = "b2-2", "b6-2", "b2-2-alphabetical"
PATCHES, POINTS, DECADES, RHO = 0.02, 1.0, math.log10(1.05), 0.2  # margins, in these units
OTHER_LAMBDAS = (0.002, 0.2, 1.0)
PRIMARY = {
    "C1": "growth",
    "C2": "CIL minus joint",
    "C2*": "CIL minus joint",
    "C3": "growth",
    "C4": "Avg",
    "C5": "eigenvalues",
    "C6": "0.02 against the others",
    "C7": "slope",
    "C8": "local and useful",
}
ON_PAGE = (
    "Statistics and rule were registered on 2026-11-26, before the main runs had ended: `figures/registered.py`. Above 0 is "
    "what the paper says. One statistic per claim decides it: the one in bold. The other parts are shown and never decide. "
    "Intervals are 95 %, over seeds, paired: Student's t and, from six seeds on, the exact interval of the sign-flip test; the "
    "wider one is shown, for all parts that do not decide at once. The verdict is the first that is true: fewer than "
    f"{MIN_SEEDS} seeds, {UNDECIDED}; the interval inside -margin to margin, {NO_EFFECT}; above 0, {HOLDS}; below 0, {FAILS}; "
    f"else {UNDECIDED}. Margin is the smallest effect that matters. Power is the chance that so many seeds, which spread as "
    "these do, have a t interval above 0 if the true effect is twice the margin."
)


def judge(tables: Tables) -> pd.DataFrame:
    """The table CLAIMS: for each claim a row as a whole, then a row per part, the primary one first."""
    runs, rows = scope(tables["runs.csv"]), []
    for claim, collect in EVIDENCE.items():
        evidence = collect(tables, runs)
        secondary = sum(part.name != PRIMARY[claim] for part in evidence.parts)
        parts = [_row(claim, part, 1 if part.name == PRIMARY[claim] else secondary) for part in evidence.parts]
        rows += [_whole(claim, parts, evidence.refused), *parts]
    return CLAIMS.check(pd.DataFrame(rows, columns=list(CLAIMS.columns)))


def _row(claim: str, part: Part, at_once: int) -> dict[str, object]:
    low, high = interval(part.values, at_once)
    judged, reason = verdict(len(part.values), low, high, part.margin, part.unit)
    return part_row(
        claim, part, REGISTERED, (low, high), judged, reason, power=power(part.values, part.margin, at_once)
    )


def _whole(claim: str, parts: list[dict], refused: list[str]) -> dict[str, object]:
    for part in parts:
        if part["part"] == PRIMARY[claim]:
            reasons = [f"{part['part']} decides: {part['reason']}", *refused]
            return whole_row(claim, parts, part["seeds"], REGISTERED, part["verdict"], reasons)
    return whole_row(claim, parts, 0, REGISTERED, UNDECIDED, ["not run", *refused])


# The rule.


def verdict(seeds: int, low: float, high: float, margin: float, unit: str = "") -> tuple[str, str]:
    """(verdict, what it rests on) of an interval by the rule of this module; a margin of NaN is none."""
    size = f"{margin:.3g} {unit}".rstrip()
    if seeds < MIN_SEEDS:
        return UNDECIDED, f"{seeds} of at least {MIN_SEEDS} seeds"
    if -margin < low and high < margin:
        return NO_EFFECT, f"the interval lies inside -{margin:.3g} to {size}"
    if low > 0:
        return HOLDS, "the interval lies above 0"
    if high < 0:
        return FAILS, "the interval lies below 0"
    if high < margin:
        return UNDECIDED, f"the interval includes 0; an effect of {size} in the paper's direction is ruled out"
    return UNDECIDED, "the interval includes 0"


def interval(values: np.ndarray, at_once: int = 1) -> tuple[float, float]:
    """The interval (low, high) of the mean of values [n]; at_once: for how many statistics it holds together. NaN for n = 1."""
    if len(values) < 2:
        return math.nan, math.nan
    ends = [over_seeds(values, at_once), exact(values, at_once)]
    return float(np.nanmin(ends)), float(np.nanmax(ends))


def exact(values: np.ndarray, at_once: int = 1) -> tuple[float, float]:
    """The effects that the two-sided sign-flip test of values [n] does not reject: (low, high); NaN where n is too small.

    The means of all 2^n - 1 non-empty subsets of the values cut the line into 2^n intervals, and the effect lies in each with
    probability 2^-n if the values are symmetric about it (typical values: J. A. Hartigan 1969, JASA 64, 1303-1317). The
    interval goes from the k-th smallest of these means to the k-th largest, k = floor(2^n x 0.025).
    """
    n = len(values)
    k = math.floor(2**n * ERROR / (2 * at_once)) if n <= MOST_SEEDS else 0
    if not k:
        return math.nan, math.nan
    inside = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1  # [2^n - 1, n]
    means = np.sort(inside @ values / inside.sum(1))
    return float(means[k - 1]), float(means[-k])


def power(values: np.ndarray, margin: float, at_once: int = 1) -> float:
    """Chance that n seeds with the standard deviation of values [n] give a t interval above 0, 0 to 1.

    The true effect is twice the margin; t is then noncentral, with 2 margin sqrt(n) / sd. NaN without a margin, and where the
    rule decides nothing anyhow.
    """
    n = len(values)
    if n < MIN_SEEDS or math.isnan(margin):
        return math.nan
    sd = np.std(values, ddof=1)
    if sd < 1e-9 * margin:
        return 1.0
    critical = stats.t.ppf(1 - ERROR / (2 * at_once), n - 1)
    return float(stats.nct.sf(critical, n - 1, 2 * margin * math.sqrt(n) / sd))


# The statistics.


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


def grows(tables: Tables, runs: pd.DataFrame) -> Evidence:
    plain = measured(tables, of_system(runs, "baseline"), "nonlocality")
    if not plain:
        return Evidence()
    levels, n = _levels(tables, plain), images_of(tables, plain[0], "nonlocality")
    growth = levels[:, -1] - levels[:, 0]  # [seeds, layers]
    what = "D_loc of the baseline after the last task minus after the first"
    return Evidence([
        _part(PRIMARY["C1"], f"{what}, mean over layers", "patches", growth.mean(1), PATCHES, n),
        *_each_layer(what, growth, n),
        _part("most in deep layers", f"slope over layers of: {what}", "patches a layer", slopes(growth, 1), math.nan, n),
    ])  # fmt: skip


def joint_is_less(tables: Tables, runs: pd.DataFrame) -> Evidence:
    what = "D_loc of CIL after the last task minus D_loc of joint training on all classes for the same epochs"
    evidence = _minus_joint(tables, runs, "C2", "joint-terminal", math.inf, what)
    found, refused = _twins(tables, runs, "joint", math.inf)
    if found:
        cil, joint = (_levels(tables, side)[:, 1:] for side in _sides(found))  # at task 0 both are the same training
        what = "D_loc of CIL minus D_loc of joint training task by task, mean over layers and the tasks after the first"
        n = images_of(tables, found[0][0], "nonlocality")
        evidence.parts.append(_part("task by task", what, "patches", (cil - joint).mean((1, 2)), PATCHES, n))
    return Evidence(evidence.parts, evidence.refused + refused)


def joint_as_long_is_less(tables: Tables, runs: pd.DataFrame) -> Evidence:
    what = "D_loc of CIL after the last task minus D_loc of joint training on all classes with as many steps"
    return _minus_joint(tables, runs, "C2*", "joint-as-long", HALF_AN_EPOCH, what)


def _twins(tables: Tables, runs: pd.DataFrame, training: str, steps: float):
    cil, joint = of_system(runs, "baseline"), of_system(runs, "baseline", training)
    return pairs(cil, joint, {"training"}, tables, "nonlocality", steps)


def _minus_joint(tables: Tables, runs: pd.DataFrame, claim: str, training: str, steps: float, what: str) -> Evidence:
    found, refused = _twins(tables, runs, training, steps)
    if not found:
        return Evidence(refused=refused)
    cil, joint = (_levels(tables, side)[:, -1] for side in _sides(found))
    gap, n = cil - joint, images_of(tables, found[0][0], "nonlocality")  # [seeds, layers]
    whole = _part(PRIMARY[claim], f"{what}, mean over layers", "patches", gap.mean(1), PATCHES, n)
    return Evidence([whole, *_each_layer(what, gap, n)], refused)


def _lpa_pairs(tables: Tables, runs: pd.DataFrame, kind: str, system: str = "baseline", setting: str = MAIN):
    """(run with LPA, run without) of each seed, and sentences for those refused."""
    with_lpa, without = of_system(runs, f"{system}-lpa", setting=setting), of_system(runs, system, setting=setting)
    return pairs(with_lpa, without, {"n_lpa"}, tables, kind)


def lpa_stays_low(tables: Tables, runs: pd.DataFrame) -> Evidence:
    found, refused = _lpa_pairs(tables, runs, "nonlocality")
    if not found:
        return Evidence(refused=refused)
    lpa, plain = (_levels(tables, side).mean(2) for side in _sides(found))  # [seeds, tasks]
    start_lpa, start_plain = (initial_layers_of(tables, side).mean(1) for side in _sides(found))  # [seeds]
    level = plain[:, -1] - lpa[:, -1]
    since_start = level - (start_plain - start_lpa)
    n, unit = images_of(tables, found[0][0], "nonlocality"), "patches"
    parts = [
        _part(PRIMARY["C3"], "growth of D_loc from after the first task to after the last, mean over layers: baseline minus "
              "that with LPA", unit, level - (plain[:, 0] - lpa[:, 0]), PATCHES, n),
        _part("level", "D_loc after the last task, mean over layers: baseline minus that with LPA (much of it is there from "
              "the start)", unit, level, PATCHES, n),
    ]  # fmt: skip
    known = ~np.isnan(since_start)
    if known.any():
        what = "D_loc after the last task less that before training, mean over layers: baseline minus that with LPA"
        parts.append(_part("level less its start", what, unit, since_start[known], PATCHES, n))
    return Evidence(parts, refused)


def lpa_pays(tables: Tables, runs: pd.DataFrame) -> Evidence:
    percent, parts, refused = percents(tables), [], []
    asked = [
        (PRIMARY["C4"], "Avg", 1, "baseline", MAIN),
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
            parts.append(_part(name, words, "points", values, POINTS, tested(tables, found[0][0])))
    return Evidence(parts, refused)


def eigenvalues_grow(tables: Tables, runs: pd.DataFrame) -> Evidence:
    found, refused = _lpa_pairs(tables, runs, "spectrum")
    if not found:
        return Evidence(refused=refused)
    ratios, n = eigenvalue_ratios(tables, found), images_of(tables, found[0][0], "spectrum")
    of_what = "token that the newest head is fed, all classes, mean over tasks"
    largest = [logs[logs.index.get_level_values("rank") < 5].mean() for logs in ratios]
    ratio = "log10 of eigenvalue with LPA over that without, mean over"
    return Evidence([
        _part(PRIMARY["C5"], f"{ratio} ranks; {of_what}", "decades", [logs.mean() for logs in ratios], DECADES, n),
        _part("effective rank", f"effective rank with LPA minus without; {of_what}", "dimensions",
              rank_gains(tables, found), math.nan, n),
        _part("largest five", f"{ratio} the five largest; {of_what}", "decades", largest, DECADES, n),
    ], refused)  # fmt: skip


def _gains(tables: Tables, runs: pd.DataFrame, systems: dict[float, tuple[str, str]], free: set[str]):
    """Avg of a system minus that of another one, points, for each (system, other): key -> Series by seed; and sentences."""
    percent, seed = percents(tables), runs.set_index("run")["seed"]
    gains, refused = {}, []
    for key, (system, other) in systems.items():
        found, not_these = pairs(of_system(runs, system), of_system(runs, other), free, tables, "accuracy")
        by_seed = {seed[left]: percent[left]["Avg"] - percent[right]["Avg"] for left, right in found}
        gains[key] = pd.Series(by_seed, dtype=float)
        refused += not_these
    return gains, refused


def best_near(tables: Tables, runs: pd.DataFrame) -> Evidence:
    systems = {value: ("baseline-lpa", f"baseline-lambda-{value:g}") for value in OTHER_LAMBDAS}
    gains, refused = _gains(tables, runs, systems, {"lambda_init"})
    parts, n = [], _tested_baseline(tables, runs)
    complete = pd.DataFrame(gains).dropna()  # [seeds, other values]
    if len(complete):
        others = ", ".join(f"{value:g}" for value in OTHER_LAMBDAS)
        what = f"Avg with lambda_init 0.02 minus the mean of Avg with {others}"
        parts.append(_part(PRIMARY["C6"], what, "points", complete.mean(axis=1), POINTS, n))
    for value, gain in gains.items():
        if len(gain):
            words = f"Avg with lambda_init 0.02 minus Avg with {value:g}"
            parts.append(_part(f"against {value:g}", words, "points", gain, POINTS, n))
    return Evidence(parts, refused)


def more_layers(tables: Tables, runs: pd.DataFrame) -> Evidence:
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
    parts = [_part(PRIMARY["C7"], what, "points a layer", slopes(above_none, 1), margin, n)]
    for k, step in enumerate(np.diff(above_none).T):
        words = f"Avg with {k + 1} LPA layers minus Avg with {k}"
        parts.append(_part(f"{k} to {k + 1}", words, "points", step, margin, n))
    return Evidence(parts, refused)


def _tested_baseline(tables: Tables, runs: pd.DataFrame) -> int:
    """Test images of the main setting."""
    names = measured(tables, runs[runs["setting"] == MAIN], "accuracy")
    return tested(tables, names[0]) if names else 0


def shallow_serves(tables: Tables, runs: pd.DataFrame) -> Evidence:
    plain = of_system(runs, "baseline")
    located = set(measured(tables, plain, "nonlocality"))
    names = [run for run in measured(tables, plain, "transfer") if run in located]
    return Evidence([replace(part, margin=RHO) for part in over_layers(tables, names)] if names else [])


EVIDENCE: dict[str, Callable[[Tables, pd.DataFrame], Evidence]] = {
    "C1": grows,
    "C2": joint_is_less,
    "C2*": joint_as_long_is_less,
    "C3": lpa_stays_low,
    "C4": lpa_pays,
    "C5": eigenvalues_grow,
    "C6": best_near,
    "C7": more_layers,
    "C8": shallow_serves,
}
