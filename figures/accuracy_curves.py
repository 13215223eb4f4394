"""Accuracy over the classes seen so far, as class-incremental papers draw it."""

from __future__ import annotations

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import style

COLUMNS = ["setting", "title", "training", "classes", "accuracy", "low", "high", "seeds"]
MARKERS = "osD^v"


@style.look()
def draw(frame: pd.DataFrame) -> Figure:
    """A panel a setting, a line a title and training (joint dashed): accuracy in percent against the classes seen.

    frame: COLUMNS, accuracy, low and high 0 to 1; the band low..high is drawn where it is not empty.
    Raises ValueError for an empty one.
    """
    if frame.empty:
        raise ValueError("no accuracy to draw")
    panels = {setting: rows for setting, rows in frame.groupby("setting", sort=False)}
    titles = list(dict.fromkeys(frame["title"]))
    colours = dict(zip(titles, (style.BLUE, style.ORANGE, style.GREEN, style.VERMILION), strict=False))
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.4 * across + 0.2, 2.4 * down + 0.5))
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (setting, rows) in zip(grid.flat, panels.items(), strict=False):
        for (title, training), line in rows.groupby(["title", "training"], sort=False):
            joint = training != "incremental"
            how = {"color": colours[title], "linestyle": "--" if joint else "-", "marker": MARKERS[titles.index(title)],
                   "markersize": 3, "markerfacecolor": "white" if joint else colours[title],
                   "label": f"{title}, joint" if joint else title}  # fmt: skip
            axes.fill_between(line["classes"], 100 * line["low"], 100 * line["high"], color=colours[title], alpha=0.15,
                              linewidth=0)  # fmt: skip
            axes.plot(line["classes"], 100 * line["accuracy"], **how)
        axes.set(title=setting, xlabel="classes seen", ylabel="accuracy (%)")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3 if across > 1 else 2)
    return figure
