"""Two runs, checkpoints or models on the same images: who looks farther, at each task and layer, and how sure that is.

Layers pair, heads do not: between two networks that were trained apart a head has no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cil import checkpoint, text
from locality_probe.intervals import bootstrap, check_same_images, layer_means, over_seeds, simultaneous
from locality_probe.plan import Plan
from locality_probe.subject import is_task_of_run
from locality_probe.survey import survey
from locality_probe.tables import ALL_TASKS, COMPARISON, INITIAL, compared

Side = tuple[str, int | None]  # a run, model or file by its name in the tables, and one task of it, or None for all

MARGIN = 0.01  # of D_uniform: two networks whose difference surely is smaller look equally far
WORDS = {
    "farther": "looks farther",
    "closer": "looks closer",
    "equal": "looks as far",
    "undecided": "undecided",
}


def compare(
    per_image: pd.DataFrame, nonlocality: pd.DataFrame, pairs: list[tuple[Side, Side]], margin: float = MARGIN
) -> pd.DataFrame:
    """The table COMPARISON: D_loc of the first minus that of the second, per task and layer, and over all common tasks.

    One pair: paired over images, by bootstrap. Several pairs, which are seeds of one experiment: Student's t over the
    pairs' differences. The verdict is that of the interval which holds for all rows at once (max-|t|, over images) or, as
    seeds are few, for all layers of a task (Bonferroni, over seeds): farther or closer where it excludes 0, equal where it
    lies within margin * D_uniform.
    Runs pair task by task; two networks of one task each pair whatever their tasks are called.

    per_image, nonlocality: tables of one measurement that has all of these.
    Raises ValueError for different layers, grids or images, and without a common task.
    """
    cells, uniform = _cells(nonlocality, pairs)
    means = layer_means(per_image)
    columns = [
        [[(run, tasks[i], layer) for tasks, layer in cells] for i, (run, _) in enumerate(pair)] for pair in pairs
    ]
    check_same_images(means[list(dict.fromkeys(c for pair in columns for side in pair for c in side))])
    both = np.stack([[means[side].to_numpy() for side in pair] for pair in columns])  # [pairs, 2, images, cells]
    if len({tasks for tasks, _ in cells}) > 1:  # and the mean over tasks, layer by layer
        layers = sorted({layer for _, layer in cells})
        of = [[i for i, (_, layer) in enumerate(cells) if layer == wanted] for wanted in layers]
        both = np.concatenate([both, np.stack([both[..., i].mean(-1) for i in of], -1)], -1)
        cells = cells + [((ALL_TASKS, ALL_TASKS), layer) for layer in layers]
    difference = both[:, 0] - both[:, 1]
    if len(pairs) == 1:
        if difference.shape[1] < 2:
            raise ValueError("one image has no interval: give --n 2 or more")
        low, high = bootstrap(difference[0])
        low_all, high_all = simultaneous(difference[0])
        over, n = "images, paired", difference.shape[1]
    else:
        by_seed = difference.mean(1)
        low, high = over_seeds(by_seed)
        low_all, high_all = over_seeds(by_seed, len({layer for _, layer in cells}))
        over, n = "seeds, paired", len(pairs)
    mean, sides = difference.mean((0, 1)), both.mean((0, 2))
    names = [" + ".join(dict.fromkeys(run for run, _ in side)) for side in zip(*pairs, strict=True)]
    frame = pd.DataFrame({
        "run": names[0], "other": names[1], "task": [tasks[0] for tasks, _ in cells],
        "other_task": [tasks[1] for tasks, _ in cells], "layer": [layer for _, layer in cells],
        "d_loc": sides[0], "d_loc_other": sides[1], "difference": mean, "low": low, "high": high,
        "low_all": low_all, "high_all": high_all, "d_uniform": [uniform[layer] for _, layer in cells],
        "over": over, "n": n,
    })  # fmt: skip
    frame["verdict"] = [_verdict(*row) for row in zip(low_all, high_all, margin * frame["d_uniform"], strict=True)]
    return COMPARISON.check(frame)


def measure(
    plan: Plan, pairs: list[tuple[str, str]], device: str = "cpu", report: Callable[[str], None] = lambda done: None
) -> pd.DataFrame:
    """The table COMPARISON of pairs of run directories or weights files, which `plan` measures all on the same images.

    Raises ValueError as `compare` and `survey` do.
    """
    result = survey((make() for make in plan.subjects), plan.images, device, report)
    sides = [(side_of(first), side_of(second)) for first, second in pairs]
    return compare(result.per_image, result.nonlocality, sides)


def _verdict(low: float, high: float, margin: float) -> str:
    if low > 0 or high < 0:
        return "farther" if low > 0 else "closer"
    return "equal" if -margin <= low and high <= margin else "undecided"


def _cells(nonlocality: pd.DataFrame, pairs: list[tuple[Side, Side]]) -> tuple[list[tuple[tuple[int, int], int]], dict]:
    """[((task of the first, of the second), layer)] that every pair has, and D_uniform by layer."""
    rows = nonlocality[nonlocality["task"] != INITIAL].drop_duplicates(["run", "task", "layer"])
    common: set | None = None
    uniform: dict[int, float] = {}
    for pair in pairs:
        sides = [rows[(rows["run"] == run) & ((rows["task"] == task) | (task is None))] for run, task in pair]
        shapes = [dict(zip(side["layer"], side["d_uniform"], strict=False)) for side in sides]
        if shapes[0] != shapes[1]:
            what = "; ".join(
                f"{run} has layers {', '.join(map(str, shape))} with D_uniform "
                f"{', '.join(f'{u:.3f}' for u in dict.fromkeys(shape.values()))}"
                for (run, _), shape in zip(pair, shapes, strict=True)
            )
            raise ValueError(f"layers or grids do not pair: {what}")
        first, second = (sorted(set(side["task"])) for side in sides)
        one_each = len(first) == len(second) == 1
        found = {(first[0], second[0])} if one_each else {(task, task) for task in set(first) & set(second)}
        if not found:
            raise ValueError(f"{pair[0][0]} has tasks {first} and {pair[1][0]} has {second}: none in common")
        common = found if common is None else common & found
        uniform |= shapes[0]
    if not common:
        raise ValueError("the pairs have no task in common")
    return [(tasks, layer) for tasks in sorted(common) for layer in sorted(uniform)], uniform


def side_of(path: str) -> Side:
    """What a run directory or weights file is called in the tables."""
    if not Path(path).is_file():
        return checkpoint.open_run(path).name, None
    if not is_task_of_run(Path(path)):
        return Path(path).stem, None
    directory = checkpoint.open_run(Path(path).parent)
    task = next((t for t in directory.tasks if directory.weights_path(t).name == Path(path).name), None)
    if task is None:
        raise ValueError(
            f"{path} is no network after a task of its run: `compare` pairs those; there: {directory.tasks}"
        )
    return directory.name, task


def confounders(pairs: list[tuple[str, str]]) -> list[str]:
    """A sentence for each pair of runs whose settings differ in more than training and seed."""
    sentences = []
    for pair in pairs:
        folders = [Path(path) if Path(path).is_dir() else Path(path).parent for path in pair]
        if all((folder / "run.json").is_file() for folder in folders):
            first, second = (checkpoint.open_run(folder) for folder in folders)
            found = first.run.differences(second.run, {"training", "seed"}) | (
                {"trainer": (first.trainer, second.trainer)} if first.trainer != second.trainer else {}
            )
            differ = [f"{name} ({mine}, {other})" for name, (mine, other) in found.items()]
            if differ:
                sentences.append(f"{first.name} and {second.name} differ in more than training: {', '.join(differ)}")
    return sentences


def format_table(frame: pd.DataFrame) -> str:
    """The COMPARISON table as text: task x layer, difference and simultaneous interval, then one sentence per layer."""
    first, (name, other) = frame.iloc[0], compared(frame)
    layers = sorted(frame["layer"].unique())
    at_once = f"all {len(frame)} rows" if first["over"].startswith("images") else "all layers of a task"
    title = (
        f"{name} minus {other}: D_loc in patches, mean over heads; 95 % intervals over {first['n']} {first['over']}, "
        f"for {at_once} at once"
    )
    body = []
    for task, rows in frame.groupby("task", sort=False):
        rows = rows.set_index("layer")
        cells = [f"{r.difference:+.3f} [{r.low_all:+.3f}, {r.high_all:+.3f}]" for r in (rows.loc[x] for x in layers)]
        body.append(["all" if task == ALL_TASKS else f"{task}", *cells])
    lines = []
    tasks = frame[frame["task"] != ALL_TASKS]
    for layer, rows in tasks.groupby("layer"):
        counts = rows["verdict"].value_counts()
        parts = [
            f"{WORDS[v]} at {counts[v]}" if v != "undecided" else f"undecided at {counts[v]}"
            for v in WORDS
            if v in counts
        ]
        lines.append(f"layer {layer}: {name} {', '.join(parts)} of {len(rows)} task{'s' * (len(rows) > 1)}")
    if first["over"].startswith("images"):
        lines.append("These intervals are over images alone: another seed may move more than they say.")
    shown = text.table(["task", *(f"layer {layer}" for layer in layers)], body, left=0)
    return text.block(title, shown, *map(text.prose, lines))
