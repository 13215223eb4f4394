"""The paper's eight claims, each with a statistic and a rule that were written down before the small study was looked at.

C2* is none of the eight: a control that was added after C2 was looked at, with the same rule.

Every statistic is signed so that above 0 is what the paper says. A seed gives one value; the interval is Student's t over
seeds, 95 % for all parts of a claim at once (Bonferroni); where a statistic is a mean over test images, its bootstrap
interval over images, with these very weights, stands beside it. The rule:

- holds: at least MIN_SEEDS values, and both intervals lie above 0
- does not hold: at least MIN_SEEDS values, and both intervals lie below 0
- undecided at this scale: everything else

A claim of several parts holds if all of them hold, and does not hold if one of them does not. Two sides of a comparison
may differ in what the claim is about and in nothing else: settings, steps and probe images are compared, and a pair that
breaks this is refused and named in `reason`.

The scale `learned` has statistics and a rule of its own: figures.registered. Which runs and pairs there are: figures.selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats

from cil.evaluate import scores
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
    scope,
    systems,
)
from locality_probe.intervals import bootstrap, over_seeds
from locality_probe.tables import CLAIMS

MIN_SEEDS = 3
NEAR = (0.01, 0.05)  # the lambda_init that count as near the paper's 0.02
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this scale"
SENTENCES = {
    "C1": "D_loc grows as tasks go on, most in deep layers (figure 4)",
    "C2": "joint learning has less nonlocality in each layer (figure 4)",
    "C2*": "joint learning with as many steps as CIL has less nonlocality in each layer (control)",
    "C3": "with LPA, D_loc stays low over tasks (figure 6)",
    "C4": "LPA raises Last and Avg, and lowers Fgt (tables 1 and 2)",
    "C5": "with LPA the covariance eigenvalues are larger (figure 7)",
    "C6": "the best lambda_init is near 0.02 (figure 8)",
    "C7": "more LPA layers are better, steadily (figure 9)",
    "C8": "shallow layers transfer better and are more local (figure 5)",
}
REGISTERED = "learned"  # the scale that figures.registered judges


@dataclass
class Part:
    """A statistic: `values` [seeds or pairs], and where it is a mean over images `images` [images], averaged over seeds.

    margin: the smallest effect that matters, in `unit`; NaN where the rule has none.
    """

    name: str
    statistic: str
    unit: str
    values: np.ndarray
    images: np.ndarray | None = None
    number_of_images: int = 0
    margin: float = math.nan


@dataclass
class Evidence:
    """The parts of a claim, and a sentence for what was left out."""

    parts: list[Part] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def judge(tables: Tables) -> pd.DataFrame:
    """The table CLAIMS of a study of one scale: for each claim a row as a whole, then a row a part."""
    runs, rows = tables["runs.csv"], []
    scale = runs["scale"].iloc[0] if len(runs) else ""
    if scale == REGISTERED:
        from figures.paper import registered  # which takes its statistics from this module

        return registered.judge(tables)
    for claim, collect in EVIDENCE.items():
        evidence = collect(tables, scope(runs)) if len(runs) else Evidence()
        parts = [_row(claim, part, len(evidence.parts), scale) for part in evidence.parts]
        rows += [_whole(claim, parts, evidence.refused, scale), *parts]
    return CLAIMS.check(pd.DataFrame(rows, columns=list(CLAIMS.columns)))


def verdict(values: np.ndarray, low: float, high: float, low_images: float, high_images: float) -> str:
    """The rule of this module; without an interval over images (NaN) the one over seeds alone decides."""
    if len(values) >= MIN_SEEDS:
        if low > 0 and not low_images <= 0:
            return HOLDS
        if high < 0 and not high_images >= 0:
            return FAILS
    return UNDECIDED


def _row(claim: str, part: Part, parts: int, scale: str) -> dict[str, object]:
    values = np.asarray(part.values, float)
    low, high = over_seeds(values, parts) if len(values) > 1 else (math.nan, math.nan)
    over_images = bootstrap(part.images) if part.images is not None else (math.nan, math.nan)
    reason = f"{len(values)} of at least {MIN_SEEDS} seeds" if len(values) < MIN_SEEDS else ""
    judged = verdict(values, low, high, *over_images)
    return part_row(claim, part, scale, (low, high), judged, reason, over_images=over_images)


def part_row(
    claim: str, part: Part, scale: str, over_seeds: tuple[float, float], verdict: str, reason: str,
    over_images: tuple[float, float] = (math.nan, math.nan), power: float = math.nan,
) -> dict[str, object]:  # fmt: skip
    """A row of CLAIMS about a part, with its intervals (low, high)."""
    return {
        "claim": claim, "part": part.name, "statistic": part.statistic, "unit": part.unit, "value": np.mean(part.values),
        "low": over_seeds[0], "high": over_seeds[1], "low_images": over_images[0], "high_images": over_images[1],
        "margin": part.margin, "power": power, "seeds": len(part.values), "images": part.number_of_images, "scale": scale,
        "verdict": verdict, "reason": reason,
    }  # fmt: skip


def whole_row(
    claim: str, parts: list[dict], seeds: int, scale: str, verdict: str, reasons: list[str]
) -> dict[str, object]:
    """A row of CLAIMS about a claim as a whole, given the rows of its parts."""
    empty = dict.fromkeys(("value", "low", "high", "low_images", "high_images", "margin", "power"), math.nan)
    return {
        "claim": claim, "part": "", "statistic": SENTENCES[claim], "unit": "", **empty, "seeds": seeds,
        "images": max((part["images"] for part in parts), default=0), "scale": scale, "verdict": verdict,
        "reason": "; ".join(reasons),
    }  # fmt: skip


def _whole(claim: str, parts: list[dict], refused: list[str], scale: str) -> dict[str, object]:
    by_verdict = {
        verdict: [p["part"] for p in parts if p["verdict"] == verdict] for verdict in (FAILS, HOLDS, UNDECIDED)
    }
    verdict = FAILS if by_verdict[FAILS] else HOLDS if parts and not by_verdict[UNDECIDED] else UNDECIDED
    words = {FAILS: "the opposite shows", HOLDS: "holds", UNDECIDED: "undecided"}
    reasons = [f"{words[v]}: {', '.join(names)}" for v, names in by_verdict.items() if names] or ["not run"]
    if verdict == HOLDS:
        reasons = ["every part holds"]
    seeds = min((part["seeds"] for part in parts), default=0)
    return whole_row(claim, parts, seeds, scale, verdict, [*reasons, *refused])


# What is computed.


def slopes(y: np.ndarray, axis: int) -> np.ndarray:
    """Least-squares slope of y against 0, 1, 2 ... along an axis."""
    x = np.arange(y.shape[axis]) - (y.shape[axis] - 1) / 2
    return np.tensordot(y, x / (x**2).sum(), axes=(axis, 0))


def grows(tables: Tables, runs: pd.DataFrame) -> Evidence:
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


def joint_is_less(tables: Tables, runs: pd.DataFrame) -> Evidence:
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


def joint_as_long_is_less(tables: Tables, runs: pd.DataFrame) -> Evidence:
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


def lpa_stays_low(tables: Tables, runs: pd.DataFrame) -> Evidence:
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


def lpa_pays(tables: Tables, runs: pd.DataFrame) -> Evidence:
    found, refused = [], []
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


def eigenvalues_grow(tables: Tables, runs: pd.DataFrame) -> Evidence:
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


def _of_token(frame: pd.DataFrame, run: str) -> pd.DataFrame:
    kept = (frame["run"] == run) & (frame["layer"] == "token") & (frame["group"] == "all") & (frame["task"] >= 0)
    return frame[kept]


def eigenvalue_ratios(tables: Tables, found: list[tuple[str, str]]) -> list[pd.Series]:
    """For each pair (with LPA, without): log10 of the ratio of eigenvalues, by (task, rank), of the newest head's token."""
    rows = tables["spectrum.parquet"]
    logs = [
        [_of_token(rows, run).set_index(["task", "rank"])["eigenvalue"].map(np.log10) for run in pair] for pair in found
    ]
    return [lpa - plain for lpa, plain in logs]


def rank_gains(tables: Tables, found: list[tuple[str, str]]) -> np.ndarray:
    """Effective rank with LPA minus without, of the newest head's token, mean over tasks: [pairs], dimensions."""
    rows = tables["spectrum_summary.parquet"]
    ranks = [[_of_token(rows, run)["effective_rank"].mean() for run in pair] for pair in found]
    return np.array([lpa - plain for lpa, plain in ranks])


def best_near(tables: Tables, runs: pd.DataFrame) -> Evidence:
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


def more_layers(tables: Tables, runs: pd.DataFrame) -> Evidence:
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


def shallow_serves(tables: Tables, runs: pd.DataFrame) -> Evidence:
    mine = measured(tables, systems(first_setting(runs), lpa=False), "transfer")
    mine = [run for run in mine if run in measured(tables, systems(first_setting(runs), lpa=False), "nonlocality")]
    return Evidence(over_layers(tables, mine) if mine else [])


def over_layers(tables: Tables, runs: list[str]) -> list[Part]:
    """Of claim C8: Spearman's rho over layers, of D_loc and accuracy on future classes, and of each with depth."""
    rows = tables["transfer.parquet"]
    rows = rows[(rows["group"] == "future") & (rows["control"] == "none") & (rows["probe"] == "linear")]
    rows = rows[rows["layer"].str.startswith("block ")]
    rows = rows.assign(layer=rows["layer"].str.removeprefix("block ").astype(int))
    together, depth_local, depth_serves = [], [], []
    for run, distance in zip(runs, layers_of(tables, runs).mean(1), strict=True):  # [tasks, layers]
        accuracy = rows[rows["run"] == run].pivot(index="task", columns="layer", values="accuracy").to_numpy()
        depth = np.arange(distance.shape[1])
        later = range(len(accuracy))  # the last task has no future
        together.append(np.mean([-_spearman(distance[t], accuracy[t]) for t in later]))
        depth_local.append(np.mean([_spearman(depth, distance[t]) for t in later]))
        depth_serves.append(np.mean([-_spearman(depth, accuracy[t]) for t in later]))
    n, rho = int(rows["test_images"].max()), "Spearman's rho over layers, mean over tasks"
    return [
        Part("local and useful", f"minus the {rho}, of D_loc and accuracy on future classes (linear probe)", "rho",
             np.array(together), None, n),
        Part("shallow is local", f"{rho}, of depth and D_loc", "rho", np.array(depth_local), None, n),
        Part("shallow is useful", f"minus the {rho}, of depth and accuracy on future classes (linear probe)", "rho",
             np.array(depth_serves), None, n),
    ]  # fmt: skip


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


def percents(tables: Tables) -> dict[str, dict[str, float]]:
    """Last, Avg, Fgt, BWT of every run in percent, weighted by image; without those that its training does not define."""
    training = tables["runs.csv"].set_index("run")["training"]
    rows = tables["accuracy.csv"]
    return {
        run: {metric: 100 * value for metric, value in scores(of_run.drop(columns="run"), training[run]).items()}
        for run, of_run in rows.groupby("run")
    }


def _lpa_pairs(tables: Tables, runs: pd.DataFrame, kind: str, method: str = "baseline"):
    return pairs(systems(runs, True, method), systems(runs, False, method), {"n_lpa"}, tables, kind)


def _side(tables: Tables, found: list[tuple[str, str]], side: int) -> np.ndarray:
    return layers_of(tables, [pair[side] for pair in found])


def _of_images(name: str, statistic: str, unit: str, values: np.ndarray) -> Part:
    """A statistic that is a mean over images: values [runs, images]."""
    return Part(name, statistic, unit, values.mean(1), values.mean(0), values.shape[1])


def images_of(tables: Tables, run: str, kind: str) -> int:
    """How many images a measurement of a run took."""
    rows = tables["measurements.csv"]
    return int(rows.loc[(rows["kind"] == kind) & (rows["run"] == run), "images"].iloc[0])


def tested(tables: Tables, run: str) -> int:
    """How many test images the accuracy of a run is over."""
    rows = tables["accuracy.csv"]
    return int(rows[rows["run"] == run].groupby("on_task")["images"].first().sum())


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    """rho, and 0 where one of the two does not vary."""
    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(stats.spearmanr(x, y).statistic)
