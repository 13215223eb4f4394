"""Covariance eigenvalues with and without LPA, side by side at several tasks (the paper's figure 7)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ["title", "task", "rank", "eigenvalue", "eigenvalue_normalised"]
CONVENTIONS = {"eigenvalue": "eigenvalue", "eigenvalue_normalised": "eigenvalue / sum"}
LOOKS = ({"color": style.BLUE}, {"color": style.ORANGE, "linestyle": "--"}, {"color": style.GREEN, "linestyle": ":"})


@style.look()
def draw(frame: pd.DataFrame) -> Figure:
    """A column a task (counted from 1), a line a title: above the eigenvalues as they are, below over their sum, which the
    norm of the features does not change; against their rank (from 1), both axes logarithmic.

    frame: COLUMNS. Raises ValueError for an empty one.
    """
    if frame.empty:
        raise ValueError("no eigenvalue to draw")
    tasks = sorted(frame["task"].unique())
    figure = Figure(figsize=(1.6 * len(tasks) + 0.9, 4.0))
    panels = figure.subplots(len(CONVENTIONS), len(tasks), squeeze=False, sharex=True, sharey="row")
    for row, (column, label) in zip(panels, CONVENTIONS.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, task in zip(row, tasks, strict=True):
            lines = frame[frame["task"] == task].groupby("title", sort=False)
            for (title, values), how in zip(lines, LOOKS, strict=False):
                values = values[values[column] > 1e-12 * values[column].max()]  # rounding is no eigenvalue
                axes.plot(values["rank"] + 1, values[column], label=title, **how)
            axes.set(xscale="log", yscale="log")
    for axes, task in zip(panels[0], tasks, strict=True):
        axes.set_title(f"task {task + 1}")
    for axes in panels[-1]:
        axes.set_xlabel("rank")
    handles, labels = panels[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
