"""Which runs of a study a claim or a figure is about, which two of them may be compared, and their D_loc as arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from locality_probe.tables import INITIAL, after_tasks

# joint-as-long takes whole epochs; at any scale, half of one is at most this share of all its steps.
HALF_AN_EPOCH = 0.02
# Settings in which any two runs may differ: a name, a place, and how often a network is saved while it learns.
ALWAYS_FREE = {"recipe", "data_dir", "checkpoints"}
# The attention of the paper's systems, and what settings of older studies that lack a key had. The controls of the scale
# `learned` (plain MHSA, a GPSA gate that starts elsewhere, LPA weights that are frozen or start at random) differ in one.
AS_PUBLISHED = {"attention": "gpsa", "gate_init": 1.0, "positional_start": "local", "positional_frozen": False}

Tables = Mapping[str, pd.DataFrame]  # files of STUDY


def scope(runs: pd.DataFrame) -> pd.DataFrame:
    """RUNS with parsed settings; those of AS_PUBLISHED are there even where an older study lacks them."""
    return runs.assign(parsed=[AS_PUBLISHED | json.loads(text) for text in runs["settings"]])


def first_setting(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the setting that D_loc, spectra and sweeps are about: B10-10 on CIFAR-100, its B2-2, or the demo's only one."""
    return runs[runs["setting"].isin(["b10-10", "b2-2", ""])]


def as_published(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of `scope` with the paper's attention: neither plain MHSA nor a control."""
    kept = [all(settings[key] == value for key, value in AS_PUBLISHED.items()) for settings in runs["parsed"]]
    return runs[np.array(kept, bool)]


def systems(runs: pd.DataFrame, lpa: bool, method: str = "baseline", training: str = "incremental") -> pd.DataFrame:
    """Runs of one system of the paper's tables: LPA in all blocks or in none, lambda_init as published."""
    runs = as_published(runs)
    n = runs["lpa_blocks"] if lpa else 0
    usual = (runs["lambda_init"] == 0.02) & (runs["n_lpa"] == n)
    return runs[usual & (runs["method"] == method) & (runs["training"] == training)]


def lambda_sweep(runs: pd.DataFrame) -> pd.DataFrame:
    """Of figure 8: the baseline with LPA in all blocks, by lambda_init."""
    runs = as_published(first_setting(runs))
    kept = (runs["method"] == "baseline") & (runs["training"] == "incremental") & (runs["n_lpa"] == runs["lpa_blocks"])
    return runs[kept].sort_values(["lambda_init", "seed"])


def depth_sweep(runs: pd.DataFrame) -> pd.DataFrame:
    """Of figure 9: the baseline with lambda_init as published, by the number of LPA blocks."""
    runs = as_published(first_setting(runs))
    kept = (runs["method"] == "baseline") & (runs["training"] == "incremental") & (runs["lambda_init"] == 0.02)
    return runs[kept].sort_values(["n_lpa", "seed"])


def pairs(
    left: pd.DataFrame, right: pd.DataFrame, free: set[str], tables: Tables, kind: str, steps: float = 0.0
) -> tuple[list[tuple[str, str]], list[str]]:
    """(run, run) of equal setting, method and seed; and a sentence for each pair that is refused.

    free: settings in which the sides may differ. steps: the share by which their numbers of steps may (any for joint training
    task by task, which sees old classes again by its very nature). kind: of measurement, whose images must be the same ones.
    """
    found, refused = [], []
    measured = tables["measurements.csv"].set_index(["run", "kind"])["sha256"]
    places = ["setting", "method", "seed"]
    there = {tuple(row[place] for place in places): row for _, row in right.iterrows()}
    for _, row in left.iterrows():
        other = there.get(tuple(row[place] for place in places))
        if other is None or any((run, kind) not in measured.index for run in (row["run"], other["run"])):
            continue
        wrong = confounders(row, other, free, steps)
        if measured[row["run"], kind] != measured[other["run"], kind]:
            wrong.append("probe images")
        if wrong:
            refused.append(f"refused: {row['run']} and {other['run']} differ in {', '.join(wrong)}")
        else:
            found.append((row["run"], other["run"]))
    return found, refused


def confounders(row: pd.Series, other: pd.Series, free: set[str], steps: float = 0.0) -> list[str]:
    """Names of the settings in which two rows of `scope` differ though they may not; of steps, by more than a share; and of
    the trainer's version, which is 1 in studies that do not know it."""
    mine, others = row["parsed"], other["parsed"]
    wrong = [key for key in mine | others if mine.get(key) != others.get(key) and key not in free | ALWAYS_FREE]
    wrong += ["steps"] if abs(row["steps"] - other["steps"]) > steps * row["steps"] else []
    return wrong + (["trainer"] if row.get("trainer", 1) != other.get("trainer", 1) else [])


def alike(runs: pd.DataFrame, free: set[str]) -> tuple[pd.DataFrame, list[str]]:
    """The runs of a sweep that differ from its first of the same seed in `free` alone; and a sentence for each other run."""
    kept, refused = [], []
    for _, of_seed in runs.groupby("seed"):
        first = of_seed.iloc[0]
        for _, row in of_seed.iterrows():
            wrong = confounders(first, row, free)
            kept += [row["run"]] * (not wrong)
            refused += [f"refused: {first['run']} and {row['run']} differ in {', '.join(wrong)}"] * bool(wrong)
    return runs[runs["run"].isin(kept)], refused


def measured(tables: Tables, runs: pd.DataFrame, kind: str) -> list[str]:
    """Those of the runs that a kind of measurement is there of."""
    rows = tables["measurements.csv"]
    there = set(rows.loc[rows["kind"] == kind, "run"])
    return [run for run in runs["run"] if run in there]


def layers_of(tables: Tables, runs: list[str]) -> np.ndarray:
    """D_loc of each run after each task: [runs, images, tasks, layers], patches; task -1 and checkpoints inside a task are
    left out."""
    rows = after_tasks(tables["layer_images.parquet"])
    rows = rows[rows["run"].isin(runs) & (rows["task"] != INITIAL)]
    cube = rows.pivot(index=["run", "image"], columns=["task", "layer"], values="d_loc").sort_index(axis=1)
    shape = [len(cube.columns.levels[0]), len(cube.columns.levels[1])]
    return np.stack([cube.loc[run].to_numpy(float).reshape(-1, *shape) for run in runs])


def initial_layers_of(tables: Tables, runs: list[str]) -> np.ndarray:
    """D_loc of each run as initialised (task -1): [runs, layers], patches, mean over images; NaN where it was not measured."""
    rows = after_tasks(tables["layer_images.parquet"])
    rows = rows[rows["task"] == INITIAL].astype({"d_loc": float})
    means = rows.pivot_table(index="run", columns="layer", values="d_loc", aggfunc="mean").reindex(runs)
    return means.to_numpy(float) if means.shape[1] else np.full((len(runs), 1), math.nan)
