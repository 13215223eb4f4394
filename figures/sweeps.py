"""Accuracy against one setting of LPA: lambda at initialisation, or the number of LPA layers (the paper's figures 8 and 9)."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from figures import style

COLUMNS = ["value", "seed", "metric", "percent"]
METRICS = ("Last", "Avg", "Fgt")


@style.look()
def draw(frame: pd.DataFrame, label: str, logarithmic: bool = False, marked: float | None = None) -> Figure:
    """A panel a metric, in percent: a dot a run, a line through the means over the seeds that are there at every value, so that
    it compares like with like; dots of other seeds are hollow, and a legend says so. marked: the paper's choice, dotted.

    frame: COLUMNS. Raises ValueError for an empty one.
    """
    if frame.empty:
        raise ValueError("no sweep to draw")
    values = sorted(frame["value"].unique())
    at = frame.groupby("seed")["value"].nunique()
    common = frame["seed"].isin(at.index[at == len(values)])
    figure = Figure(figsize=(6.8, 2.1 + 0.25 * (not common.all())))
    panels = figure.subplots(1, len(METRICS))
    for axes, metric, colour in zip(panels, METRICS, (style.BLUE, style.ORANGE, style.GREEN), strict=True):
        rows, others = (frame[(frame["metric"] == metric) & chosen] for chosen in (common, ~common))
        if marked is not None:
            axes.axvline(marked, color=style.REFERENCE, linestyle=":", linewidth=1)
        axes.plot(rows["value"], rows["percent"], "o", color=colour, markersize=3)
        axes.plot(others["value"], others["percent"], "o", color=colour, markersize=3, fillstyle="none")
        means = rows.groupby("value")["percent"].mean()
        axes.plot(means.index, means, color=colour)
        if logarithmic:
            axes.set_xscale("log")
            shown = values if len(values) < 6 else values[::2]
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            shown = values
        axes.set_xticks(shown, labels=[f"{value:g}" for value in shown])
        axes.set(title=metric, xlabel=label)
    panels[0].set_ylabel("%")
    if not common.all():
        marks: dict[str, dict[str, Any]] = {_seeds(frame[common]): {}} if common.any() else {}
        marks[_seeds(frame[~common]) + ", not run at every value"] = {"fillstyle": "none", "linestyle": "none"}
        handles = [
            Line2D([], [], color=style.REFERENCE, marker="o", markersize=3, label=words, **how)
            for words, how in marks.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _seeds(frame: pd.DataFrame) -> str:
    seeds = sorted(frame["seed"].unique())
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
