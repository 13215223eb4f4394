"""What the paper's Tables gather: Last, Avg and Fgt of four systems, ours beside the published (Tables 1 and 2)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cil import recipes
from figures import paper_tables
from figures.paper.artifact import artifact
from figures.paper.artifacts.common import setting_title, title_of, usual
from figures.paper.claims.quantities import percents
from figures.paper.selection import Tables


@artifact(
    "table1",
    "Table 1: Last, Avg and Fgt, ours beside the published",
    needs=lambda runs: runs.of_tables(imagenet=False),
    section="tables",
)
def table1(tables: Tables):
    """Last, Avg and Fgt, percent, mean and standard deviation over seeds, on CIFAR-100; at the demo's scale on digits, and at
    the scale `learned` on ten classes, which the paper has not."""
    settings = [s.lower() for s in recipes.SCENARIOS["cifar"]]
    caption = "Table 1. CIFAR-100, percent. Published: full training on GPUs. Ours: scale {scale}."
    if "" in set(tables["runs.csv"]["setting"]):
        settings, caption = [""], "Table 1, on digits, which the paper has not. Percent; ours: scale {scale}."
    elif "learned" in set(tables["runs.csv"]["scale"]):
        settings = list(recipes.settings_of("learned"))
        caption = "Table 1, on ten classes, which the paper has not. Percent; ours: scale {scale}."
    return _table(tables, settings, caption)


@artifact(
    "table2",
    "Table 2: the same on ImageNet-100",
    needs=lambda runs: runs.of_tables(imagenet=True),
    section="tables",
)
def table2(tables: Tables):
    """Last, Avg and Fgt, percent, mean and standard deviation over seeds, on ImageNet-100."""
    settings = [f"imagenet-{s.lower()}" for s in recipes.SCENARIOS["imagenet"]]
    return _table(tables, settings, "Table 2. ImageNet-100, percent. Published: full training. Ours: scale {scale}.")


def _table(tables: Tables, settings: list[str], caption: str):
    """Each system in each setting; a setting that the paper has not has no published numbers."""
    runs, percent = usual(tables), percents(tables)
    runs = runs[(runs["training"] == "incremental") & runs["setting"].isin(settings)]
    cells = []
    for setting in settings:
        for system, (title, _) in recipes.SYSTEMS.items():
            method, lpa = system.removesuffix("-lpa"), system.endswith("-lpa")
            of_system = runs[(runs["setting"] == setting) & (runs["method"] == method) & ((runs["n_lpa"] > 0) == lpa)]
            title = title_of(of_system.iloc[0]) if len(of_system) else title
            scale = of_system["scale"].iloc[0] if len(of_system) else ""
            for metric, published in zip(paper_tables.METRICS, _published(setting, system), strict=True):
                ours = [percent[run][metric] for run in of_system["run"]]
                mean, sd = (np.mean(ours) if ours else np.nan), (np.std(ours, ddof=1) if len(ours) > 1 else np.nan)
                name = setting_title(setting)
                cells.append((setting, name, system, title, metric, published, mean, sd, len(ours), scale))
    frame = pd.DataFrame(cells, columns=paper_tables.COLUMNS)
    scale = runs["scale"].iloc[0] if len(runs) else "none, not run"
    return frame, paper_tables.markdown(frame, caption.format(scale=scale)), runs["run"]


def _published(setting: str, system: str) -> list[float]:
    """Last, Avg and Fgt in the paper, percent; NaN where it has no such setting."""
    if setting not in recipes.PUBLISHED:
        return [np.nan] * len(paper_tables.METRICS)
    return [float(text) for text in recipes.PUBLISHED[setting][list(recipes.SYSTEMS).index(system)].split("/")]
