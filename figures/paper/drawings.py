"""Every figure and table of the paper from the tables of a study. Trains and measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cil import recipes
from cil.files import atomically, write_text
from figures import (
    accuracy_curves,
    attention_examples,
    eigenvalues,
    forgetting,
    gap,
    nonlocality_over_tasks,
    paper_tables,
    style,
    sweeps,
    transfer,
)
from figures.attention_examples import Example
from figures.paper import registered
from figures.paper.claims import (
    MIN_SEEDS,
    REGISTERED,
    Tables,
    depth_sweep,
    first_setting,
    lambda_sweep,
    percents,
    scope,
    systems,
)
from figures.paper.study import Study
from locality_probe.intervals import intervals, over_seeds
from locality_probe.tables import CLAIMS, INITIAL, INTERVALS, NONLOCALITY, STUDY, TRANSFER, after_tasks


class NotRun(ValueError):
    """The study holds nothing that this could be drawn from."""


@dataclass(frozen=True)
class Artifact:
    """A figure or table: build(tables) gives what is drawn, as a tidy frame, and the drawing; and the runs behind it.

    kinds: the measurements that it shows, beside accuracy.
    """

    title: str
    build: Callable[[Tables], tuple[pd.DataFrame, Figure | str, Iterable[str]]]
    kinds: tuple[str, ...] = ()


def load(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a study's folder. Raises ValueError where there is no study, naming what is missing."""
    if not (Path(folder) / "runs.csv").is_file():
        raise ValueError(f"{folder} holds no runs.csv, so it is no folder of a study's tables")
    study = Study(folder)
    return {file: study.read(file) for file in STUDY}


Built = dict[str, tuple[pd.DataFrame, Figure | str, list[str]] | NotRun]


def build(tables: Tables, names: Iterable[str] | None = None) -> Built:
    """Each of ARTIFACTS, or of those in `names`: its frame, drawing and runs, or why there is none."""
    found: Built = {}
    for name in ARTIFACTS if names is None else names:
        try:
            frame, drawn, runs = ARTIFACTS[name].build(tables)
            found[name] = frame, drawn, list(dict.fromkeys(runs))
        except NotRun as error:
            found[name] = error
    return found


def write(built: Built, tables: Tables, out: str | Path, echo: Callable[[str], None] = print) -> None:
    """NAME.png, .pdf, .csv and .txt (provenance) of each figure, NAME.md, .csv and .txt of each table, in the folder `out`.

    What was not run is said, not drawn, and an earlier drawing of it goes.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, found in built.items():
        if isinstance(found, NotRun):
            for suffix in (".png", ".pdf", ".csv", ".txt", ".md"):
                (out / f"{name}{suffix}").unlink(missing_ok=True)
            echo(f"{name}: not run ({found})")
            continue
        frame, drawn, runs = found
        atomically(out / f"{name}.csv", lambda part, frame=frame: _nine_digits(frame).to_csv(part, index=False))
        write_text(out / f"{name}.txt", f"{ARTIFACTS[name].title}. {provenance(tables, name, runs)}\n")
        if isinstance(drawn, str):
            write_text(out / f"{name}.md", drawn)
            echo(f"wrote {out / name}.md, .csv")
        else:
            for suffix in (".png", ".pdf"):
                style.save(drawn, out / f"{name}{suffix}")
            echo(f"wrote {out / name}.png, .pdf, .csv")


def write_claims(judged: pd.DataFrame, out: str | Path, echo: Callable[[str], None] = print) -> None:
    """claims.csv and claims.md in the folder `out`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    CLAIMS.write(_nine_digits(judged), out / "claims.csv")
    write_text(out / "claims.md", claims_page(judged))
    echo(f"wrote {out / 'claims'}.csv, .md")


def _nine_digits(frame: pd.DataFrame) -> pd.DataFrame:
    """With numbers of nine significant digits: the last of sixteen differ from one CPU to the next."""
    numbers = frame.select_dtypes("float")
    return frame.assign(**numbers.map(lambda value: float(f"{value:.9g}")))


def provenance(tables: Tables, name: str, runs: Iterable[str]) -> str:
    """A line: scale, how many runs and seeds, by which commits and torch, and the images that NAME's measurements took."""
    rows = tables["runs.csv"].set_index("run").loc[list(dict.fromkeys(runs))]
    if rows.empty:
        return "Not run."
    measured = tables["measurements.csv"]
    measured = measured[measured["run"].isin(rows.index) & measured["kind"].isin(ARTIFACTS[name].kinds)]
    seeds = sorted(rows["seed"].unique())
    seeds_words = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    shown = [
        f"{kind}: {images} images of {source} ({', '.join(sha[:8] for sha in same['sha256'].unique())})"
        for (kind, images, source), same in measured[measured["sha256"] != ""].groupby(["kind", "images", "source"])
    ]
    words = [
        f"Scale {rows['scale'].iloc[0]}", f"{len(rows)} runs, {seeds_words}", f"{rows['steps'].sum()} training steps",
        f"trained at {', '.join(sorted(rows['git'].unique()))} with torch {', '.join(sorted(rows['torch'].unique()))}",
    ]  # fmt: skip
    return "; ".join(words + shown) + "."


def title_of(row: pd.Series) -> str:
    """baseline, baseline + LPA, DyTox(+), DyTox(+) + LPA; mixup is what the + means."""
    base = row["method"] if row["method"] == "baseline" else "DyTox" + "+" * ('"mixup": 0.0' not in row["settings"])
    return base + (" + LPA" if row["n_lpa"] else "")


def setting_title(setting: str) -> str:
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


def _seeds_words(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds > 1)}"


# The figures.


def fig1(tables: Tables):
    runs = first_setting(usual(tables))
    runs = need(runs[runs["method"] == "baseline"], "no baseline")
    rows = tables["accuracy.csv"].merge(runs[["run", "title", "training"]], on="run")
    words = {"incremental": "CIL", "joint": "joint"}
    rows["title"] = [f"{title}, {words[t]}" for title, t in zip(rows["title"], rows["training"], strict=True)]
    order = [t for t in dict.fromkeys(rows["title"]) if t != "baseline + LPA, joint"]
    order = sorted(order, key=["baseline, CIL", "baseline, joint", "baseline + LPA, CIL"].index)
    means = rows.groupby(["title", "task", "on_task"], as_index=False)["accuracy"].mean()
    frame = pd.concat([means[means["title"] == title] for title in order])[forgetting.COLUMNS]
    return frame, forgetting.draw(frame), rows["run"]


def curves(tables: Tables):
    runs = need(usual(tables), "no system of the tables")
    rows = tables["accuracy.csv"].merge(runs[["run", "setting", "title", "training", "classes"]], on="run")
    of_task = ["setting", "title", "training", "run", "task"]
    after = rows.groupby(of_task, as_index=False, sort=False)[["images", "correct"]].sum()
    after["accuracy"] = after["correct"] / after["images"]
    place = {run: i for i, run in enumerate(runs.sort_values(["training", "method", "n_lpa"])["run"])}
    after = after.sort_values("run", key=lambda names: names.map(place), kind="stable")
    total = after.groupby("run")["images"].transform("max")
    after = after.merge(runs[["run", "classes"]], on="run")
    after["classes"] = (after["classes"] * after["images"] / total).round().astype(int)
    found = []
    for key, same in after.groupby(["setting", "title", "training", "classes"], sort=False):
        values = same["accuracy"].to_numpy()
        low, high = (values.min(), values.max()) if len(values) > 1 else (np.nan, np.nan)
        found.append((setting_title(key[0]), *key[1:], values.mean(), low, high, len(values)))
    frame = pd.DataFrame(found, columns=accuracy_curves.COLUMNS)
    return frame, accuracy_curves.draw(frame), after["run"]


def _shown_attention(tables: Tables) -> pd.DataFrame:
    """Rows of RUNS whose attention is there: one seed of each system."""
    runs, there = usual(tables), set(tables["attention.parquet"]["run"])
    kept = runs[runs["run"].isin(there)].sort_values(["seed"])
    return need(kept.drop_duplicates(["title", "training"]), "no attention over the examples")


def _maps(tables: Tables, runs: pd.DataFrame, images: list[str], tasks: list[int], layer: int):
    """Mean over heads of the middle patch's attention: frame of attention_examples.COLUMNS, and the examples."""
    rows = tables["attention.parquet"]
    grid = rows[["grid_rows", "grid_columns"]].iloc[0].to_numpy()
    middle = tuple(int(g // 2) for g in grid)
    rows = rows[(rows["layer"] == layer) & (rows["query"] == middle[0] * grid[1] + middle[1])]
    parts = []
    for _, run in runs.iterrows():
        for image in images:
            for task in tasks:
                heads = rows[(rows["run"] == run["run"]) & (rows["image"] == image) & (rows["task"] == task)]
                weights = np.stack([np.frombuffer(w, np.uint8) for w in heads["weights"]]) / 255
                mean = (weights * heads["peak"].to_numpy()[:, None]).mean(0).reshape(grid)
                r, c = np.indices(grid)
                words = "joint" if run["training"] == "joint" else "CIL"
                words = f"{words}, LPA" if run["n_lpa"] else words
                parts.append(pd.DataFrame({"image": image, "title": words, "training": run["training"], "task": task,
                                           "row": r.ravel(), "column": c.ravel(), "attention": mean.ravel()}))  # fmt: skip
    shown = tables["examples.parquet"].set_index("image")
    examples = {
        name: Example(np.frombuffer(shown.loc[name, "rgb"], np.uint8).reshape(*shown.loc[name, ["rows", "columns"]], 3), middle)
        for name in images
    }  # fmt: skip
    return pd.concat(parts)[attention_examples.COLUMNS], examples


def _some(tasks: Iterable[int], most: int) -> list[int]:
    tasks = sorted(tasks)
    return [tasks[i] for i in np.unique(np.linspace(0, len(tasks) - 1, min(most, len(tasks))).round().astype(int))]


def fig2(tables: Tables):
    runs = _shown_attention(tables)
    runs = runs[runs["n_lpa"] == 0]
    runs = need(runs[runs["method"] == "baseline"], "no attention of the baseline")
    rows = tables["attention.parquet"]
    layer, image = rows["layer"].max(), rows["image"].iloc[0]
    tasks = _some(rows["task"].unique(), 5)
    frame, examples = _maps(tables, runs, [image], tasks, layer)
    mine = after_tasks(tables["nonlocality.parquet"]).merge(runs[["run"]], on="run")
    mine = mine[(mine["layer"] == layer) & (mine["task"] != INITIAL)]
    distances = mine.groupby(["training", "task"], as_index=False, sort=False)["d_loc"].mean()
    frame["layer"] = layer
    return frame, attention_examples.draw(frame, examples, distances), runs["run"]


def fig3(tables: Tables):
    runs = _shown_attention(tables)
    runs = need(runs[(runs["method"] == "baseline") & (runs["n_lpa"] == 0)], "no attention of the baseline")
    runs = runs.sort_values("training", ascending=False)  # joint first, as in the paper
    rows = tables["attention.parquet"]
    layer, tasks = rows["layer"].max() // 2, _some(rows["task"].unique(), 5)
    frame, examples = _maps(tables, runs, list(dict.fromkeys(rows["image"])), tasks, layer)
    frame["layer"] = layer
    return frame, attention_examples.draw(frame, examples), runs["run"]


def distances_of(
    tables: Tables,
    methods: tuple[str, ...],
    lpa: tuple[bool, ...],
    trainings: tuple[str, ...] = ("incremental", "joint"),
):
    """NONLOCALITY and INTERVALS over seeds: a run is a title and a training, a pair a title; and the runs behind them."""
    runs = first_setting(usual(tables, trainings))
    runs = runs[runs["method"].isin(methods) & (runs["n_lpa"] > 0).isin(lpa)]
    there = set(tables["nonlocality.parquet"]["run"])
    runs = need(runs[runs["run"].isin(there)], "no D_loc of these systems")
    seeds = runs.groupby(["title", "training"])["seed"].transform("count")
    runs = runs.assign(group=[f"{t}, {tr}" for t, tr in zip(runs["title"], runs["training"], strict=True)],
                       pair=[f"{t}, {_seeds_words(n)}" for t, n in zip(runs["title"], seeds, strict=True)])  # fmt: skip
    # A pair is named after its incremental side: its joint side may have fewer seeds.
    names = runs[runs["training"] == "incremental"].drop_duplicates("title").set_index("title")["pair"]
    runs["pair"] = [names.get(title, pair) for title, pair in zip(runs["title"], runs["pair"], strict=True)]
    rows = after_tasks(tables["nonlocality.parquet"]).drop(columns=["pair", "training"])
    rows = runs[["run", "pair", "group", "training"]].merge(rows, on="run")  # in the order of the systems
    numbers = [c for c, (dtype, _) in NONLOCALITY.values.items() if dtype == "float64"]
    keys = ["group", "pair", "training", "kind", "extent", "task", "at_step", "layer", "head"]
    means = rows.groupby(keys, as_index=False, sort=False)[[*numbers, "images"]].mean()
    means = means.rename(columns={"group": "run"}).astype({"images": int})
    per_image = tables["layer_images.parquet"]
    per_image = per_image[per_image["run"].isin(runs["run"])]
    twins = {}
    for _, of_seed in runs.groupby(["title", "seed"]):
        by = of_seed.set_index("training")["run"]
        if {"incremental", "joint"} <= set(by.index):
            twins[by["incremental"]] = by["joint"]
    found = intervals(
        per_image, twins, dict(zip(runs["run"], zip(runs["group"], runs["seed"], strict=True), strict=True))
    )
    several = found[found["over"].str.startswith("seeds")]
    # What one seed alone shows has its interval over images, under the name of the group.
    group = dict(zip(runs["run"], runs["group"], strict=True))
    single = found[found["over"].str.startswith("images")]
    single = single.assign(run=single["run"].map(group), other=[_renamed(other, group) for other in single["other"]])
    key = ["run", "task", "layer", "other"]
    single = single[~single.duplicated(key, keep=False)]
    both = pd.concat([several, single]).drop_duplicates(key)
    return NONLOCALITY.check(means), INTERVALS.check(both), runs


def _renamed(other: str, group: dict[str, str]) -> str:
    run, colon, task = other.rpartition(":")
    return f"{group[run]}:{task}" if colon else ""


def _distances_figure(tables: Tables, lpa: tuple[bool, ...]):
    means, sure, runs = distances_of(tables, ("baseline",), lpa)
    return _distances_frame(means, sure), nonlocality_over_tasks.draw(means, sure), runs["run"]


def _distances_frame(means: pd.DataFrame, sure: pd.DataFrame) -> pd.DataFrame:
    """Means over heads with their own intervals, a row a line's point."""
    own = sure[sure["other"] == ""]
    keys = ["run", "pair", "training", "kind", "task", "layer"]
    frame = means.groupby(keys, as_index=False, sort=False)[["d_loc", "d_uniform"]].mean()
    own = own[["run", "task", "layer", "low", "high", "over", "n"]]
    return frame.merge(own, on=["run", "task", "layer"], how="left")


def fig4(tables: Tables):
    return _distances_figure(tables, (False,))


def fig6(tables: Tables):
    return _distances_figure(tables, (False, True))


def by_steps(tables: Tables):
    trainings = ("incremental", "joint", "joint-as-long")
    means, sure, runs = distances_of(tables, ("baseline",), (False, True), trainings)
    taken = need(runs[["run", "group"]].merge(tables["steps.csv"], on="run"), "no steps of these runs")
    taken = taken.groupby(["group", "task"], as_index=False)["steps"].first().rename(columns={"group": "run"})
    frame = _distances_frame(means, sure).merge(taken, on=["run", "task"], how="left")
    return frame, nonlocality_over_tasks.draw(means, sure, taken), runs["run"]


def gaps(tables: Tables):
    _, sure, runs = distances_of(tables, ("baseline", "dytox"), (False, True))
    rows = sure[sure["other"].str.contains(", joint:", regex=False) & (sure["task"] >= 0)]
    rows = need(rows[rows["run"].str.endswith(", incremental")], "no run beside its joint twin")
    frame = rows.assign(title=rows["run"].str.removesuffix(", incremental")).rename(columns={"mean": "difference"})
    order = {title: i for i, title in enumerate(dict.fromkeys(runs["title"]))}  # as `usual` has them
    frame = frame.sort_values("title", key=lambda titles: titles.map(order), kind="stable")
    return frame[gap.COLUMNS], gap.draw(frame), runs["run"]


def fig5(tables: Tables):
    runs = first_setting(usual(tables))
    runs = runs[(runs["training"] == "incremental") & runs["run"].isin(tables["transfer.parquet"]["run"])]
    runs = need(runs[runs["run"].isin(tables["nonlocality.parquet"]["run"])], "no transfer")
    counts = runs.groupby("title")["seed"].transform("count")
    names = [f"{title}, {_seeds_words(n)}" for title, n in zip(runs["title"], counts, strict=True)]
    name = dict(zip(runs["run"], names, strict=True))
    order = {run: place for place, run in enumerate(name)}  # as `usual` has them

    def together(frame: pd.DataFrame, table) -> pd.DataFrame:
        frame = frame[frame["run"].isin(name)]
        frame = frame.sort_values("run", key=lambda named: named.map(order), kind="stable")
        frame = frame.assign(run=frame["run"].map(name), pair=frame["run"].map(name))
        fixed = [c for c, (dtype, _) in table.columns.items() if dtype != "float64" and c not in ("images",)]
        rest = [c for c in table.columns if c not in fixed]
        means = frame.groupby(fixed, as_index=False, sort=False, dropna=False)[rest].mean()
        return table.check(means.astype({c: int for c in rest if c == "images"}))

    served = together(tables["transfer.parquet"], TRANSFER)
    distances = together(after_tasks(tables["nonlocality.parquet"]), NONLOCALITY)
    kept = (served["group"] == "future") & (served["probe"] == "linear") & served["layer"].str.startswith("block ")
    frame = served[kept]
    own = distances[distances["task"] != INITIAL].groupby(["run", "task", "layer"], as_index=False)["d_loc"].mean()
    own["layer"] = "block " + own["layer"].astype(str)
    frame = frame.merge(own, on=["run", "task", "layer"], how="left")
    return frame, transfer.draw(served, distances), runs["run"]


def fig7(tables: Tables):
    runs = first_setting(usual(tables))
    runs = runs[(runs["method"] == "baseline") & (runs["training"] == "incremental")]
    runs = need(runs[runs["run"].isin(tables["spectrum.parquet"]["run"])], "no spectrum")
    rows = tables["spectrum.parquet"].merge(runs[["run", "title", "seed"]], on="run")
    rows = rows[(rows["layer"] == "token") & (rows["group"] == "all") & (rows["task"] != INITIAL)]
    rows = rows[rows["task"].isin(_some(rows["task"].unique(), 4))]
    frame = rows.groupby(["title", "task", "rank"], as_index=False)[["eigenvalue", "eigenvalue_normalised"]].mean()
    frame = frame.merge(_ratios(rows), on=["title", "task", "rank"], how="left")
    return frame[eigenvalues.COLUMNS], eigenvalues.draw(frame), runs["run"]


def _ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """How many times as large as the first title's of the same seed each eigenvalue is: geometric mean over seeds, and its 95 %
    interval over them at each rank by itself, where there are MIN_SEEDS."""
    values = rows.set_index(["task", "rank", "title", "seed"])["eigenvalue"]
    logs = np.log(values.where(values > 0)).unstack(["title", "seed"])
    titles, found = sorted(rows["title"].unique()), []
    for title in titles:
        ratios = (logs[title] - logs[titles[0]]).dropna(axis=1, how="all").T.to_numpy()  # of seeds that both have
        low, high = over_seeds(ratios) if len(ratios) >= MIN_SEEDS else np.full((2, ratios.shape[1]), np.nan)
        ends = dict(zip(("ratio", "low", "high"), np.exp([ratios.mean(0), low, high]), strict=True))
        found.append(pd.DataFrame({"title": title, **ends}, index=logs.index).reset_index())
    return pd.concat(found)


def _sweep(tables: Tables, runs: pd.DataFrame, column: str, label: str, marked: float | None, logarithmic: bool):
    if runs[column].nunique() < 2:
        raise NotRun(f"fewer than two values of {column}")
    percent = percents(tables)
    frame = pd.DataFrame(
        [(row[column], row["seed"], metric, percent[row["run"]][metric])
         for _, row in runs.iterrows() for metric in sweeps.METRICS],
        columns=sweeps.COLUMNS,
    )  # fmt: skip
    return frame, sweeps.draw(frame, label, logarithmic, marked), runs["run"]


def fig8(tables: Tables):
    runs = lambda_sweep(scope(tables["runs.csv"]))
    return _sweep(tables, runs, "lambda_init", r"$\lambda$ at initialisation", 0.02, True)


def fig9(tables: Tables):
    runs = depth_sweep(scope(tables["runs.csv"]))
    return _sweep(tables, runs, "n_lpa", "LPA layers", None, False)


def _table(tables: Tables, settings: list[str], caption: str):
    """Ours beside the published; the demo's digits have no counterpart, and take a table of their own rows."""
    runs, percent = usual(tables), percents(tables)
    runs = runs[runs["training"] == "incremental"]
    found = []
    for setting in settings:
        for place, (system, (title, _)) in enumerate(recipes.SYSTEMS.items()):
            method, lpa = system.removesuffix("-lpa"), system.endswith("-lpa")
            mine = runs[(runs["setting"] == setting) & (runs["method"] == method) & ((runs["n_lpa"] > 0) == lpa)]
            title = title_of(mine.iloc[0]) if len(mine) else title
            published = [np.nan] * 3
            if setting in recipes.PUBLISHED:
                published = [float(text) for text in recipes.PUBLISHED[setting][place].split("/")]
            for metric, there in zip(paper_tables.METRICS, published, strict=True):
                ours = [percent[run][metric] for run in mine["run"]]
                mean, sd = (np.mean(ours) if ours else np.nan), (np.std(ours, ddof=1) if len(ours) > 1 else np.nan)
                scale = mine["scale"].iloc[0] if len(mine) else ""
                found.append(
                    (setting, setting_title(setting), system, title, metric, there, mean, sd, len(ours), scale)
                )
    frame = pd.DataFrame(found, columns=paper_tables.COLUMNS)
    mine = runs[runs["setting"].isin(settings)]
    scale = mine["scale"].iloc[0] if len(mine) else "none, not run"
    return frame, paper_tables.markdown(frame, caption.format(scale=scale)), mine["run"]


def table1(tables: Tables):
    settings = [s.lower() for s in recipes.SCENARIOS["cifar"]]
    caption = "Table 1. CIFAR-100, percent. Published: full training on GPUs. Ours: scale {scale}."
    if "" in set(tables["runs.csv"]["setting"]):
        settings, caption = [""], "Table 1, on digits, which the paper has not. Percent; ours: scale {scale}."
    elif "learned" in set(tables["runs.csv"]["scale"]):
        settings = list(recipes.settings_of("learned"))
        caption = "Table 1, on ten classes, which the paper has not. Percent; ours: scale {scale}."
    return _table(tables, settings, caption)


def table2(tables: Tables):
    settings = [f"imagenet-{s.lower()}" for s in recipes.SCENARIOS["imagenet"]]
    return _table(tables, settings, "Table 2. ImageNet-100, percent. Published: full training. Ours: scale {scale}.")


ARTIFACTS: dict[str, Artifact] = {
    "fig1": Artifact("Figure 1: class-incremental learning and catastrophic forgetting", fig1),
    "fig2": Artifact(
        "Figure 2: locality degradation, attention of the middle patch and D_loc of the deepest layer",
        fig2,
        ("attention", "nonlocality"),
    ),
    "fig3": Artifact(
        "Figure 3: attention of the middle patch in the middle layer, joint training against CIL", fig3, ("attention",)
    ),
    "fig4": Artifact(
        "Figure 4: D_loc of each layer over the tasks, CIL against joint training", fig4, ("nonlocality",)
    ),
    "fig5": Artifact("Figure 5: transferability and locality of each layer", fig5, ("nonlocality", "transfer")),
    "fig6": Artifact("Figure 6: D_loc of each layer over the tasks, without and with LPA", fig6, ("nonlocality",)),
    "fig7": Artifact(
        "Figure 7: covariance eigenvalues of the token that the newest head is fed, with and without LPA",
        fig7,
        ("spectrum",),
    ),
    "fig8": Artifact("Figure 8: accuracy against lambda at initialisation", fig8),
    "fig9": Artifact("Figure 9: accuracy against the number of LPA layers", fig9),
    "gap": Artifact("D_loc of CIL minus that of joint training, layers by tasks", gaps, ("nonlocality",)),
    "steps": Artifact(
        "D_loc against the steps that a network has taken: CIL, joint training task by task, joint training as long as CIL",
        by_steps,
        ("nonlocality",),
    ),
    "curves": Artifact("Accuracy over all classes seen so far", curves),
    "table1": Artifact("Table 1: Last, Avg and Fgt, ours beside the published", table1),
    "table2": Artifact("Table 2: the same on ImageNet-100", table2),
}


def claims_page(judged: pd.DataFrame) -> str:
    """CLAIMS as Markdown: a verdict a claim, and below each the numbers it rests on.

    Where one part alone decides (figures.registered), it is in bold and marked, and margin and power are shown.
    """
    scale = judged["scale"].iloc[0] if len(judged) else ""
    primary = registered.PRIMARY if scale == REGISTERED else {}
    rule = registered.ON_PAGE if primary else (
        "Statistics and rule were fixed beforehand: `figures/claims.py`. Above 0 is what the paper says. "
        "Intervals are 95 %: Student's t over seeds, for all parts of a claim at once, and bootstrap over images. A part "
        f"holds where both lie above 0, does not hold where both lie below; fewer than {MIN_SEEDS} seeds decide nothing.\n"
        "A claim holds if all its parts do, and does not hold if one of them does not. C2* is a control, added after C2 was "
        "looked at."
    )  # fmt: skip
    lines = ["# The paper's claims", "", f"Scale `{scale}`. {rule}", "", "| claim | verdict | why |", "|---|---|---|"]
    for row in judged[judged["part"] == ""].itertuples():
        lines.append(f"| {row.claim}: {row.statistic} | **{row.verdict}** | {row.reason} |")
    head = ["over seeds", "margin", "power"] if primary else ["over seeds", "over images"]
    head = ["part", "statistic", "mean", *head, "n", "verdict"]
    for claim, rows in judged[judged["part"] != ""].groupby("claim"):
        lines += ["", f"## {claim}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in rows.itertuples():
            seeds, images = (
                f"{low:+.3g} to {high:+.3g}" if low == low else "-"
                for low, high in ((row.low, row.high), (row.low_images, row.high_images))
            )
            part, shown = row.part, [seeds, images]
            if primary:
                part = f"**{part} (decides)**" if part == primary[claim] else part
                shown = [seeds, *("-" if np.isnan(value) else f"{value:.3g}" for value in (row.margin, row.power))]
            lines.append(
                f"| {part} | {row.statistic} ({row.unit}) | {row.value:+.3g} | {' | '.join(shown)} | {row.seeds} "
                f"(images: {row.images}) | {row.verdict} |"
            )
    return "\n".join(lines) + "\n"
