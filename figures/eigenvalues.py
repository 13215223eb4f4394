"""Covariance eigenvalues with and without LPA, side by side at several tasks (the paper's figure 7)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ["title", "task", "rank", "eigenvalue", "eigenvalue_normalised", "ratio", "low", "high"]
CONVENTIONS = {"eigenvalue": "eigenvalue", "eigenvalue_normalised": "eigenvalue / sum"}
LOOKS = ({"color": style.BLUE}, {"color": style.ORANGE, "linestyle": "--"}, {"color": style.GREEN, "linestyle": ":"})


@style.look()
def draw(frame: pd.DataFrame) -> Figure:
    """A column a task (counted from 1), a line a title: the eigenvalues as they are, over their sum, which the norm of the
    features does not change, and as a multiple of the first title's; against their rank (from 1), axes logarithmic.

    frame: COLUMNS; the interval low..high of ratio is NaN where there is none. Raises ValueError for an empty one.
    """
    if frame.empty:
        raise ValueError("no eigenvalue to draw")
    tasks = sorted(frame["task"].unique())
    several = frame["title"].nunique() > 1
    figure = Figure(figsize=(1.6 * len(tasks) + 0.9, 4.0 + 1.7 * several))
    panels = figure.subplots(len(CONVENTIONS) + several, len(tasks), squeeze=False, sharex=True, sharey="row")
    for row, (column, label) in zip(panels, CONVENTIONS.items(), strict=False):
        row[0].set_ylabel(label)
        for axes, task in zip(row, tasks, strict=True):
            lines = frame[frame["task"] == task].groupby("title", sort=False)
            for (title, values), how in zip(lines, LOOKS, strict=False):
                values = values[values[column] > 1e-12 * values[column].max()]  # rounding is no eigenvalue
                axes.plot(values["rank"] + 1, values[column], label=title, **how)
            axes.set(xscale="log", yscale="log")
    for axes, task in zip(panels[-1] if several else [], tasks, strict=False):
        lines = frame[frame["task"] == task].groupby("title", sort=False)
        for (_, values), how in zip(lines, LOOKS, strict=False):
            axes.fill_between(
                values["rank"] + 1, values["low"], values["high"], color=how["color"], alpha=0.2, linewidth=0
            )
            axes.plot(values["rank"] + 1, values["ratio"], color=how["color"])
        axes.set_xscale("log")
    if several:
        panels[-1, 0].set_ylabel(f"eigenvalue /\nthat of the {frame['title'].iloc[0]}")
    for axes, task in zip(panels[0], tasks, strict=True):
        axes.set_title(f"task {task + 1}")
    for axes in panels[-1]:
        axes.set_xlabel("rank")
    handles, labels = panels[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
