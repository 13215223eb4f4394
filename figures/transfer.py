"""Which layers serve classes yet to come, and how locally they look (the paper's figure 5)."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import style
from locality_probe.tables import NONLOCALITY, TRANSFER


@style.look()
def draw(transfer: pd.DataFrame, nonlocality: pd.DataFrame, probe: str = "linear", first: int = 0) -> Figure:
    """One column per run, one line per task: above, accuracy on future classes after each block,
    less that of the network as initialised on the same classes; below, D_loc of the block's attention in patches.

    `transfer`, `nonlocality`: tables TRANSFER and NONLOCALITY. first: the number of the first task and layer in the drawing;
    1 in the paper's figures. Raises ValueError for other tables and an unknown probe.
    """
    frame, distances = TRANSFER.check(transfer), NONLOCALITY.check(nonlocality)
    if probe not in set(frame["probe"]):
        raise ValueError(f"no probe {probe!r}; there: {', '.join(dict.fromkeys(frame['probe']))}")
    frame = frame[(frame["group"] == "future") & (frame["probe"] == probe) & frame["layer"].str.startswith("block ")]
    if frame.empty:
        raise ValueError(f"table {TRANSFER.name} holds no future classes to draw")
    frame = frame.assign(block=frame["layer"].str.removeprefix("block ").astype(int))
    cells = frame.set_index(["run", "task", "block", "control"])["accuracy"].unstack("control")
    gain = 100 * (cells["none"] - cells["initial"])
    means = distances.groupby(["run", "task", "layer"])["d_loc"].mean()
    runs = list(dict.fromkeys(frame["run"]))
    figure = Figure(figsize=(max(3.2, 1.9 * len(runs) + 1.1), 3.6))
    panels = figure.subplots(2, len(runs), squeeze=False, sharex=True, sharey="row")
    last = frame["task"].max()
    colours, scale = matplotlib.colormaps[style.SEQUENTIAL], Normalize(first, first + max(last, 1))
    for (above, below), run in zip(panels.T, runs, strict=True):
        above.set_title(run)
        above.axhline(0, color=style.REFERENCE, linestyle="--", linewidth=1)
        for task in sorted(set(frame.loc[frame["run"] == run, "task"])):
            how = {"color": colours(scale(task + first)), "marker": "o", "label": f"task {task + first}"}
            for axes, values in ((above, gain[run, task]), (below, means[run, task])):
                axes.plot(values.index + first, values, **how)
        below.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        below.set_xlabel("layer")
    panels[0, 0].set_ylabel("accuracy on future classes,\nover initialisation (points)")
    panels[1, 0].set_ylabel(r"$D_\mathrm{loc}$ (patches)")
    mappable = matplotlib.cm.ScalarMappable(scale, colours)
    bar = figure.colorbar(mappable, ax=list(panels.flat), label="task", aspect=30)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.outline.set_linewidth(0.4)
    figure.align_ylabels(panels[:, 0])
    return figure
