"""What the picture of transferability gathers (figure 5)."""

from __future__ import annotations

import pandas as pd

from cil.tables import Table
from figures import transfer
from figures.paper.artifact import artifact
from figures.paper.artifacts.common import need, seeds_words, usual
from figures.paper.scales import BOTH
from figures.paper.selection import Tables, first_setting
from locality_probe.tables import INITIAL, NONLOCALITY, TRANSFER, after_tasks


@artifact(
    "fig5",
    "Figure 5: transferability and locality of each layer",
    needs=lambda runs: runs.of(BOTH),
    kinds=("transfer", "nonlocality"),
    section="transfer",
)
def fig5(tables: Tables):
    """Of each layer and task: accuracy of a linear probe on classes of later tasks (0 to 1), and D_loc (patches, mean over
    heads); means over seeds."""
    runs = first_setting(usual(tables))
    runs = runs[(runs["training"] == "incremental") & runs["run"].isin(tables["transfer.parquet"]["run"])]
    runs = need(runs[runs["run"].isin(tables["nonlocality.parquet"]["run"])], "no transfer")
    counts = runs.groupby("title")["seed"].transform("count")
    names = [f"{title}, {seeds_words(n)}" for title, n in zip(runs["title"], counts, strict=True)]
    name = dict(zip(runs["run"], names, strict=True))
    served = _over_seeds(tables["transfer.parquet"], TRANSFER, name)
    distances = _over_seeds(after_tasks(tables["nonlocality.parquet"]), NONLOCALITY, name)

    frame = served[
        (served["group"] == "future") & (served["probe"] == "linear") & served["layer"].str.startswith("block ")
    ]
    of_layer = distances[distances["task"] != INITIAL]
    of_layer = of_layer.groupby(["run", "task", "layer"], as_index=False)["d_loc"].mean()
    of_layer["layer"] = "block " + of_layer["layer"].astype(str)
    frame = frame.merge(of_layer, on=["run", "task", "layer"], how="left")
    return frame, transfer.draw(served, distances, first=1), runs["run"]


def _over_seeds(frame: pd.DataFrame, table: Table, name: dict[str, str]) -> pd.DataFrame:
    """The rows of the runs in `name`, means over the runs of one name, in the order of `name`; columns as in `table`."""
    place = {run: i for i, run in enumerate(name)}
    frame = frame[frame["run"].isin(name)]
    frame = frame.sort_values("run", key=lambda runs: runs.map(place), kind="stable")
    frame = frame.assign(run=frame["run"].map(name), pair=frame["run"].map(name))
    averaged = [column for column, (dtype, _) in table.columns.items() if dtype == "float64" or column == "images"]
    keys = [column for column in table.columns if column not in averaged]
    means = frame.groupby(keys, as_index=False, sort=False, dropna=False)[averaged].mean()
    return table.check(means.astype({column: int for column in averaged if column == "images"}))
