"""Eigenvalues of the covariance of a layer's features over the tasks (the paper's figure 7)."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import style
from locality_probe.tables import INITIAL, SPECTRUM


@style.look()
def draw(
    spectrum: pd.DataFrame, layer: str = "token", group: str = "all", normalised: bool = True, first: int = 0
) -> Figure:  # fmt: skip
    """Eigenvalues against their rank (1 is the largest), both logarithmic: one panel per run, one line per task.

    `spectrum` has the columns of SPECTRUM. normalised: over their sum, so that networks of other feature norms compare.
    first: the number of the first task in the drawing; 1 in the paper's figures. The network as initialised is dashed.
    Raises ValueError for a layer or group that is not there.
    """
    frame = SPECTRUM.check(spectrum)
    for column, wanted in (("layer", layer), ("group", group)):
        if wanted not in set(frame[column]):
            raise ValueError(f"no {column} {wanted!r}; there: {', '.join(dict.fromkeys(frame[column]))}")
    frame = frame[(frame["layer"] == layer) & (frame["group"] == group)]
    column = "eigenvalue_normalised" if normalised else "eigenvalue"
    runs = dict(list(frame.groupby("run", sort=False)))
    across = min(len(runs), 4)
    down = -(-len(runs) // across)
    figure = Figure(figsize=(2.3 * across + 1.0, 2.1 * down + 0.3))
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    last = max(frame["task"].max(), 0)
    colours, scale = matplotlib.colormaps[style.SEQUENTIAL], Normalize(first, first + max(last, 1))
    for axes, (run, rows) in zip(panels.flat, runs.items(), strict=False):
        axes.set_title(run)
        axes.set(xscale="log", yscale="log")
        for task, values in rows.groupby("task"):
            values = values[values[column] > 1e-12 * values[column].max()]  # rounding is no eigenvalue
            start = {"color": style.REFERENCE, "linestyle": "--", "linewidth": 1, "label": "as initialised"}
            how = start if task == INITIAL else {"color": colours(scale(task + first)), "label": f"task {task + first}"}
            axes.plot(values["rank"] + 1, values[column], **how)
    for axes in panels.flat[len(runs) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("eigenvalue" + " / sum" * normalised)
    for axes in panels[-1]:
        axes.set_xlabel("rank")
    mappable = matplotlib.cm.ScalarMappable(scale, colours)
    bar = figure.colorbar(mappable, ax=list(figure.axes), label="task", aspect=30)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.outline.set_linewidth(0.4)
    figure.suptitle(f"{layer}, {group} classes", weight="bold")
    return figure
