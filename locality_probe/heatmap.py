"""Attention over one image: which query, layer, head and checkpoint, as arrays ready to draw."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cil import checkpoint
from cil.checkpoint import atomically
from locality_probe.record import Layer, Recorded, record
from locality_probe.subject import Subject, from_run
from locality_probe.tables import INITIAL


@dataclass(frozen=True)
class HeatMaps:
    """maps: float32 [rows, columns, g_h, g_w], attention of the query on each patch (a map over all patches sums to at
    most 1; prefix tokens get the rest); image: uint8 [H, W, 3] as the network sees it; query: (row, column) or None."""

    image: np.ndarray
    maps: np.ndarray
    row_labels: list[str]
    column_labels: list[str]
    query: tuple[int, int] | None
    title: str

    def save(self, path: Path) -> Path:
        """The raw arrays as .npz."""
        arrays = {"image": self.image, "maps": self.maps, "rows": self.row_labels, "columns": self.column_labels}
        arrays |= {"title": self.title}

        def write(part: Path) -> None:
            with open(part, "wb") as file:
                np.savez_compressed(file, **arrays)

        atomically(path, write)
        return path


def heat_maps(
    subjects: list[Subject], image: Image.Image, layer: str = "all", head: str = "mean", query: str = "mean"
) -> HeatMaps:
    """Attention of each subject over `image`.

    layer: number or all; head: number, mean or all; query: mean (over all patches), cls (class or task token, the newest)
    or ROW,COLUMN in patches. Columns are tasks if there are several, else runs, else heads, else layers; rows the rest.
    Raises ValueError for a layer, head or query that is not there.
    """
    panels: dict[tuple, np.ndarray] = {}  # (run, task, layer, head) -> [g_h, g_w]
    grid = None
    for subject in subjects:
        x, measure = subject.preprocess(image)[None], _measure(_parse_query(query))
        try:
            found = record(subject.model, x, measure)
        except ValueError as error:
            raise ValueError(f"{subject.run}: {error}") from None
        usable = [item.layer.index for item in found if item.values]
        if not usable:
            raise ValueError(_no_query(query, found))
        for item in found:
            if layer not in ("all", str(item.layer.index)):
                continue
            if not item.values:
                if layer == "all":
                    continue
                raise ValueError(_no_query(query, [item]) + f"; layers with it: {', '.join(map(str, usable))}")
            if grid is not None and item.layer.grid != grid:
                raise ValueError(f"{subject.run} has a grid of {item.layer.grid}, others {grid}; draw them one by one")
            grid = item.layer.grid
            maps = item.values["map"][0].numpy()  # [H, g_h, g_w]
            if not np.isfinite(maps).all():
                raise ValueError(
                    f"layer {item.layer.index} ({item.layer.name}) of {subject.run} gives attention that is not finite"
                )
            for name, one in _heads(maps, head, subject.run).items():
                task = None if subject.training == "model" else subject.task
                key = subject.run, task, item.layer.index, name
                if key in panels:
                    raise ValueError(
                        f"two checkpoints are called {subject.run}, task {subject.task}; draw them one by one"
                    )
                panels[key] = one
        if layer not in ("all", *(str(item.layer.index) for item in found)):
            raise ValueError(
                f"no layer {layer} in {subject.run}; there: {', '.join(str(i.layer.index) for i in found)}"
            )
    maps, rows, columns, shared = _arrange(panels)
    where = _parse_query(query)
    seen = np.asarray(subjects[0].crop(image.convert("RGB")))
    labels = {"mean": "mean over all patches", "cls": "class or task token"}
    label = labels.get(query, f"patch {query}")
    title = ", ".join(filter(None, (shared, f"query: {label}")))
    return HeatMaps(seen, maps, rows, columns, where if isinstance(where, tuple) else None, title)


def parse_checkpoint(spec: str) -> list[Callable[[], Subject]]:
    """RUN_DIR, RUN_DIR:task or RUN_DIR:all -> what to draw, loaded when called. Without a task: the last one."""
    path, which = re.fullmatch(r"(.*?)(?::(init|all|\d+))?", spec, re.DOTALL).groups()
    run, _, wrong = path.rpartition(":")
    if wrong and Path(run, "run.json").is_file():
        raise ValueError(f"no task {wrong!r} of {run}: a number, init or all")
    directory = checkpoint.open_run(path)
    if not directory.tasks:
        raise ValueError(f"{path} has no finished task yet")
    tasks = {"all": directory.tasks, "init": [INITIAL], None: directory.tasks[-1:]}.get(which) or [int(which)]
    return [lambda task=task: from_run(directory, task) for task in tasks]


def newest_run(root: Path = Path("runs")) -> Path | None:
    """The run directory under `root` whose last task is the newest, or None."""
    weights = [w for run in root.glob("**/run.json") for w in run.parent.glob("task_*.safetensors")]
    return max(weights, key=lambda path: path.stat().st_mtime).parent if weights else None


def _parse_query(query: str) -> str | tuple[int, int]:
    if query in ("mean", "cls"):
        return query
    match = re.fullmatch(r"(\d+),(\d+)", query)
    if not match:
        raise ValueError(f"query={query!r} is neither mean, cls nor ROW,COLUMN in patches, like 3,4")
    return int(match[1]), int(match[2])


def _measure(query: str | tuple[int, int]):
    """record's measure: {map: [b, H, g_h, g_w]}, or nothing where the layer has no such query."""

    def measure(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
        prefix = layer.num_prefix_tokens
        if isinstance(query, tuple) and not all(0 <= q < g for q, g in zip(query, layer.grid, strict=True)):
            raise ValueError(f"query patch {query} is outside the grid of {layer.grid[0]} x {layer.grid[1]} patches")
        if query == "cls":
            if layer.between_patches and prefix == 0:
                return {}
            row = attention[:, :, 0 if layer.between_patches else -1]
        elif not layer.between_patches:
            return {}
        elif query == "mean":
            row = attention[:, :, prefix:].mean(2)
        else:
            row = attention[:, :, prefix + query[0] * layer.grid[1] + query[1]]
        return {"map": row[..., prefix:].unflatten(-1, layer.grid).cpu()}

    return measure


def _no_query(query: str, found: list[Recorded]) -> str:
    reason = next((item.layer.reason for item in found if item.layer.reason), "")
    what = "class token" if query == "cls" else "patch"
    where = f"layer {found[0].layer.index}" if len(found) == 1 else "any layer"
    return f"there is no {what} among the queries of {where}" + (f" ({reason})" if reason else "")


def _heads(maps: np.ndarray, head: str, run: str) -> dict[str, np.ndarray]:
    """[H, g_h, g_w] -> the chosen heads by label."""
    if head == "mean":
        return {"mean": maps.mean(0)}
    if head == "all":
        return {str(h): one for h, one in enumerate(maps)}
    if not head.isdecimal() or int(head) >= len(maps):
        raise ValueError(f"no head {head} in {run}; there: 0 to {len(maps) - 1}, mean, all")
    return {head: maps[int(head)]}


def _arrange(panels: dict[tuple, np.ndarray]) -> tuple[np.ndarray, list[str], list[str], str]:
    """Panels by (run, task, layer, head) -> maps [rows, columns, g_h, g_w], labels of rows and columns, and what all
    panels share. A missing panel is NaN."""
    names = ("", "task", "layer", "head")
    values = [list(dict.fromkeys(key[axis] for key in panels)) for axis in range(4)]
    several = [axis for axis in (1, 0, 3, 2) if len(values[axis]) > 1]  # columns: the first of these that varies
    across = several[0] if several else 0

    def label(axis: int, value: object) -> str:
        value = "init" if axis == 1 and value == INITIAL else value
        return "" if value is None else f"{names[axis]} {value}".strip()

    columns = sorted(values[across]) if across in (1, 2) else values[across]
    rows = list(dict.fromkeys(tuple(v for axis, v in enumerate(key) if axis != across) for key in panels))
    one = next(iter(panels.values()))
    maps = np.full((len(rows), len(columns), *one.shape), np.nan, dtype=np.float32)
    for key, panel in panels.items():
        row = tuple(v for axis, v in enumerate(key) if axis != across)
        maps[rows.index(row), columns.index(key[across])] = panel
    rest = [axis for axis in range(4) if axis != across]

    def join(key: tuple, varying: bool) -> str:
        chosen = (label(a, v) for a, v in zip(rest, key, strict=True) if (len(values[a]) > 1) == varying)
        return ", ".join(filter(None, chosen))

    return maps, [join(row, True) for row in rows], [label(across, value) for value in columns], join(rows[0], False)
