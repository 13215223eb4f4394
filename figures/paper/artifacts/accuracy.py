"""What the pictures of accuracy gather: what is forgotten (figure 1), and the curves over classes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from figures import accuracy_curves, forgetting
from figures.paper.artifact import artifact
from figures.paper.artifacts.common import WORDS, need, setting_title, usual
from figures.paper.scales import BOTH
from figures.paper.selection import Tables, first_setting

SHOWN = [("baseline", "incremental"), ("baseline", "joint"), ("baseline + LPA", "incremental")]  # panels of figure 1


@artifact(
    "fig1",
    "Figure 1: class-incremental learning and catastrophic forgetting",
    needs=lambda runs: runs.of([*BOTH, runs.twins["baseline"]]),
    section="accuracy",
)
def fig1(tables: Tables):
    """Accuracy on each task's classes after each task, 0 to 1, mean over seeds: one panel per regime of SHOWN."""
    runs = first_setting(usual(tables))
    runs = need(runs[runs["method"] == "baseline"], "no baseline")
    rows = tables["accuracy.csv"].merge(runs[["run", "title", "training"]], on="run")
    means = rows.groupby(["title", "training", "task", "on_task"], as_index=False)["accuracy"].mean()
    panels = [
        means[(means["title"] == title) & (means["training"] == training)].assign(title=f"{title}, {WORDS[training]}")
        for title, training in SHOWN
    ]
    frame = need(pd.concat(panels)[forgetting.COLUMNS], "no baseline")
    return frame, forgetting.draw(frame), rows["run"]


@artifact(
    "curves",
    "Accuracy over all classes seen so far",
    needs=lambda runs: [*runs.of_tables(False), *runs.of_tables(True), *runs.of(runs.twins.values())],
    section="accuracy",
)
def curves(tables: Tables):
    """Share of the test images of all classes seen so far that is classified rightly: mean, least and most over seeds."""
    runs = need(usual(tables), "no system of the tables")
    rows = tables["accuracy.csv"].merge(runs[["run", "setting", "title", "training", "classes"]], on="run")
    of_task = ["setting", "title", "training", "run", "task"]
    after = rows.groupby(of_task, as_index=False, sort=False)[["images", "correct"]].sum()
    after["accuracy"] = after["correct"] / after["images"]
    place = {run: i for i, run in enumerate(runs.sort_values(["training", "method", "n_lpa"])["run"])}
    after = after.sort_values("run", key=lambda names: names.map(place), kind="stable")
    # Classes seen: all classes of the run, in proportion to the images that it was tested on by then.
    total = after.groupby("run")["images"].transform("max")
    after = after.merge(runs[["run", "classes"]], on="run")
    after["classes"] = (after["classes"] * after["images"] / total).round().astype(int)
    points = []
    for (setting, *regime_and_classes), same in after.groupby(["setting", "title", "training", "classes"], sort=False):
        values = same["accuracy"].to_numpy()
        low, high = (values.min(), values.max()) if len(values) > 1 else (np.nan, np.nan)
        points.append((setting_title(setting), *regime_and_classes, values.mean(), low, high, len(values)))
    frame = pd.DataFrame(points, columns=accuracy_curves.COLUMNS)
    return frame, accuracy_curves.draw(frame), after["run"]
