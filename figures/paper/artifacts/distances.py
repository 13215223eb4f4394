"""What the pictures of D_loc gather: by task (figures 4 and 6), by steps, and CIL minus joint training.

A regime is a system and how it was trained: two columns, `title` and `training`. Tables that are drawn have one column `run`
for both, `label(title, training)`, which is written and never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from figures import gap, nonlocality_over_tasks
from figures.paper.artifact import artifact
from figures.paper.artifacts.common import need, seeds_words, usual
from figures.paper.scales import BOTH
from figures.paper.selection import Tables, first_setting
from locality_probe.intervals import intervals
from locality_probe.tables import INTERVALS, NONLOCALITY, after_tasks

REGIME = ["title", "training"]
NO_OTHER = ("", "")  # the regime that an interval of a mean by itself is against


@dataclass(frozen=True)
class Distances:
    """D_loc of each regime, over its seeds, in patches.

    means: NONLOCALITY, means over seeds, with `title`; `run` is the regime's label, `pair` the title with its number of seeds.
    intervals: INTERVALS over seeds, or of a single seed over images, with `title` and `training`, and those of the regime that
    a difference is against, `other_title` and `other_training`, empty for a mean by itself.
    runs: the rows of RUNS behind them, with `title`, `label` and `pair`.
    """

    means: pd.DataFrame
    intervals: pd.DataFrame
    runs: pd.DataFrame

    def draw(self, steps: pd.DataFrame | None = None):
        """The figure of these, over tasks or, with a table STEPS by regime, over steps."""
        means, sure = self.means[list(NONLOCALITY.columns)], self.intervals[list(INTERVALS.columns)]
        return nonlocality_over_tasks.draw(means, sure, steps, first=1)


def label(title: str, training: str) -> str:
    """A regime in one word, for tables that have one column for it."""
    return f"{title}, {training}"


def distances_of(
    tables: Tables,
    methods: tuple[str, ...],
    lpa: tuple[bool, ...],
    trainings: tuple[str, ...] = ("incremental", "joint"),
) -> Distances:
    """D_loc of the systems of these methods, with or without LPA, and of these trainings. Raises NotRun where none is there."""
    runs = first_setting(usual(tables, trainings))
    runs = runs[runs["method"].isin(methods) & (runs["n_lpa"] > 0).isin(lpa)]
    runs = need(runs[runs["run"].isin(tables["nonlocality.parquet"]["run"])], "no D_loc of these systems")
    runs = runs.assign(label=[label(*regime) for regime in _regimes(runs)], pair=_pairs(runs))
    return Distances(_means_over_seeds(tables, runs), _intervals_of_regimes(tables, runs), runs)


def _regimes(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(title, training) of each row."""
    return list(frame[REGIME].itertuples(index=False, name=None))


def _pairs(runs: pd.DataFrame) -> list[str]:
    """Title and number of seeds of each run: of its incremental side, where there is one, since a joint side may have fewer."""
    seeds = runs.groupby(REGIME)["seed"].count()
    counted = [(title, "incremental") if (title, "incremental") in seeds else (title, training)
               for title, training in _regimes(runs)]  # fmt: skip
    return [f"{title}, {seeds_words(seeds[title, training])}" for title, training in counted]


def _means_over_seeds(tables: Tables, runs: pd.DataFrame) -> pd.DataFrame:
    """NONLOCALITY of each regime, means over its seeds, with `title`; in the order of the systems."""
    rows = after_tasks(tables["nonlocality.parquet"]).drop(columns=["pair", "training"])
    rows = runs[["run", "pair", "label", *REGIME]].merge(rows, on="run")
    numbers = [column for column, (dtype, _) in NONLOCALITY.values.items() if dtype == "float64"]
    keys = ["label", "pair", *REGIME, "kind", "extent", "task", "at_step", "layer", "head"]
    means = rows.groupby(keys, as_index=False, sort=False)[[*numbers, "images"]].mean()
    means = means.rename(columns={"label": "run"}).astype({"images": int})
    return NONLOCALITY.check(means[list(NONLOCALITY.columns)]).assign(title=means["title"])


def _joint_twins(runs: pd.DataFrame) -> dict[str, str]:
    """Incremental run -> the run of joint training task by task that has its title and seed."""
    twins = {}
    for _, of_seed in runs.groupby(["title", "seed"]):
        run = of_seed.set_index("training")["run"]
        if {"incremental", "joint"} <= set(run.index):
            twins[run["incremental"]] = run["joint"]
    return twins


def _intervals_of_regimes(tables: Tables, runs: pd.DataFrame) -> pd.DataFrame:
    """INTERVALS as in `Distances`: over seeds; where one seed alone shows a layer, over images."""
    per_image = tables["layer_images.parquet"]
    per_image = per_image[per_image["run"].isin(runs["run"])]
    groups = dict(zip(runs["run"], zip(runs["label"], runs["seed"], strict=True), strict=True))
    rows = intervals(per_image, _joint_twins(runs), groups)
    rows = _with_regimes(rows, runs, sorted(per_image["task"].unique()))
    several, single = (rows[rows["over"].str.startswith(over)] for over in ("seeds", "images"))
    key = ["run", "task", "layer", "other"]
    single = single[~single.duplicated(key, keep=False)]  # of more seeds than one, each has its own
    both = pd.concat([several, single]).drop_duplicates(key).reset_index(drop=True)
    return INTERVALS.check(both[list(INTERVALS.columns)]).assign(
        **{column: both[column] for column in (*REGIME, "other_title", "other_training")}
    )


def _with_regimes(rows: pd.DataFrame, runs: pd.DataFrame, tasks: list[int]) -> pd.DataFrame:
    """INTERVALS of runs and of labels, all under the name of the label, with the regimes of both sides."""
    of_name = dict(zip([*runs["run"], *runs["label"]], 2 * _regimes(runs), strict=True))
    of_other = {f"{name}:{task}": (regime, task) for name, regime in of_name.items() for task in tasks}
    regimes = [of_name[run] for run in rows["run"]]
    others = [of_other[other] if other else (NO_OTHER, None) for other in rows["other"]]
    return rows.assign(
        run=[label(*regime) for regime in regimes],
        title=[title for title, _ in regimes],
        training=[training for _, training in regimes],
        other=["" if task is None else f"{label(*regime)}:{task}" for regime, task in others],
        other_title=[title for (title, _), _ in others],
        other_training=[training for (_, training), _ in others],
    )


def _frame(distances: Distances) -> pd.DataFrame:
    """Means over heads with their own intervals: one row per point of a line."""
    sure = distances.intervals
    own = sure.loc[sure["other"] == "", ["run", "task", "layer", "low", "high", "over", "n"]]
    keys = ["run", "pair", "training", "kind", "task", "layer"]
    frame = distances.means.groupby(keys, as_index=False, sort=False)[["d_loc", "d_uniform"]].mean()
    return frame.merge(own, on=["run", "task", "layer"], how="left")


@artifact(
    "gap",
    "D_loc of CIL minus that of joint training, layers by tasks",
    needs=lambda runs: runs.of([*runs.twins, *runs.twins.values()]),
    kinds=("nonlocality",),
    section="distances",
)
def gap_to_joint(tables: Tables):
    """D_loc of CIL minus D_loc of its joint twin, of the same seed, task and layer; patches, with their intervals."""
    distances = distances_of(tables, ("baseline", "dytox"), (False, True))
    rows = distances.intervals
    rows = rows[(rows["training"] == "incremental") & (rows["other_training"] == "joint") & (rows["task"] >= 0)]
    frame = need(rows, "no run beside its joint twin").rename(columns={"mean": "difference"})
    order = {title: place for place, title in enumerate(dict.fromkeys(distances.runs["title"]))}  # as `usual` has them
    frame = frame.sort_values("title", key=lambda titles: titles.map(order), kind="stable")
    return frame[gap.COLUMNS], gap.draw(frame), distances.runs["run"]


@artifact(
    "steps",
    "D_loc against the steps that a network has taken: CIL, joint training task by task, joint training as long as CIL",
    needs=lambda runs: runs.of([*BOTH, *(runs.twins[s] for s in BOTH), *(f"{s}-joint-as-long" for s in BOTH)]),
    kinds=("nonlocality",),
    section="distances",
)
def by_steps(tables: Tables):
    """D_loc of each layer of the baseline, with and without LPA, by the optimiser steps that its network had taken."""
    trainings = ("incremental", "joint", "joint-as-long")
    distances = distances_of(tables, ("baseline",), (False, True), trainings)
    taken = distances.runs[["run", "label"]].merge(tables["steps.csv"], on="run")
    taken = need(taken, "no steps of these runs").groupby(["label", "task"], as_index=False)["steps"].first()
    taken = taken.rename(columns={"label": "run"})
    frame = _frame(distances).merge(taken, on=["run", "task"], how="left")
    return frame, distances.draw(taken), distances.runs["run"]


@artifact(
    "fig4",
    "Figure 4: D_loc of each layer over the tasks, CIL against joint training",
    needs=lambda runs: runs.of(["baseline", runs.twins["baseline"]]),
    kinds=("nonlocality",),
    section="distances",
)
def fig4(tables: Tables):
    """D_loc of each layer of the baseline after each task: mean over heads, images and seeds, patches, with its interval."""
    distances = distances_of(tables, ("baseline",), (False,))
    return _frame(distances), distances.draw(), distances.runs["run"]


@artifact(
    "fig6",
    "Figure 6: D_loc of each layer over the tasks, without and with LPA",
    needs=lambda runs: runs.of([*BOTH, *(runs.twins[s] for s in BOTH)]),
    kinds=("nonlocality",),
    section="distances",
)
def fig6(tables: Tables):
    """As `fig4`, of the baseline and of the baseline with LPA."""
    distances = distances_of(tables, ("baseline",), (False, True))
    return _frame(distances), distances.draw(), distances.runs["run"]
