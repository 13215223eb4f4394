"""What several pictures gather in the same way: the paper's systems, their titles, and a choice of tasks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from cil import recipes
from figures.paper.artifact import NotRun
from figures.paper.selection import Tables, scope, systems

WORDS = {"incremental": "CIL", "joint": "joint"}  # trainings, as the paper's page names them


def title_of(row: pd.Series) -> str:
    """baseline, baseline + LPA, DyTox(+), DyTox(+) + LPA, of a row of `scope`; mixup is what the + means."""
    base = row["method"] if row["method"] == "baseline" else "DyTox" + "+" * (row["parsed"].get("mixup") != 0)
    return base + (" + LPA" if row["n_lpa"] else "")


def setting_title(setting: str) -> str:
    """Of a setting as recipes name it: "CIFAR-100 B10-10"."""
    if not setting:
        return "digits B2-2"
    if setting in (learned := recipes.settings_of("learned")):
        return learned[setting][0]
    where = "ImageNet-100" if setting.startswith("imagenet-") else "CIFAR-100"
    return f"{where} {setting.removeprefix('imagenet-').upper()}"


def usual(tables: Tables, trainings: tuple[str, ...] = ("incremental", "joint")) -> pd.DataFrame:
    """The systems of the paper's tables, with or without joint training, by title; sweeps are left out."""
    runs = scope(tables["runs.csv"])
    parts = [systems(runs, lpa, method, training) for training in trainings
             for method in ("baseline", "dytox") for lpa in (False, True)]  # fmt: skip
    kept = pd.concat(parts)
    return kept.assign(title=[title_of(row) for _, row in kept.iterrows()])


def need(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    """The frame. Raises NotRun for an empty one."""
    if frame.empty:
        raise NotRun(what)
    return frame


def seeds_words(seeds: int) -> str:
    return f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"


def some_of(tasks: Iterable[int], most: int) -> list[int]:
    """At most so many of the tasks, evenly spread, the first and the last among them."""
    tasks = sorted(tasks)
    return [tasks[i] for i in np.unique(np.linspace(0, len(tasks) - 1, min(most, len(tasks))).round().astype(int))]
