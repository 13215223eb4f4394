"""The table of a sweep, rows of cil.tables.SWEEP: read, checked, and as text for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from cil import text
from cil.tables import SWEEP

Row = dict[str, Any]  # of SWEEP


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a sweep.csv by run; none where there is no file."""
    return {row["run"]: row for row in SWEEP.read(path).to_dict("records")} if path.is_file() else {}


def as_table(rows: dict[str, Row]) -> pd.DataFrame:
    return SWEEP.check(pd.DataFrame(list(rows.values())))


def format_table(table: pd.DataFrame, width: int | None = None) -> str:
    """The rows for people, at most `width` columns wide (cil.text), and below them why those that failed did."""
    rows = []
    for row in table.itertuples():
        share = f"{row.steps / row.of_steps:.0%}" if row.of_steps else ""
        values = ["" if math.isnan(value) else f"{value:.2f}" for value in (row.last, row.avg, row.fgt)]
        rows.append([row.run, row.state, f"{row.tasks}/{row.of or '?'}", share, *values, f"{row.seconds:.0f}"])
    header = ["run", "state", "tasks", "steps", "Last", "Avg", "Fgt", "seconds"]
    reasons = [text.prose(f"{row.run}: {row.reason}", width) for row in table.itertuples() if row.reason]
    return "\n".join([text.table(header, rows, left=2, width=width), *reasons])
