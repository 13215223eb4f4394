"""The criteria that the scale `learned` was chosen by, from a study's tables.

    python benchmarks/regime.py [data/results/learned]

Prints one line per criterion of docs/learned/how-it-was-chosen.md that the tables can tell (1, 3 and 4, and the time of
each run), for the baseline in the main setting: mean over seeds, and the standard deviation over seeds behind it.
"""

from __future__ import annotations

import sys

import pandas as pd

from figures.paper.study import Study
from locality_probe.tables import INITIAL, after_tasks

LAYER = 1  # the second self-attention layer


def criteria(study: Study) -> list[str]:
    """A sentence per criterion. Accuracies are shares of the test images, D_loc is in patches."""
    runs = study.read("runs.csv")
    runs = runs[(runs["system"] == "baseline") & (runs["setting"] == "b2-2")]
    accuracy = study.read("accuracy.csv").merge(runs[["run", "seed", "training", "classes"]], on="run")
    newest = accuracy[(accuracy["task"] == accuracy["on_task"]) & (accuracy["task"] == accuracy["task"].max())]
    newest = newest.pivot(index="seed", columns="training", values="accuracy").dropna()
    share = newest["incremental"] / newest["joint-as-long"]
    cil = accuracy[accuracy["training"] == "incremental"]
    last = cil[cil["task"] == cil["task"].max()]
    seen = last.groupby("seed")["correct"].sum() / last.groupby("seed")["images"].sum()
    before = cil[cil["task"] < cil["task"].max()].groupby(["seed", "on_task"])["accuracy"].max()
    lost = before - last.set_index(["seed", "on_task"])["accuracy"].reindex(before.index)

    rows = after_tasks(study.read("nonlocality.parquet"))
    rows = rows[rows["layer"] == LAYER].drop(columns="training").merge(runs, on="run")
    rows = rows[rows["training"] == "joint-as-long"].groupby(["seed", "task"])["d_loc"].mean().unstack()
    start, end = rows[INITIAL], rows[rows.columns.max()]
    moved = (end - start).mean()

    def of(values: pd.Series, digits: int = 3) -> str:
        return f"{values.mean():.{digits}f} (sd {values.std():.{digits}f}, {len(values)} seeds)"

    times = runs.groupby("training")["seconds"].median() / 60
    return [
        f"1. newest classes after the last task: CIL {of(newest['incremental'])}, joint as long "
        f"{of(newest['joint-as-long'])}; their ratio {of(share)}, asked: 0.75",
        f"   Last: {of(seen)}, asked: {4 / runs['classes'].iloc[0]:.2f}, 4 times chance",
        f"3. D_loc of layer {LAYER}, joint as long: {start.mean():.3f} -> {end.mean():.3f} patches, by {moved:.3f}; over seeds "
        f"the start has sd {start.std():.4f} ({moved / start.std():.0f} times), the end {end.std():.4f} "
        f"({moved / end.std():.1f} times), asked: 10 times",
        f"4. old classes lose {of(lost.groupby('seed').mean())} against their best, asked: 0.10",
        "   minutes a run, median: " + ", ".join(f"{training} {minutes:.1f}" for training, minutes in times.items()),
    ]


if __name__ == "__main__":
    print("\n".join(criteria(Study(sys.argv[1] if len(sys.argv) > 1 else "data/results/learned"))))
