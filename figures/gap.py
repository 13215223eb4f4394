"""How much farther CIL looks than joint training: layers by tasks, one glance a system."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.attention_maps import DIVERGING

COLUMNS = ["title", "task", "layer", "difference", "low", "high", "over", "n"]


@style.look()
def draw(frame: pd.DataFrame) -> Figure:
    """A panel a title: difference of D_loc in hundredths of a patch, tasks across and layers down, both from 1.

    frame: COLUMNS, patches; numbers are bold where the interval low..high excludes 0. Raises ValueError for an empty one.
    """
    if frame.empty:
        raise ValueError("no difference to draw")
    panels = {title: rows for title, rows in frame.groupby("title", sort=False)}
    layers, tasks = frame["layer"].nunique(), frame["task"].nunique()
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(max(2.2, 0.26 * tasks + 0.6) * across + 0.9, (0.24 * layers + 0.55) * down + 0.2))
    most = 100 * frame["difference"].abs().max() or 1
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
        cells = rows.pivot(index="layer", columns="task", values=["difference", "low", "high"])
        values = 100 * cells["difference"].to_numpy()
        drawn = axes.imshow(values, cmap=DIVERGING, vmin=-most, vmax=most)
        sure = (cells["low"].to_numpy() > 0) | (cells["high"].to_numpy() < 0)
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{round(value)}", ha="center", va="center", fontsize=6, weight="bold" if sure[i, j] else "normal",
                      color="white" if abs(value) > 0.6 * most else "black")  # fmt: skip
        axes.set(
            title=title, xlabel="task", ylabel="layer", xticks=range(values.shape[1]), yticks=range(values.shape[0])
        )
        axes.set_xticklabels([t + 1 for t in cells["difference"].columns])
        axes.set_yticklabels([i + 1 for i in cells.index])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    bar = figure.colorbar(drawn, ax=list(figure.axes), label="CIL - joint\n(patches / 100)", aspect=20)
    bar.outline.set_linewidth(0.4)
    return figure
