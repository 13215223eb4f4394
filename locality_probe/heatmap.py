"""The instrument's: attention over one image from a query, by layer, head and checkpoint, as arrays ready to draw."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cil import checkpoint
from cil.files import atomically
from locality_probe.queries import Query, measure_of, no_query, rolled_out, rows_of
from locality_probe.record import Recorded, record
from locality_probe.subject import Subject, from_run
from locality_probe.tables import INITIAL
from locality_probe.typed import Patch, Pixel, Typed, parse_heads, parse_layers, parse_query, split_checkpoint, typed

AXES = ("run", "task", "layer", "head")


@dataclass(frozen=True)
class Panel:
    """attention: float32 [g_h, g_w], of the query on each patch (a map over all patches sums to at most 1; prefix tokens get
    the rest), or a difference of it; seen: uint8 [H, W, 3], the picture as this panel's network sees it; query: its patch,
    or None where the query is no patch."""

    attention: np.ndarray
    seen: np.ndarray
    query: Patch | None


def is_raw(path: Path) -> bool:
    """Whether a file is one that HeatMaps.save has written."""
    try:
        with zipfile.ZipFile(path) as file:
            return {"image.npy", "maps.npy", "rows.npy", "columns.npy", "title.npy"} <= set(file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


Panels = dict[tuple, Panel]  # (run, task, layer, head) -> panel


@dataclass(frozen=True)
class HeatMaps:
    """panels: [rows][columns], None where a checkpoint has no such layer or head; left_out: a sentence for each layer that
    could not be drawn with the others."""

    panels: list[list[Panel | None]]
    row_labels: list[str]
    column_labels: list[str]
    title: str
    left_out: list[str]

    @property
    def maps(self) -> np.ndarray:
        """float32 [rows, columns, g_h, g_w]; NaN where there is no panel."""
        shape = self._first.attention.shape
        empty = np.full(shape, np.nan, dtype=np.float32)
        return np.stack([[empty if p is None else p.attention for p in row] for row in self.panels]).astype(np.float32)

    @property
    def image(self) -> np.ndarray:
        """uint8 [H, W, 3]: the picture as the network of the first panel sees it."""
        return self._first.seen

    @property
    def query(self) -> Patch | None:
        """The patch that looks, where it is the same in all panels."""
        found = {panel.query for row in self.panels for panel in row if panel}
        return found.pop() if len(found) == 1 else None

    @property
    def _first(self) -> Panel:
        return next(panel for row in self.panels for panel in row if panel)

    def drawing(self) -> dict[str, Any]:
        """The arguments of figures.attention_maps.draw, but for the colour scale."""
        return {
            "image": self.image,
            "maps": self.maps,
            "row_labels": self.row_labels,
            "column_labels": self.column_labels,
            "query": [[panel and panel.query for panel in row] for row in self.panels],
            "seen": [[panel and panel.seen for panel in row] for row in self.panels],
            "title": self.title,
        }

    def save(self, path: Path, scale: str = "shared") -> Path:
        """The raw arrays as .npz, and what they are: labels, title, query and the colour scale of the picture.

        query: [2], or empty where it is no patch or not one for all; queries: [rows, columns, 2], -1 where there is none.
        """
        arrays: dict[str, Any] = {
            "image": self.image,
            "maps": self.maps,
            "rows": self.row_labels,
            "columns": self.column_labels,
        }
        arrays |= {"title": self.title, "scale": scale, "query": [] if self.query is None else self.query}
        arrays["queries"] = [[(panel and panel.query) or (-1, -1) for panel in row] for row in self.panels]

        def write(part: Path) -> None:
            with open(part, "wb") as file:
                np.savez_compressed(file, **arrays)

        atomically(path, write)
        return path


def heat_maps(
    subjects: list[Subject], image: Image.Image, layer: str = "all", head: str = "mean", query: str = "mean",
    rollout: bool = False, difference: bool = False, columns: str | None = None, device: str = "cpu",
) -> HeatMaps:  # fmt: skip
    """Attention of each subject over `image`.

    layer: all, or numbers like 0,2; head: mean, all, or numbers; query: mean (over all patches), cls (class or task token,
    the newest), ROW,COLUMN in patches, or pixel:ROW,COLUMN of `image`. rollout: attention as it adds up from the first
    layer on, heads averaged, half of it residual (Abnar & Zuidema 2020). difference: of two subjects, the second minus
    the first. columns: run, task, layer or head; without it tasks if there are several, else runs, heads, layers; rows are
    the rest. Raises Typed for a layer, head or query that is not there, and ValueError for what does not go into one picture.
    """
    layers, heads, asked = parse_layers(layer), parse_heads(head), parse_query(query)
    if rollout and head != "mean":
        raise Typed(f"head={head!r} does not go with rollout, which averages heads")
    if difference:
        _check_pair(subjects, head)
    panels: Panels = {}
    grid, left_out, patches = None, [], {}
    for subject in subjects:
        resolved = patch_under(asked, subject, image, device) if isinstance(asked, Pixel) else asked
        patch = patches[subject.run] = resolved if isinstance(resolved, tuple) else None
        items = chosen(attention_of(subject, image, resolved, rollout, device), layers, query, subject.run)
        grid = grid or items[0].layer.grid
        seen = np.asarray(subject.crop(image.convert("RGB")))
        for item in items:
            if item.layer.grid != grid:
                sentence = f"layer {item.layer.index} of {subject.run} has a grid of {item.layer.grid}, others {grid}"
                if layers is not None or item is items[0]:
                    raise ValueError(f"{sentence}; draw them one by one")
                left_out.append(f"left out: {sentence}")
                continue
            _add(panels, subject, item, heads, seen, patch)
    if difference:
        panels = _difference(panels)
    title = (["rollout"] if rollout else []) + [f"query: {_words(asked, set(patches.values()))}"]
    return _arrange(panels, columns, patches, title, left_out)


def _check_pair(subjects: list[Subject], head: str) -> None:
    """Raises Typed for what is no pair to subtract."""
    if len(subjects) != 2:
        raise Typed(f"a difference is of two checkpoints, and there are {len(subjects)}: like RUN_DIR:0 and RUN_DIR:4")
    first, second = (subject.run for subject in subjects)
    if head != "mean" and first != second:
        raise Typed(f"head={head!r}: heads of {first} and {second} do not pair; their mean does")


def attention_of(
    subject: Subject, image: Image.Image, query: Query, rollout: bool = False, device: str = "cpu"
) -> list[Recorded]:
    """Each layer's attention from the query: {map: [1, H, g_h, g_w]} on the CPU, or nothing where it has no such query.

    Raises ValueError that names the subject where its layers cannot be seen.
    """
    model, x = subject.model.to(device), subject.preprocess(image)[None].to(device)
    try:
        measure = rows_of if rollout else measure_of(query)
        found = record(model, x, measure, subject.grid, subject.num_prefix_tokens)
    except Typed:
        raise
    except ValueError as error:
        raise ValueError(f"{subject.run}: {error}") from None
    return rolled_out(found, query, subject.run) if rollout else found


def chosen(found: list[Recorded], layers: list[int] | None, query: str, run: str) -> list[Recorded]:
    """The layers that were asked for, or with None all that have such a query. Raises Typed where there is none of them."""
    there = [item.layer.index for item in found]
    missing = [number for number in layers or [] if number not in there]
    if missing:
        raise Typed(f"no layer {missing[0]} in {run}; there: {', '.join(map(str, there))}")
    usable = [item for item in found if item.values]
    if not usable:
        raise Typed(no_query(query, found))
    if layers is None:
        return usable
    for number in layers:
        if not found[number].values:
            others = ", ".join(str(item.layer.index) for item in usable)
            raise Typed(no_query(query, [found[number]]) + f"; layers with it: {others}")
    return [found[number] for number in layers]


def _add(
    panels: Panels, subject: Subject, item: Recorded, heads: list[int] | str, seen: np.ndarray, patch: Patch | None
) -> None:
    """The panels of one layer. Raises ValueError for attention that is not finite, and for two panels of one name."""
    maps = item.values["map"][0].numpy()  # [H, g_h, g_w]
    if not np.isfinite(maps).all():
        name = f"layer {item.layer.index} ({item.layer.name}) of {subject.run}"
        raise ValueError(f"{name} gives attention that is not finite")
    task = None if subject.training == "model" else subject.task
    for name, attention in _heads(maps, heads, subject.run).items():
        key = subject.run, task, item.layer.index, name
        if key in panels:
            raise ValueError(f"two checkpoints are called {subject.run}, task {subject.task}; draw them one by one")
        panels[key] = Panel(attention, seen, patch)


def _difference(panels: Panels) -> Panels:
    """Second checkpoint minus first, for the layers and heads that both have."""
    first, second = dict.fromkeys(key[:2] for key in panels)
    common = [key[2:] for key in panels if key[:2] == first and second + key[2:] in panels]
    if not common:
        raise ValueError("the two checkpoints have no layer and head in common")
    names = [run if task is None else f"{run}:{'init' if task == INITIAL else task}" for run, task in (first, second)]
    run, found = f"{names[1]} minus {names[0]}", {}
    for place in common:
        a, b = panels[first + place], panels[second + place]
        if a.query != b.query:
            raise Typed(
                f"the pixel is in patch {a.query} of {names[0]} and in {b.query} of {names[1]}: no difference of them"
            )
        found[run, None, place[0], place[1]] = Panel(b.attention - a.attention, a.seen, a.query)
    return found


def _words(asked: str | Patch | Pixel, patches: set[Patch | None]) -> str:
    """The query in words: a pixel by its patch, where that is the same for all networks."""
    (patch,) = patches if len(patches) == 1 else (None,)
    named = {"mean": "mean over all patches", "cls": "class or task token"}
    return _patch_words(patch) if patch else named.get(str(asked), str(asked))


def _patch_words(patch: Patch) -> str:
    return f"patch {patch[0]},{patch[1]}"


def parse_checkpoint(spec: str) -> list[Callable[[], Subject]]:
    """RUN_DIR, RUN_DIR:task or RUN_DIR:all -> what to draw, loaded when called. Without a task: the last one.

    Raises Typed for a task that is not there.
    """
    path, which = split_checkpoint(spec)
    directory = checkpoint.open_run(path)
    directory.require()
    named = {"all": directory.tasks, "init": [INITIAL], "": directory.tasks[-1:]}
    tasks = named.get(which or "") or [int(which or 0)]
    typed(directory.require, [task for task in tasks if task != INITIAL])
    return [functools.partial(from_run, directory, task) for task in tasks]


def patch_under(pixel: Pixel, subject: Subject, image: Image.Image, device: str = "cpu") -> Patch:
    """The patch that shows a pixel of the picture: two ramps go through the crop that the network's input goes through.

    Raises Typed for a pixel outside the picture or the crop.
    """
    height, width = image.height, image.width
    if pixel.row >= height or pixel.column >= width:
        raise Typed(f"{pixel} is outside the picture of {height} rows and {width} columns")
    ramps = np.zeros((height, width, 3), dtype=np.uint8)
    ramps[..., 0], ramps[..., 1] = np.linspace(0, 255, height).round()[:, None], np.linspace(0, 255, width).round()
    seen = np.asarray(subject.crop(Image.fromarray(ramps))).astype(float)
    places = zip((pixel.row, pixel.column), (height, width), strict=True)
    wanted = [255 * place / max(side - 1, 1) for place, side in places]
    away = np.maximum(*(np.abs(seen[..., i] - value) for i, value in enumerate(wanted)))
    y, x = np.unravel_index(away.argmin(), away.shape)
    step = max(np.abs(np.diff(seen[..., 0], axis=0)).max(), np.abs(np.diff(seen[..., 1], axis=1)).max())
    if away.min() > 1 + step:
        raise Typed(f"{pixel} is cropped away before {subject.run} sees it; choose one nearer the centre")
    grid = _grid_of(subject, device)
    return int(y * grid[0] // away.shape[0]), int(x * grid[1] // away.shape[1])


def _grid_of(subject: Subject, device: str) -> Patch:
    """The grid of the subject's first layer between patches. Raises ValueError where no layer is."""
    size = subject.crop(Image.new("RGB", (64, 64)))
    x = torch.zeros(1, 3, size.height, size.width, device=device)
    model = subject.model.to(device)
    found = record(model, x, lambda attention, layer: {}, subject.grid, subject.num_prefix_tokens)
    for item in found:
        if item.layer.status == "ok" and item.layer.between_patches:
            rows, columns = item.layer.grid
            return rows, columns
    raise ValueError(f"no layer of {subject.run} has attention between patches, so no patch shows a pixel")


def _heads(maps: np.ndarray, heads: list[int] | str, run: str) -> dict[str, np.ndarray]:
    """[H, g_h, g_w] -> the chosen heads by label. Raises Typed for a head that is not there."""
    if heads == "mean":
        return {"mean": maps.mean(0)}
    numbers = list(range(len(maps)) if isinstance(heads, str) else heads)
    if max(numbers) >= len(maps):
        raise Typed(f"no head {','.join(map(str, heads))} in {run}; there: 0 to {len(maps) - 1}, mean, all")
    return {str(h): maps[h] for h in numbers}


def _arrange(
    panels: Panels, columns_are: str | None, patches: dict[str, Patch | None], title: list[str], left_out: list[str]
) -> HeatMaps:
    """Panels in rows and columns, with their labels; the title begins with what all panels share. Columns are what
    `columns_are` says, or tasks if there are several, else runs, heads, layers. Where runs have several `patches`, each
    run's label names its own."""
    names = ("", "task", "layer", "head")
    values = [list(dict.fromkeys(key[axis] for key in panels)) for axis in range(4)]
    several = [axis for axis in (1, 0, 3, 2) if len(values[axis]) > 1]  # columns: the first of these that varies
    across = AXES.index(columns_are) if columns_are else several[0] if several else 0
    rest = [axis for axis in range(4) if axis != across]

    def label(axis: int, value: object) -> str:
        if axis == 0 and len(set(patches.values())) > 1 and (patch := patches.get(str(value))):
            return f"{value}, {_patch_words(patch)}"
        value = "init" if axis == 1 and value == INITIAL else value
        return "" if value is None else f"{names[axis]} {value}".strip()

    def join(row: tuple, varying: bool) -> str:
        axes = zip(rest, row, strict=True)
        return ", ".join(filter(None, (label(a, v) for a, v in axes if (len(values[a]) > 1) == varying)))

    columns = sorted(values[across]) if across in (1, 2) else values[across]
    rows = list(dict.fromkeys(tuple(key[axis] for axis in rest) for key in panels))
    by_place = {(tuple(key[axis] for axis in rest), key[across]): panel for key, panel in panels.items()}
    return HeatMaps(
        [[by_place.get((row, column)) for column in columns] for row in rows],
        [join(row, True) for row in rows],
        [label(across, column) for column in columns],
        ", ".join(filter(None, [join(rows[0], False), *title])),
        left_out,
    )
