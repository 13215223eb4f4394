"""How far each attention layer looks as classes come in, beside joint training (the paper's figures 4 and 6)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from figures import style
from locality_probe.tables import INITIAL, INTERVALS, NONLOCALITY, STEPS, after_tasks

MAX_COLUMNS = 6  # panels beside each other; a pair with more layers goes on in a further row
ROW = 2.0  # inches: uniform attention is far above, so the lines need height
LEAST_SPAN = 0.2  # patches: a smaller range of values is not blown up to fill a panel
FOLDED = 0.25  # of the range of values: the height that is left for what lies between them and uniform attention
SERIES = {  # training -> how it is drawn, in the order of the legend; shape tells the series apart without colour too
    "incremental": {"label": "CIL", "color": style.BLUE, "marker": "o", "zorder": 3},
    "joint": {"label": "joint", "color": style.ORANGE, "marker": "s", "markerfacecolor": "white"},
    "joint-terminal": {"label": "joint, last task only", "color": style.GREEN, "marker": "D", "linestyle": "none"},
    "joint-as-long": {"label": "joint, as many steps as CIL", "color": style.GREEN, "marker": "D", "linestyle": "none"},
    "model": {"label": "model", "color": style.VERMILION, "marker": "^", "linestyle": "none"},
}
INITIALISED: dict[str, Any] = {
    "label": "CIL at initialisation",
    "color": style.REFERENCE,
    "linestyle": "--",
    "linewidth": 1,
}
UNIFORM: dict[str, Any] = {"label": "uniform attention", "color": style.REFERENCE, "linestyle": ":", "linewidth": 1.2}


@style.look()
def draw(
    nonlocality: pd.DataFrame, intervals: pd.DataFrame | None = None, steps: pd.DataFrame | None = None, first: int = 0
) -> Figure:  # fmt: skip
    """D_loc in patches, mean over heads, over the tasks: one row of panels per pair, one panel per layer.

    The panels of a pair share one scale, on which the way up to uniform attention is folded where that is far.
    intervals: a table INTERVALS, whose intervals of these very means are drawn as bands, those over seeds where there are any.
    steps: a table STEPS; then the axis is how many thousand steps a network has taken by then, not which task it is at.
    first: the number of the first task and layer in the drawing; 1 in the paper's figures.

    `nonlocality` has the columns of NONLOCALITY, of which checkpoints inside tasks are left out; the value at initialisation
    (task -1) is the incremental run's.
    Raises ValueError for another table, an unknown training, or a table without a value.
    """
    frame = after_tasks(NONLOCALITY.check(nonlocality))
    unknown = sorted(set(frame["training"]) - set(SERIES))
    if unknown:
        raise ValueError(f"table {NONLOCALITY.name}: no training {unknown[0]!r}; there: {', '.join(SERIES)}")
    frame = frame[(frame["task"] != INITIAL) | (frame["training"] == "incremental")]
    # A head without a value leaves a gap: the mean over the others is no mean over heads.
    keys = ["pair", "kind", "layer", "training", "task"]
    heads = frame.groupby(keys, sort=False, as_index=False)
    means = heads[["d_loc", "d_uniform"]].agg(lambda values: values.mean(skipna=False))
    means = means[means.groupby(["pair", "layer"])["d_loc"].transform("count") > 0]
    means = _with_bands(means, frame, intervals)
    means["x"] = means["task"] + first if steps is None else _thousands(means, frame, steps)
    if means.empty:
        raise ValueError(f"table {NONLOCALITY.name} holds no value to draw")

    pairs = dict(list(means.groupby("pair", sort=False)))
    layers = {pair: of_pair["layer"].nunique() for pair, of_pair in pairs.items()}
    most = max(layers.values())
    columns = math.ceil(most / math.ceil(most / MAX_COLUMNS))
    heights = [0.4 + ROW * math.ceil(n / columns) for n in layers.values()]
    width = max(3.6, columns * min(2.1, 7 / columns) + 0.4)
    figure = Figure(figsize=(width, sum(heights) + 0.4))
    blocks = figure.subfigures(len(pairs), 1, squeeze=False, height_ratios=heights)
    for block, of_pair in zip(blocks[:, 0], pairs.values(), strict=True):
        _draw_pair(
            block, of_pair, columns, "task" if steps is None else "steps since initialisation (thousands)", first
        )

    handles: dict[str, Line2D] = {}
    for axes in figure.axes:
        ends = (first - 0.5, max(means["x"].max(), first) + 0.5)
        axes.set_xlim(*ends if steps is None else (0, 1.05 * means["x"].max()))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=steps is None or means["x"].max() > 4, min_n_ticks=1))
        handles |= {label: line for line in axes.lines if not (label := str(line.get_label())).startswith("_")}
    labels = [how["label"] for how in (*SERIES.values(), INITIALISED, UNIFORM) if how["label"] in handles]
    ncols = len(labels) if width > 6 else 2
    figure.legend(handles=[handles[label] for label in labels], labels=labels, loc="outside lower center", ncols=ncols)
    return figure


def _with_bands(means: pd.DataFrame, frame: pd.DataFrame, intervals: pd.DataFrame | None) -> pd.DataFrame:
    """`means` with columns low and high, NaN where `intervals` has none."""
    if intervals is None:
        return means.assign(low=math.nan, high=math.nan)
    own = INTERVALS.check(intervals)
    own = own[(own["measure"] == "d_loc") & (own["other"] == "")].sort_values("over")  # images before seeds
    own = own.drop_duplicates(["run", "task", "layer"], keep="last")
    runs = frame[["pair", "training", "run"]].drop_duplicates(["pair", "training"])
    own = own.merge(runs, on="run")[["pair", "training", "task", "layer", "low", "high"]]
    return means.merge(own, on=["pair", "training", "task", "layer"], how="left")


def _thousands(means: pd.DataFrame, frame: pd.DataFrame, steps: pd.DataFrame) -> np.ndarray:
    """Of each of `means`, the thousands of steps that its network had taken; 0 at initialisation."""
    runs = frame[["pair", "training", "run"]].drop_duplicates(["pair", "training"])
    found = means[["pair", "training", "task"]].merge(runs, how="left").merge(STEPS.check(steps), how="left")
    return found["steps"].where(found["task"] != INITIAL, 0).to_numpy() / 1000


def _draw_pair(block: SubFigure, means: pd.DataFrame, columns: int, label: str, first: int) -> None:
    """One panel per layer; `means` [kind, layer, training, x -> d_loc, d_uniform] of one pair, in patches."""
    kinds = means.sort_values("layer")["kind"].unique()
    block.suptitle(f"{' + '.join(kinds)}  ({means['pair'].iloc[0]})", weight="bold")
    block.supxlabel(label)
    layers = means.groupby("layer")
    panels = block.subplots(math.ceil(layers.ngroups / columns), columns, squeeze=False, sharey=True)
    for axes in panels[:, 0]:
        axes.set_ylabel(r"$D_\mathrm{loc}$ (patches)")
    for axes, (layer, of_layer) in zip(panels.flat, layers, strict=False):
        axes.set_title(f"layer {layer + first}" + f", {of_layer['kind'].iloc[0]}" * (len(kinds) > 1))
        _draw_layer(axes, of_layer)
        low, high = (means[[end, "d_loc"]] for end in ("low", "high"))
        _fold(axes, low.min(axis=None), high.max(axis=None), means["d_uniform"].max())
    for axes in panels.flat[layers.ngroups :]:
        axes.remove()


def _draw_layer(axes: Axes, means: pd.DataFrame) -> None:
    """The reference lines and the series of one layer; `means` [training, task, x -> d_loc, d_uniform], in patches."""
    axes.axhline(means["d_uniform"].iloc[0], **UNIFORM)
    start = means[means["task"] == INITIAL]
    if len(start):
        axes.axhline(start["d_loc"].iloc[0], **INITIALISED)
    for training, how in SERIES.items():
        line = means[(means["training"] == training) & (means["task"] != INITIAL)].sort_values("task")
        if len(line):
            # Where the two agree, the dot of CIL lies inside the square of its joint twin.
            size = max(2, 4 - len(line) / 10) + (training != "incremental")
            if line["low"].notna().any():
                band = {"color": how["color"], "alpha": 0.2, "linewidth": 3 if len(line) == 1 else 0}
                draw_band = axes.vlines if len(line) == 1 else axes.fill_between
                draw_band(line["x"], line["low"], line["high"], **band)
            axes.plot(line["x"], line["d_loc"], markersize=size, clip_on=False, **how)


def _fold(axes: Axes, low: float, high: float, uniform: float) -> None:
    """Give `axes` the range low..high of a pair's values (patches), and fold what lies between them and `uniform`.

    Local attention is far below uniform, and drifts by hundredths of a patch: on one even scale nothing would be seen.
    """
    span = max(high - low, LEAST_SPAN)
    low, high = (high + low - span) / 2 - 0.08 * span, (high + low + span) / 2 + 0.08 * span
    low = max(low, 0.0)
    if uniform <= high + FOLDED * span:
        axes.set_ylim(low, max(high, uniform + 0.05 * span))
        return
    slope = FOLDED * span / (uniform - high)
    axes.set_yscale("function", functions=(
        lambda y: np.where(y <= high, y, high + (y - high) * slope),
        lambda z: np.where(z <= high, z, high + (z - high) / slope),
    ))  # fmt: skip
    axes.set_ylim(low, uniform + 0.05 * span / slope)
    ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    digits = next(d for d in range(1, 10) if np.allclose(np.round(ticks, d), ticks, rtol=0, atol=1e-9))
    axes.set_yticks([*ticks, uniform], labels=[*(f"{tick:.{digits}f}" for tick in ticks), f"{uniform:.2f}"])
    for place in (0.4, 0.6):  # the fold, marked on the axis
        y = high + place * (uniform - high)
        axes.plot(0, y, marker=[(-1, -0.4), (1, 0.4)], transform=axes.get_yaxis_transform(), markersize=6, clip_on=False,
                  color=style.REFERENCE, linestyle="none", label="_fold")  # fmt: skip
