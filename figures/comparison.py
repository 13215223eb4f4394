"""How much farther one run looks than another, layer by layer over the tasks, with intervals."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import style
from locality_probe.tables import ALL_TASKS, COMPARISON, compared

MAX_COLUMNS = 6
SHADES = {"low_all high_all": ("95 %, at once for all", 0.18), "low high": ("95 %, this one alone", 0.35)}


@style.look()
def draw(comparison: pd.DataFrame, first: int = 0) -> Figure:
    """Difference of D_loc in patches, first side minus second, over the tasks: one panel per layer.

    `comparison` has the columns of COMPARISON, of one comparison. Two single checkpoints give one point per panel, and the
    title says of which tasks they are. first: the number of the first task and layer in the drawing; 1 in the paper's figures.
    Raises ValueError for another table or an empty one.
    """
    frame = COMPARISON.check(comparison)
    frame = frame[frame["task"] != ALL_TASKS].sort_values("task")
    if frame.empty:
        raise ValueError(f"table {COMPARISON.name} holds no task to draw")
    layers = dict(list(frame.groupby("layer")))
    columns = min(len(layers), MAX_COLUMNS)
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(max(4.2, 1.6 * columns + 0.6), 1.9 * rows + 0.9))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    single = frame["task"].nunique() == 1
    for axes, (layer, of_layer) in zip(panels.flat, layers.items(), strict=False):
        axes.set_title(f"layer {layer + first}")
        axes.axhline(0, color=style.REFERENCE, linewidth=1)
        x = of_layer["task"] + first
        for ends, (label, alpha) in SHADES.items():
            low, high = (of_layer[end] for end in ends.split())
            how = {"color": style.BLUE, "alpha": alpha, "label": label}
            if single:
                axes.vlines(x, low, high, linewidth=7, **how)
            else:
                axes.fill_between(x, low, high, linewidth=0, **how)
        axes.plot(x, of_layer["difference"], color=style.BLUE, marker="o", markersize=3, label="difference")
        axes.set_xlim(x.min() - 0.5, x.max() + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_xlabel("task")
    for axes in panels.flat[len(layers) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel(r"difference of $D_\mathrm{loc}$ (patches)")
    row = frame.iloc[0]
    figure.suptitle("\nminus ".join(compared(frame)), weight="bold")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    labels = [f"{label}, over {row['n']} {row['over']}" if "%" in label else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if columns < 4 else 3)
    return figure
