"""Where a patch looks as classes come in, CIL beside joint (the paper's figure 3), with D_loc beneath (its figure 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import attention_maps, style
from figures.nonlocality_over_tasks import SERIES

COLUMNS = ["image", "title", "training", "task", "row", "column", "attention"]
PANEL = 0.92  # inches


@dataclass(frozen=True)
class Example:
    """An image as the networks see it, uint8 [H, W, 3], and the patch (row, column) that looks."""

    image: np.ndarray
    query: tuple[int, int]


@style.look()
def draw(frame: pd.DataFrame, examples: dict[str, Example], distances: pd.DataFrame | None = None) -> Figure:
    """Rows: each image with each title; columns: the image, then tasks (counted from 1); one colour scale.

    frame: COLUMNS, attention of the query on the patch at row, column. distances [training, task, d_loc]: D_loc in patches
    of what is shown, drawn below over all tasks. Raises ValueError for an empty frame.
    """
    if frame.empty:
        raise ValueError("no attention to draw")
    names, titles = list(dict.fromkeys(frame["image"])), list(dict.fromkeys(frame["title"]))
    tasks, below = sorted(frame["task"].unique()), 1.6 if distances is not None else 0
    rows = [(name, title) for name in names for title in titles]
    width, height = PANEL * (len(tasks) + 1) + 1.1, PANEL * len(rows) + 0.35
    figure = Figure(figsize=(width, height + below))
    heights = [height, below] if below else [height]
    above, *rest = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = above.subplots(len(rows), len(tasks) + 1, squeeze=False)
    norm = Normalize(0, frame["attention"].max())
    for line, (name, title) in zip(panels, rows, strict=True):
        example = examples[name]
        of_row = frame[(frame["image"] == name) & (frame["title"] == title)]
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        grid = (of_row["row"].max() + 1, of_row["column"].max() + 1)
        attention_maps.show(line[0], example.image, grid, example.query)
        line[0].set_ylabel(title)
        grey = attention_maps.greyed(example.image)
        for axes, task in zip(line[1:], tasks, strict=True):
            cells = of_row[of_row["task"] == task].pivot(index="row", columns="column", values="attention")
            attention_maps.show(axes, grey, grid, example.query)
            drawn = axes.imshow(cells.to_numpy(), extent=axes.images[0].get_extent(), cmap=style.SEQUENTIAL, norm=norm,
                                alpha=attention_maps.OPACITY, interpolation="nearest")  # fmt: skip
    panels[0, 0].set_title("image")
    for axes, task in zip(panels[0, 1:], tasks, strict=True):
        axes.set_title(f"task {task + 1}")
    bar = above.colorbar(drawn, ax=list(panels.flat), label="attention", aspect=25, format="%.2g")
    bar.outline.set_linewidth(0.4)
    for block in rest:
        axes = block.subplots()
        assert distances is not None  # it is what makes room below
        for training, values in distances.groupby("training", sort=False):
            axes.plot(values["task"] + 1, values["d_loc"], **SERIES[training])
        axes.set(xlabel="task", ylabel=r"$D_\mathrm{loc}$ (patches)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(ncols=2)
    return figure
