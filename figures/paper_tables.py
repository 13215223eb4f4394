"""The paper's Tables 1 and 2: Last, Avg, Fgt of four systems in each scenario, ours beside the published."""

from __future__ import annotations

import math

import pandas as pd

COLUMNS = ["setting", "scenario", "system", "title", "metric", "published", "ours", "sd", "seeds", "scale"]
METRICS = ("Last", "Avg", "Fgt")


def markdown(frame: pd.DataFrame, caption: str) -> str:
    """A row a scenario and system; numbers in percent, ours as mean ± standard deviation over seeds.

    frame: COLUMNS, percent; `ours` and `sd` are NaN where nothing was run, or one seed.
    """
    lines = [
        caption, "",
        "| scenario | system | published Last / Avg / Fgt | ours Last / Avg / Fgt | seeds |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for (scenario, title), rows in frame.groupby(["scenario", "title"], sort=False):
        rows = rows.set_index("metric")
        published = " / ".join(_number(rows.loc[metric, "published"]) for metric in METRICS)
        seeds = int(rows["seeds"].iloc[0])
        ours = " / ".join(_number(rows.loc[m, "ours"], rows.loc[m, "sd"]) for m in METRICS) if seeds else "not run"
        lines.append(f"| {scenario} | {title} | {published} | {ours} | {seeds or ''} |")
    return "\n".join(lines) + "\n"


def _number(value: float, spread: float = math.nan) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}")
