"""What the statistics of several claims have in common: accuracies, slopes, eigenvalues, ranks, and over how many images."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from cil.evaluate import scores
from figures.paper.claim import Part
from figures.paper.selection import Tables, layers_of


def slopes(y: np.ndarray, axis: int) -> np.ndarray:
    """Least-squares slope of y against 0, 1, 2 ... along an axis."""
    x = np.arange(y.shape[axis]) - (y.shape[axis] - 1) / 2
    return np.tensordot(y, x / (x**2).sum(), axes=(axis, 0))


def percents(tables: Tables) -> dict[str, dict[str, float]]:
    """Last, Avg, Fgt, BWT of every run in percent, weighted by image; without those that its training does not define."""
    training = tables["runs.csv"].set_index("run")["training"]
    rows = tables["accuracy.csv"]
    return {
        run: {metric: 100 * value for metric, value in scores(of_run.drop(columns="run"), training[run]).items()}
        for run, of_run in rows.groupby("run")
    }


def images_of(tables: Tables, run: str, kind: str) -> int:
    """How many images a measurement of a run took."""
    rows = tables["measurements.csv"]
    return int(rows.loc[(rows["kind"] == kind) & (rows["run"] == run), "images"].iloc[0])


def tested(tables: Tables, run: str) -> int:
    """How many test images the accuracy of a run is over."""
    rows = tables["accuracy.csv"]
    return int(rows[rows["run"] == run].groupby("on_task")["images"].first().sum())


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


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    """rho, and 0 where one of the two does not vary."""
    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(stats.spearmanr(x, y).statistic)
