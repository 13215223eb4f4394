"""What the pictures of sweeps gather: accuracy against lambda_init (figure 8) and the number of LPA layers (figure 9)."""

from __future__ import annotations

import pandas as pd

from figures import style, sweeps
from figures.paper.artifact import NotRun, artifact
from figures.paper.claims.quantities import percents
from figures.paper.selection import Tables, depth_sweep, lambda_sweep, scope


@artifact(
    "fig8",
    "Figure 8: accuracy against lambda at initialisation",
    needs=lambda runs: runs.sweep(f"baseline-lambda-{value:g}" for value in runs.scale.lambdas),
    section="sweeps",
)
def fig8(tables: Tables):
    """Last, Avg and Fgt of the baseline with LPA, percent, at each lambda_init and seed; the paper's 0.02 is marked."""
    runs = lambda_sweep(scope(tables["runs.csv"]))
    return _sweep(tables, runs, "lambda_init", f"{style.LAMBDA} at initialisation", marked=0.02, logarithmic=True)


@artifact(
    "fig9",
    "Figure 9: accuracy against the number of LPA layers",
    needs=lambda runs: runs.sweep(f"baseline-nlpa-{n}" for n in range(runs.depth)),
    section="sweeps",
)
def fig9(tables: Tables):
    """Last, Avg and Fgt of the baseline, percent, with each number of LPA layers, from the first on, and each seed."""
    runs = depth_sweep(scope(tables["runs.csv"]))
    return _sweep(tables, runs, "n_lpa", "LPA layers", marked=None, logarithmic=False)


def _sweep(tables: Tables, runs: pd.DataFrame, column: str, label: str, marked: float | None, logarithmic: bool):
    """Metrics of runs against one of their columns."""
    if runs[column].nunique() < 2:
        raise NotRun(f"fewer than two values of {column}")
    percent = percents(tables)
    frame = pd.DataFrame(
        [(row[column], row["seed"], metric, percent[row["run"]][metric])
         for _, row in runs.iterrows() for metric in sweeps.METRICS],
        columns=sweeps.COLUMNS,
    )  # fmt: skip
    return frame, sweeps.draw(frame, label, logarithmic, marked), runs["run"]
