"""Class-incremental learning and catastrophic forgetting: what is still known of each task (the paper's figure 1)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ["title", "task", "on_task", "accuracy"]
NUMBERED = 12  # tasks, beyond which numbers would not be readable in the cells


@style.look()
def draw(frame: pd.DataFrame) -> Figure:
    """A panel a title: accuracy in percent on the test images of each task (across) after each task (down), from 1.

    frame: COLUMNS, accuracy 0 to 1 among all classes seen. Raises ValueError for an empty one.
    """
    if frame.empty:
        raise ValueError("no accuracy to draw")
    panels = {title: rows for title, rows in frame.groupby("title", sort=False)}
    figure = Figure(figsize=(min(2.6 * len(panels) + 0.7, 7.2), 2.75 if len(panels) < 3 else 2.3))
    top = 100 * frame["accuracy"].max()
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        a = 100 * rows.pivot(index="task", columns="on_task", values="accuracy").to_numpy()
        drawn = axes.imshow(a, cmap=style.SEQUENTIAL, vmin=0, vmax=top)
        for (i, j), value in np.ndenumerate(a):
            if not math.isnan(value) and len(a) <= NUMBERED:
                colour = "white" if value < 0.55 * top else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=5.5, color=colour)
        ticks = np.unique(np.linspace(0, len(a) - 1, min(len(a), 5)).round().astype(int))
        axes.set_xticks(ticks, labels=ticks + 1)
        axes.set_yticks(ticks, labels=ticks + 1)
        axes.set(title=title, xlabel="test images of task")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    grid[0].set_ylabel("after task")
    bar = figure.colorbar(drawn, ax=list(grid), label="accuracy (%)", aspect=25)
    bar.outline.set_linewidth(0.4)
    return figure
