"""What the picture of covariance eigenvalues gathers (figure 7)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from figures import eigenvalues
from figures.paper.artifact import artifact
from figures.paper.artifacts.common import need, some_of, usual
from figures.paper.judge import MIN_SEEDS
from figures.paper.scales import BOTH
from figures.paper.selection import Tables, first_setting
from locality_probe.intervals import over_seeds
from locality_probe.tables import INITIAL

MOST_TASKS = 4  # columns of panels


@artifact(
    "fig7",
    "Figure 7: covariance eigenvalues of the token that the newest head is fed, with and without LPA",
    needs=lambda runs: runs.of(BOTH),
    kinds=("spectrum",),
    section="spectra",
)
def fig7(tables: Tables):
    """Eigenvalues by rank over test images of all classes, as they are and divided by their sum, means over seeds; and how
    many times as large as the baseline's they are."""
    runs = first_setting(usual(tables))
    runs = runs[(runs["method"] == "baseline") & (runs["training"] == "incremental")]
    runs = need(runs[runs["run"].isin(tables["spectrum.parquet"]["run"])], "no spectrum")
    rows = tables["spectrum.parquet"].merge(runs[["run", "title", "seed"]], on="run")
    rows = rows[(rows["layer"] == "token") & (rows["group"] == "all") & (rows["task"] != INITIAL)]
    rows = rows[rows["task"].isin(some_of(rows["task"].unique(), MOST_TASKS))]
    frame = rows.groupby(["title", "task", "rank"], as_index=False)[["eigenvalue", "eigenvalue_normalised"]].mean()
    frame = frame.merge(_ratios(rows), on=["title", "task", "rank"], how="left")
    return frame[eigenvalues.COLUMNS], eigenvalues.draw(frame), runs["run"]


def _ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """How many times as large as the first title's of the same seed each eigenvalue is: geometric mean over seeds, and its
    95 % interval over them at each rank by itself, where there are MIN_SEEDS."""
    values = rows.set_index(["task", "rank", "title", "seed"])["eigenvalue"]
    logs = np.log(values.where(values > 0)).unstack(["title", "seed"])
    titles, parts = sorted(rows["title"].unique()), []
    for title in titles:
        ratios = (logs[title] - logs[titles[0]]).dropna(axis=1, how="all").T.to_numpy()  # of seeds that both have
        low, high = over_seeds(ratios) if len(ratios) >= MIN_SEEDS else np.full((2, ratios.shape[1]), np.nan)
        ends = dict(zip(("ratio", "low", "high"), np.exp([ratios.mean(0), low, high]), strict=True))
        parts.append(pd.DataFrame({"title": title, **ends}, index=logs.index).reset_index())
    return pd.concat(parts)
