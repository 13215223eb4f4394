"""The rules that judge the paper's claims from a study's tables. Knows no single claim: see figures.paper.claims.

Every statistic is signed so that above 0 is what the paper says. A seed gives one value. There are two rules.

Where all parts decide (every scale but `learned`), the interval is Student's t over seeds, 95 % for all parts of a claim at
once (Bonferroni); where a statistic is a mean over test images, its bootstrap interval over images, with these very weights,
stands beside it. A part

- holds: at least MIN_SEEDS values, and both intervals lie above 0
- does not hold: at least MIN_SEEDS values, and both intervals lie below 0
- is undecided at this scale: everything else

A claim of several parts holds if all of them hold, and does not hold if one of them does not.

Where one primary part decides (`Claim.decides`; scale `learned`), the other parts are secondary: layers, further metrics,
further scenarios. They have the same numbers and a verdict each, and never decide. The interval of n values is for 95 %:

- Student's t over seeds
- where n is enough (6 for a primary statistic; at most MOST_SEEDS): also the exact interval `exact`, which inverts the
  sign-flip test of paired differences. It is exact if the differences are symmetric about the effect.
- the interval reported is the wider one: from the lesser of the low ends to the greater of the high ends

A primary statistic is one, so it is not corrected for multiplicity. The secondary parts of a claim hold at once (Bonferroni).
There are no intervals over images. The verdict is the first of these that is true, with `margin` the smallest effect that
matters:

1. fewer than MIN_SEEDS seeds: undecided at this scale
2. the interval lies inside (-margin, margin): no effect that matters
3. the interval lies above 0: holds
4. the interval lies below 0: does not hold
5. else: undecided at this scale; the reason says so if an effect of the margin in the paper's direction is ruled out
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from figures.paper.claim import Claim, Evidence, Part
from figures.paper.selection import Tables, scope
from locality_probe.intervals import bootstrap, over_seeds
from locality_probe.tables import CLAIMS

MIN_SEEDS = 3
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this scale"
NO_EFFECT = "no effect that matters"
ERROR = 0.05  # of the intervals, both sides together
MOST_SEEDS = 16  # the exact interval takes 2^n subsets

Row = dict[str, Any]  # of CLAIMS


def judge(tables: Tables, claims: Mapping[str, Claim]) -> pd.DataFrame:
    """The table CLAIMS of a study of one scale: for each claim one row as a whole, then one row per part."""
    runs, rows = tables["runs.csv"], []
    scale = runs["scale"].iloc[0] if len(runs) else ""
    for claim in claims.values():
        evidence = claim.collect(tables, scope(runs)) if len(runs) else Evidence()
        rule = by_its_primary_part if claim.decides else by_all_parts
        rows += rule(claim, evidence, scale)
    return CLAIMS.check(pd.DataFrame(rows, columns=list(CLAIMS.columns)))


# Rows of CLAIMS.


def part_row(
    claim: Claim, part: Part, scale: str, over_seeds: tuple[float, float], verdict: str, reason: str,
    over_images: tuple[float, float] = (math.nan, math.nan), power: float = math.nan,
) -> Row:  # fmt: skip
    """A row of CLAIMS about a part, with its intervals (low, high)."""
    return {
        "claim": claim.name, "part": part.name, "statistic": part.statistic, "unit": part.unit,
        "value": np.mean(part.values), "low": over_seeds[0], "high": over_seeds[1], "low_images": over_images[0],
        "high_images": over_images[1], "margin": part.margin, "power": power, "seeds": len(part.values),
        "images": part.number_of_images, "scale": scale, "verdict": verdict, "reason": reason,
    }  # fmt: skip


def whole_row(claim: Claim, parts: list[Row], seeds: int, scale: str, verdict: str, reasons: list[str]) -> Row:
    """A row of CLAIMS about a claim as a whole, given the rows of its parts."""
    empty = dict.fromkeys(("value", "low", "high", "low_images", "high_images", "margin", "power"), math.nan)
    return {
        "claim": claim.name, "part": "", "statistic": claim.sentence, "unit": "", **empty, "seeds": seeds,
        "images": max((part["images"] for part in parts), default=0), "scale": scale, "verdict": verdict,
        "reason": "; ".join(reasons),
    }  # fmt: skip


# The rule where all parts decide.


def by_all_parts(claim: Claim, evidence: Evidence, scale: str) -> list[Row]:
    """Rows of CLAIMS about a claim that all its parts decide: the whole, then each part."""
    parts = [_judged_alone(claim, part, len(evidence.parts), scale) for part in evidence.parts]
    parts_that = {
        said: [part["part"] for part in parts if part["verdict"] == said] for said in (FAILS, HOLDS, UNDECIDED)
    }
    whole = FAILS if parts_that[FAILS] else HOLDS if parts and not parts_that[UNDECIDED] else UNDECIDED
    words = {FAILS: "the opposite shows", HOLDS: "holds", UNDECIDED: "undecided"}
    reasons = [f"{words[said]}: {', '.join(names)}" for said, names in parts_that.items() if names] or ["not run"]
    if whole == HOLDS:
        reasons = ["every part holds"]
    seeds = min((part["seeds"] for part in parts), default=0)
    return [whole_row(claim, parts, seeds, scale, whole, [*reasons, *evidence.refused]), *parts]


def _judged_alone(claim: Claim, part: Part, parts: int, scale: str) -> Row:
    """The row of one of `parts` parts, whose intervals hold at once."""
    values = np.asarray(part.values, float)
    low, high = over_seeds(values, parts) if len(values) > 1 else (math.nan, math.nan)
    first, last = bootstrap(part.images) if part.images is not None else (math.nan, math.nan)
    reason = f"{len(values)} of at least {MIN_SEEDS} seeds" if len(values) < MIN_SEEDS else ""
    judged = verdict(values, low, high, first, last)
    return part_row(claim, part, scale, (low, high), judged, reason, over_images=(first, last))


def verdict(values: np.ndarray, low: float, high: float, low_images: float, high_images: float) -> str:
    """The rule where all parts decide; without an interval over images (NaN) the interval over seeds alone decides."""
    if len(values) >= MIN_SEEDS:
        if low > 0 and not low_images <= 0:
            return HOLDS
        if high < 0 and not high_images >= 0:
            return FAILS
    return UNDECIDED


# The rule where a primary part decides.


def by_its_primary_part(claim: Claim, evidence: Evidence, scale: str) -> list[Row]:
    """Rows of CLAIMS about a claim that its primary part decides: the whole, then each part."""
    secondary = sum(part.name != claim.decides for part in evidence.parts)
    parts = [
        _judged_by_margin(claim, part, 1 if part.name == claim.decides else secondary, scale) for part in evidence.parts
    ]
    return [_decided_whole(claim, parts, evidence.refused, scale), *parts]


def _decided_whole(claim: Claim, parts: list[Row], refused: list[str], scale: str) -> Row:
    """The row of a claim as a whole: the verdict of its primary part, given the rows of its parts."""
    for part in parts:
        if part["part"] == claim.decides:
            reasons = [f"{part['part']} decides: {part['reason']}", *refused]
            return whole_row(claim, parts, part["seeds"], scale, part["verdict"], reasons)
    return whole_row(claim, parts, 0, scale, UNDECIDED, ["not run", *refused])


def _judged_by_margin(claim: Claim, part: Part, at_once: int, scale: str) -> Row:
    low, high = interval(part.values, at_once)
    judged, reason = verdict_by_margin(len(part.values), low, high, part.margin, part.unit)
    return part_row(claim, part, scale, (low, high), judged, reason, power=power(part.values, part.margin, at_once))


def verdict_by_margin(seeds: int, low: float, high: float, margin: float, unit: str = "") -> tuple[str, str]:
    """(verdict, what it rests on) of an interval by the rule where a primary part decides; a margin of NaN is none."""
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
    ends = np.array([over_seeds(values, at_once), exact(values, at_once)])
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
