"""What the pictures of attention over the example images gather (figures 2 and 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from figures import attention_examples
from figures.attention_examples import Example
from figures.paper.artifact import artifact
from figures.paper.artifacts.common import WORDS, need, some_of, usual
from figures.paper.selection import Tables
from locality_probe.tables import INITIAL, after_tasks

MOST_TASKS = 5  # maps beside each other


@artifact(
    "fig2",
    "Figure 2: locality degradation, attention of the middle patch and D_loc of the deepest layer",
    needs=lambda runs: runs.one_of(["baseline", runs.twins["baseline"]]),
    kinds=("attention", "nonlocality"),
    section="attention",
)
def fig2(tables: Tables):
    """The deepest layer of one seed of the baseline and of its joint twin: where the middle patch of the first example image
    looks (mean over heads, 0 to 1), and D_loc over tasks (mean over heads, patches)."""
    runs = _baseline(tables)
    rows = tables["attention.parquet"]
    layer, image = rows["layer"].max(), rows["image"].iloc[0]
    frame, examples = _maps(tables, runs, [image], layer)
    distances = after_tasks(tables["nonlocality.parquet"]).merge(runs[["run"]], on="run")
    distances = distances[(distances["layer"] == layer) & (distances["task"] != INITIAL)]
    distances = distances.groupby(["training", "task"], as_index=False, sort=False)["d_loc"].mean()
    return frame, attention_examples.draw(frame, examples, distances), runs["run"]


@artifact(
    "fig3",
    "Figure 3: attention of the middle patch in the middle layer, joint training against CIL",
    needs=lambda runs: runs.one_of(["baseline", runs.twins["baseline"]]),
    kinds=("attention",),
    section="attention",
)
def fig3(tables: Tables):
    """The middle layer of one seed of the baseline and of its joint twin: where the middle patch of each example image looks,
    mean over heads, 0 to 1."""
    runs = _baseline(tables).sort_values("training", ascending=False)  # joint first, as in the paper
    rows = tables["attention.parquet"]
    frame, examples = _maps(tables, runs, list(dict.fromkeys(rows["image"])), rows["layer"].max() // 2)
    return frame, attention_examples.draw(frame, examples), runs["run"]


def _baseline(tables: Tables) -> pd.DataFrame:
    """Rows of RUNS of the baseline and its joint twin, one seed each, whose attention is there."""
    runs, there = usual(tables), set(tables["attention.parquet"]["run"])
    runs = runs[runs["run"].isin(there)].sort_values(["seed"]).drop_duplicates(["title", "training"])
    runs = need(runs, "no attention over the examples")
    return need(runs[(runs["method"] == "baseline") & (runs["n_lpa"] == 0)], "no attention of the baseline")


def _maps(tables: Tables, runs: pd.DataFrame, images: list[str], layer: int) -> tuple[pd.DataFrame, dict[str, Example]]:
    """Mean over heads of the middle patch's attention: attention_examples.COLUMNS and `layer`; and the examples."""
    rows = tables["attention.parquet"]
    tasks = some_of(rows["task"].unique(), MOST_TASKS)
    grid = rows[["grid_rows", "grid_columns"]].iloc[0].to_numpy()
    middle = int(grid[0] // 2), int(grid[1] // 2)
    rows = rows[(rows["layer"] == layer) & (rows["query"] == middle[0] * grid[1] + middle[1])]
    parts = []
    for _, run in runs.iterrows():
        for image in images:
            for task in tasks:
                heads = rows[(rows["run"] == run["run"]) & (rows["image"] == image) & (rows["task"] == task)]
                parts.append(_map(heads, grid).assign(
                    image=image, title=WORDS[run["training"]], training=run["training"], task=task,
                ))  # fmt: skip
    shown = tables["examples.parquet"].set_index("image")
    examples = {
        name: Example(np.frombuffer(shown.loc[name, "rgb"], np.uint8).reshape(*shown.loc[name, ["rows", "columns"]], 3), middle)
        for name in images
    }  # fmt: skip
    return pd.concat(parts)[attention_examples.COLUMNS].assign(layer=layer), examples


def _map(heads: pd.DataFrame, grid: np.ndarray) -> pd.DataFrame:
    """Mean over rows of ATTENTION, one per head, as one row per patch: row, column, attention (0 to 1)."""
    weights = np.stack([np.frombuffer(row, np.uint8) for row in heads["weights"]]) / 255
    mean = (weights * heads["peak"].to_numpy()[:, None]).mean(0).reshape(grid)
    row, column = np.indices(tuple(grid))
    return pd.DataFrame({"row": row.ravel(), "column": column.ravel(), "attention": mean.ravel()})
