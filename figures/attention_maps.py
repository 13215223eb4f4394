"""Attention over an image: the image, and beside it a grid of heat maps, such as layers x heads or tasks x layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from figures import style

Patch = tuple[int, int]  # row, column
SCALES = ("shared", "each", "uniform", "difference")
DIVERGING = "PuOr_r"  # white in the middle; its ends stay apart for the colour-blind
MOST_TIMES = 16  # times uniform, either way: what is beyond has the colour of the end
OPACITY = 0.75  # of a map over the grey image
GREY = (0.45, 0.9)  # black and white of the grey image: a dark object must not look like little attention
EDGE, GAP, LINE = 0.12, 0.08, 0.2  # inches: around the figure, between panels, a line of text


@style.look()
def draw(
    image: np.ndarray, maps: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str], scale: str = "shared",
    query: Patch | Sequence[Sequence[Patch | None]] | None = None, unit: str = "attention", title: str = "",
    seen: Sequence[Sequence[np.ndarray | None]] | None = None,
) -> Figure:  # fmt: skip
    """`image` uint8 [H, W, 3] as the model sees it; over its grey copy `maps` float [R, C, g_h, g_w] >= 0, in `unit`.

    seen: [R][C], the image as each panel's own model sees it, where that is not `image` for all.

    scale: "shared", all panels 0..max under one colour bar; "each", every panel 0..its max, with its own; "uniform", times
    uniform attention, 1 / (g_h g_w), on a logarithmic scale around 1; "difference", around 0, and values may be negative.
    query: (row, column) in patches from 0, outlined in all panels, or [R][C] of them, each outlined in its own panel and
    the first of them in `image`. A panel of NaN stays blank, but for the word none.
    Raises ValueError for what does not fit.
    """
    shape = len(row_labels), len(column_labels)
    queries: Any = query if isinstance(query, list) else [[query] * shape[1]] * shape[0]
    images = seen or [[image] * shape[1]] * shape[0]
    _check(image, maps, shape, scale, queries)
    if scale == "uniform":
        maps, unit = np.log2(np.clip(maps * maps.shape[2] * maps.shape[3], 1 / MOST_TIMES, MOST_TIMES)), "times uniform"
    elif scale == "difference":
        unit = f"difference of {unit}"
    figure, each, grid = Figure(), scale == "each", maps.shape[2:]
    figure.set_layout_engine("none")  # panels have their places in inches
    diverging = scale in ("uniform", "difference")
    caption = f"{unit}, each panel on its own scale" if each else ""
    place = _layout(figure, image.shape[:2], row_labels, column_labels, title, caption, each)
    shown = next((patch for row in queries for patch in row if patch), None)

    axes = place("image")
    axes.set(title="image", xlabel="" if shown is None else "query outlined")
    show(axes, image, grid, shown)
    most, bar = (np.nanmax(np.abs(maps)) if diverging else np.nanmax(maps)) or 1, None
    norm = Normalize(-most if diverging else 0, most)
    for r, c in np.ndindex(maps.shape[:2]):
        axes = place("map", r, c)
        axes.set_title(column_labels[c] if r == 0 else "")
        axes.set_ylabel(row_labels[r] if c == 0 else "", rotation=0, ha="right", va="center", labelpad=4)
        if np.isnan(maps[r, c]).all():
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=style.REFERENCE)
            continue
        grey = greyed(images[r][c])
        show(axes, grey, grid, queries[r][c])
        norm = Normalize(0, np.nanmax(maps[r, c]) or 1) if each else norm
        colours = DIVERGING if diverging else style.SEQUENTIAL
        drawn = axes.imshow(maps[r, c], colours, norm, alpha=OPACITY, interpolation="nearest",
                            extent=axes.images[0].get_extent())  # fmt: skip
        if each:
            ends = [0, norm.vmax]
            bar = figure.colorbar(drawn, place("bar", r, c), orientation="horizontal", ticks=ends, format="%.2g")
            bar.ax.tick_params(length=0, pad=1.5, labelsize=6)
            bar.ax.get_xticklabels()[0].set_horizontalalignment("left")
            bar.ax.get_xticklabels()[1].set_horizontalalignment("right")
        elif bar is None:
            bar = figure.colorbar(drawn, place("bar"), label=unit, format="%.3g")
            if scale == "uniform":
                ticks = np.arange(np.ceil(-most - 1e-6), most + 1e-6)
                ticks = ticks if len(ticks) > 2 else np.array([-most, 0.0, most])
                bar.set_ticks(ticks.tolist(), labels=[f"{2**tick:.3g}" for tick in ticks])
        bar.outline.set_linewidth(0.4)
        bar.ax.set_facecolor(str(grey.mean()))  # under the bar as under a map: the same colours in both
    return figure


def _check(image, maps, labels, scale, queries) -> None:
    """ValueError in terms of draw's arguments; `labels`: how many for rows and columns."""
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}; there: {', '.join(SCALES)}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if maps.ndim != 4 or maps.shape[:2] != labels:
        raise ValueError(f"by their labels maps are [{labels[0]}, {labels[1]}, g_h, g_w], not {list(maps.shape)}")
    if np.isnan(maps).all() or (np.nanmin(maps) < 0 and scale != "difference") or np.isinf(maps).any():
        raise ValueError("maps need a value, and none below 0 or infinite")
    for query in (patch for row in queries for patch in row if patch is not None):
        if not (0 <= query[0] < maps.shape[2] and 0 <= query[1] < maps.shape[3]):
            raise ValueError(
                f"no query patch {tuple(query)} in a grid of {maps.shape[2]} rows and {maps.shape[3]} columns"
            )


def greyed(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> luma [H, W] in 0..1, between the greys that maps are laid over."""
    return GREY[0] + (GREY[1] - GREY[0]) * (image @ [0.299, 0.587, 0.114]) / 255


def show(axes: Axes, image: np.ndarray, grid: tuple[int, int], query: Patch | None) -> None:
    """`image`, colour [H, W, 3] or grey [H, W] in 0..1, in pixels from its corner, and the query's outline, in `axes`."""
    height, width = image.shape[:2]
    axes.imshow(image, "gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    if query is not None:
        down, across = height / grid[0], width / grid[1]
        line = np.clip(axes.bbox.width / axes.figure.dpi * 72 / grid[1] / 6, 0.6, 1)  # points; patches may be tiny
        how = {"linewidth": line, "path_effects": [withStroke(linewidth=2 * line, foreground="black")]}
        corner = (query[1] * across, query[0] * down)
        axes.add_patch(Rectangle(corner, across, down, fill=False, edgecolor="white", **how))


def _layout(figure, size, row_labels, column_labels, title, caption, each) -> Callable[..., Axes]:
    """Give `figure` its size and return place(name, row, column), which makes the axes; `size`: (H, W) of the image.

    In inches from the top left: labels take the room they need, panels at least theirs, and the figure grows with them.
    """
    rows, columns, captions, titles = (style.room(figure, t) for t in (row_labels, column_labels, [caption], [title]))
    shape = np.array([size[1], size[0]]) / max(size)
    panel = shape * np.clip(7 / max(len(row_labels), len(column_labels)), 0.75, 2.4)
    panel *= max(1, columns[0] / panel[0], rows[1] / panel[1])
    pitch = panel + GAP + np.array([0, 0.24 * each])
    grid = pitch * [len(column_labels), len(row_labels)] - GAP
    picture = shape * max(*panel, np.clip(grid[1] / 4, 1.7, 2.6))
    top = EDGE + titles[1] + max(columns[1], LINE)
    left = np.array([EDGE + picture[0] + LINE + rows[0], top + max(0, (picture[1] - grid[1]) / 2)])
    bar = ([0, panel[1] + 0.03], [panel[0], 0.07]) if each else ([grid[0] + GAP, 0], [0.1, grid[1]])
    boxes = {"image": (np.array([EDGE, top]), picture), "map": (left, panel), "bar": (left + bar[0], bar[1])}
    width = max(left[0] + max(grid[0], captions[0]) + 0.75 * (not each), titles[0] + EDGE) + EDGE
    height = max(left[1] + grid[1] + captions[1], top + picture[1] + LINE) + EDGE
    figure.set_size_inches(width, height)
    figure.text(EDGE / width, 1 - EDGE / height, title, va="top", weight="bold")
    figure.text(left[0] / width, EDGE / height, caption, va="bottom")

    def place(name: str, row: int = 0, column: int = 0) -> Axes:
        (x, y), (w, h) = boxes[name][0] + pitch * [column, row], boxes[name][1]
        box = (x / width, 1 - (y + h) / height, w / width, h / height)
        return figure.add_axes(box, label=f"{name} {row} {column}", xticks=[], yticks=[], frame_on=name == "bar")

    return place
