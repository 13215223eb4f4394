"""Attention over one image: which query, layer, head and checkpoint, as arrays ready to draw."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cil import checkpoint
from cil.files import atomically
from locality_probe.record import Layer, Recorded, record
from locality_probe.subject import Subject, from_run
from locality_probe.tables import INITIAL

AXES = ("run", "task", "layer", "head")


@dataclass(frozen=True)
class HeatMaps:
    """maps: float32 [rows, columns, g_h, g_w], attention of the query on each patch (a map over all patches sums to at
    most 1; prefix tokens get the rest), or differences of it; image: uint8 [H, W, 3] as the network sees it; query: (row,
    column) or None; left_out: a sentence for each layer that could not be drawn with the others."""

    image: np.ndarray
    maps: np.ndarray
    row_labels: list[str]
    column_labels: list[str]
    query: tuple[int, int] | None
    title: str
    left_out: list[str]

    def save(self, path: Path, scale: str = "shared") -> Path:
        """The raw arrays as .npz, and what they are: labels, title, query and the colour scale of the picture."""
        arrays = {"image": self.image, "maps": self.maps, "rows": self.row_labels, "columns": self.column_labels}
        arrays |= {"title": self.title, "scale": scale, "query": [] if self.query is None else self.query}

        def write(part: Path) -> None:
            with open(part, "wb") as file:
                np.savez_compressed(file, **arrays)

        atomically(path, write)
        return path


Panels = dict[tuple, np.ndarray]  # (run, task, layer, head) -> [g_h, g_w]


def heat_maps(
    subjects: list[Subject], image: Image.Image, layer: str = "all", head: str = "mean", query: str = "mean",
    rollout: bool = False, difference: bool = False, columns: str | None = None,
) -> HeatMaps:  # fmt: skip
    """Attention of each subject over `image`.

    layer: all, or numbers like 0,2; head: mean, all, or numbers; query: mean (over all patches), cls (class or task token,
    the newest), ROW,COLUMN in patches, or pixel:ROW,COLUMN of `image`. rollout: attention as it adds up from the first
    layer on, heads averaged, half of it residual (Abnar & Zuidema 2020). difference: of two subjects, the second minus
    the first. columns: run, task, layer or head; without it tasks if there are several, else runs, heads, layers; rows are
    the rest. Raises ValueError for a layer, head or query that is not there.
    """
    layers = None if layer == "all" else _numbers(layer, "layer")
    if rollout and head != "mean":
        raise ValueError(f"head={head!r} does not go with rollout, which averages heads")
    if difference and len(subjects) != 2:
        raise ValueError(
            f"a difference is of two checkpoints, and there are {len(subjects)}: like RUN_DIR:0 and RUN_DIR:4"
        )
    if difference and head != "mean" and subjects[0].run != subjects[1].run:
        raise ValueError(
            f"head={head!r}: heads of {subjects[0].run} and {subjects[1].run} do not pair; their mean does"
        )
    panels: Panels = {}
    grid, left_out, where = None, [], None
    for subject in subjects:
        x = subject.preprocess(image)[None]
        where = _query(query, subject, image)
        try:
            found = record(
                subject.model, x, _rows_of if rollout else _measure(where), subject.grid, subject.num_prefix_tokens
            )
        except ValueError as error:
            raise ValueError(f"{subject.run}: {error}") from None
        if rollout:
            found = _rolled(found, where, subject.run)
        there = [item.layer.index for item in found]
        missing = [number for number in layers or [] if number not in there]
        if missing:
            raise ValueError(f"no layer {missing[0]} in {subject.run}; there: {', '.join(map(str, there))}")
        usable = [item for item in found if item.values]
        if not usable:
            raise ValueError(_no_query(query, found))
        for item in found if layers is None else [found[number] for number in layers]:
            if not item.values:
                if layers is not None:
                    others = ", ".join(str(other.layer.index) for other in usable)
                    raise ValueError(_no_query(query, [item]) + f"; layers with it: {others}")
                continue
            if grid is not None and item.layer.grid != grid:
                sentence = f"layer {item.layer.index} of {subject.run} has a grid of {item.layer.grid}, others {grid}"
                if layers is not None or item is usable[0]:
                    raise ValueError(f"{sentence}; draw them one by one")
                left_out.append(f"left out: {sentence}")
                continue
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
    if difference:
        panels = _difference(panels)
    maps, rows, names, shared = _arrange(panels, columns)
    seen = np.asarray(subjects[0].crop(image.convert("RGB")))
    labels = {"mean": "mean over all patches", "cls": "class or task token"}
    label = labels.get(query, f"patch {where[0]},{where[1]}" if isinstance(where, tuple) else query)
    title = ", ".join(filter(None, (shared, "rollout" * rollout, f"query: {label}")))
    return HeatMaps(seen, maps, rows, names, where if isinstance(where, tuple) else None, title, left_out)


def _numbers(text: str, what: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{what}={text!r} is neither all nor numbers like 0,2")
    return [int(part) for part in parts]


def _difference(panels: Panels) -> Panels:
    """Second checkpoint minus first, for the layers and heads that both have."""
    first, second = dict.fromkeys(key[:2] for key in panels)
    common = [key[2:] for key in panels if key[:2] == first and (*second, *key[2:]) in panels]
    if not common:
        raise ValueError("the two checkpoints have no layer and head in common")
    names = [run if task is None else f"{run}:{'init' if task == INITIAL else task}" for run, task in (first, second)]
    run = f"{names[1]} minus {names[0]}"
    return {(run, None, *place): panels[(*second, *place)] - panels[(*first, *place)] for place in common}


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


Query = str | tuple[int, int]  # mean, cls, or a patch as (row, column)


def _query(query: str, subject: Subject, image: Image.Image) -> Query:
    """What was asked for; a pixel becomes the patch that shows it."""
    if query in ("mean", "cls"):
        return query
    match = re.fullmatch(r"(pixel:)?(\d+),(\d+)", query)
    if not match:
        raise ValueError(
            f"query={query!r} is neither mean, cls, ROW,COLUMN in patches, like 3,4, nor pixel:ROW,COLUMN, like pixel:120,64"
        )
    place = int(match[2]), int(match[3])
    return _patch_under(place, subject, image) if match[1] else place


def _patch_under(pixel: tuple[int, int], subject: Subject, image: Image.Image) -> tuple[int, int]:
    """The patch that shows a pixel of the picture: two ramps go through the crop that the network's input goes through."""
    height, width = image.height, image.width
    if pixel[0] >= height or pixel[1] >= width:
        raise ValueError(f"pixel {pixel[0]},{pixel[1]} is outside the picture of {height} rows and {width} columns")
    ramps = np.zeros((height, width, 3), dtype=np.uint8)
    ramps[..., 0], ramps[..., 1] = np.linspace(0, 255, height).round()[:, None], np.linspace(0, 255, width).round()
    seen = np.asarray(subject.crop(Image.fromarray(ramps))).astype(float)
    wanted = [255 * place / max(side - 1, 1) for place, side in zip(pixel, (height, width), strict=True)]
    away = np.maximum(*(np.abs(seen[..., i] - value) for i, value in enumerate(wanted)))
    y, x = np.unravel_index(away.argmin(), away.shape)
    step = max(np.abs(np.diff(seen[..., 0], axis=0)).max(), np.abs(np.diff(seen[..., 1], axis=1)).max())
    if away.min() > 1 + step:
        raise ValueError(
            f"pixel {pixel[0]},{pixel[1]} is cropped away before {subject.run} sees it; choose one nearer the centre"
        )
    grid = _grid_of(subject)
    return int(y * grid[0] // away.shape[0]), int(x * grid[1] // away.shape[1])


def _grid_of(subject: Subject) -> tuple[int, int]:
    """The grid of the subject's first layer between patches."""
    size = subject.crop(Image.new("RGB", (64, 64)))
    x = torch.zeros(1, 3, size.height, size.width)
    found = record(subject.model, x, lambda attention, layer: {}, subject.grid, subject.num_prefix_tokens)
    return next(item.layer.grid for item in found if item.layer.status == "ok" and item.layer.between_patches)


def _measure(query: Query):
    """record's measure: {map: [b, H, g_h, g_w]}, or nothing where the layer has no such query."""

    def measure(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
        if layer.extent == "window" or len(layer.grid) != 2:
            return {}
        row = _row(attention, layer, query)
        return {} if row is None else {"map": row[..., layer.num_prefix_tokens :].unflatten(-1, layer.grid).cpu()}

    return measure


def _row(attention: Tensor, layer: Layer, query: Query) -> Tensor | None:
    """What the query attends to, [b, H, K], or None where the layer has no such query."""
    prefix = layer.num_prefix_tokens
    if isinstance(query, tuple) and not all(0 <= q < g for q, g in zip(query, layer.grid, strict=True)):
        raise ValueError(f"query patch {query} is outside the grid of {layer.grid[0]} x {layer.grid[1]} patches")
    if query == "cls":
        if layer.between_patches and prefix == 0:
            return None
        return attention[:, :, 0 if layer.between_patches else -1]
    if not layer.between_patches:
        return None
    if query == "mean":
        return attention[:, :, prefix:].mean(2)
    return attention[:, :, prefix + query[0] * layer.grid[1] + query[1]]


def _rows_of(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
    """record's measure for the rollout: mean over heads [b, 1, Q, K], or nothing within windows."""
    return {"rows": attention.mean(1, keepdim=True)} if layer.extent == "grid" else {}


def _rolled(found: list[Recorded], query: Query, run: str) -> list[Recorded]:
    """Each layer's mean attention [1, 1, Q, K] -> the rollout up to it, seen from the query: {map: [1, 1, g_h, g_w]}.

    Raises ValueError where a layer is missing or its tokens are others: attention cannot be followed through it then.
    """
    rolled, so_far, first = [], None, None
    for item in found:
        layer = item.layer
        if not item.values:
            why = layer.reason or "it attends within windows"
            raise ValueError(f"no rollout of {run}: layer {layer.index} ({layer.name}) is not seen as a whole: {why}")
        attention = item.values["rows"]
        if not layer.between_patches:  # tokens that look at the patches of the last layer, and at themselves
            extra = layer.keys - (0 if so_far is None else so_far.shape[-1])
            if so_far is not None and extra >= 0:
                own, patches = attention[..., :extra], attention[..., extra:]
                attention = torch.cat([own, patches @ so_far], -1)
            row = _row(attention, layer, query)
        else:
            first = first or layer
            if (layer.grid, layer.num_prefix_tokens) != (first.grid, first.num_prefix_tokens):
                raise ValueError(
                    f"no rollout of {run}: the tokens of layer {layer.index} are not those of layer {first.index}"
                )
            step = (attention + torch.eye(layer.keys)) / 2
            so_far = step if so_far is None else step @ so_far
            row = _row(so_far, layer, query)
        values = {} if row is None else {"map": row[..., layer.num_prefix_tokens :].unflatten(-1, layer.grid)}
        rolled.append(Recorded(layer, values))
    return rolled


def _no_query(query: str, found: list[Recorded]) -> str:
    reason = next((item.layer.reason for item in found if item.layer.reason), "")
    if any(item.layer.extent == "window" for item in found):
        reason = reason or "it attends within windows, which are not drawn over an image"
    what = "class token" if query == "cls" else "patch"
    where = f"layer {found[0].layer.index}" if len(found) == 1 else "any layer"
    return f"there is no {what} among the queries of {where}" + (f" ({reason})" if reason else "")


def _heads(maps: np.ndarray, head: str, run: str) -> dict[str, np.ndarray]:
    """[H, g_h, g_w] -> the chosen heads by label."""
    if head == "mean":
        return {"mean": maps.mean(0)}
    numbers = range(len(maps)) if head == "all" else [int(n) for n in head.split(",") if n.isdecimal()]
    if not numbers or max(numbers) >= len(maps) or (head != "all" and len(numbers) < len(head.split(","))):
        raise ValueError(f"no head {head} in {run}; there: 0 to {len(maps) - 1}, mean, all")
    return {str(h): maps[h] for h in numbers}


def _arrange(panels: Panels, columns_are: str | None = None) -> tuple[np.ndarray, list[str], list[str], str]:
    """Panels -> maps [rows, columns, g_h, g_w], labels of rows and columns, and what all panels share; columns are what
    `columns_are` says, or tasks if there are several, else runs, heads, layers. A missing panel is NaN."""
    names = ("", "task", "layer", "head")
    values = [list(dict.fromkeys(key[axis] for key in panels)) for axis in range(4)]
    several = [axis for axis in (1, 0, 3, 2) if len(values[axis]) > 1]  # columns: the first of these that varies
    across = AXES.index(columns_are) if columns_are else several[0] if several else 0

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
