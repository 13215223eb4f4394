"""Points that were observed with some error -> the regular places that they are at, or None: never the nearest guess."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

CLOSE = 0.25  # of the spacing: a point that is nearer to a place than this is at it, whatever the others are
USUAL = 0.12  # of the spacing: where points are this near on average, and one to one with places, each is at the nearest; for
# two neighbours to be taken for each other, both would have to be seen four times as far off, and in opposite directions
UNEVEN = 2.0  # the widest gap between neighbouring rows over the narrowest
SQUEEZED = 0.25  # of the usual gap: what the outermost rows may be pushed inwards to, where convolutions see the border
HALVES = 0.12  # of a patch: farther from a whole number of halves than this, it is not clear where a coarse row is
EXTENT = 0.25  # of the finer lattice: by more than this, and a row, two that cover the same image do not differ
SAME = 1e-4  # of the image's side: tokens that are seen nearer to each other than this are one, in two windows


@dataclass(frozen=True)
class Lattice:
    """rows, columns, ... that points lie in: where each is along its axis (increasing), in parts of the image's side."""

    axes: tuple[np.ndarray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    @property
    def spacing(self) -> np.ndarray:
        """The typical gap along each axis; that of a single row is the whole side."""
        return np.array([np.median(np.diff(axis)) if len(axis) > 1 else 1.0 for axis in self.axes])

    def cells(self, points: np.ndarray) -> np.ndarray | None:
        """The place [n, axes] of each point, counted from 0, or None where that is not clear."""
        found, away = np.empty(points.shape, dtype=int), np.empty(points.shape)
        for d, axis in enumerate(self.axes):
            distance = np.abs(points[:, d, None] - axis)
            found[:, d] = distance.argmin(1)
            gaps = np.diff(axis) if len(axis) > 1 else np.ones(1)
            local = np.minimum(np.append(gaps, np.inf), np.insert(gaps, 0, np.inf)) if len(axis) > 1 else gaps
            away[:, d] = distance.min(1) / local[found[:, d]]
        if away.max(initial=0.0) < CLOSE:
            return found
        one_to_one = len(_distinct(points)) == len(np.unique(found, axis=0))
        usual = np.sqrt(np.square(away).mean(0)).max()
        return found if usual < USUAL and away.max() < 4 * USUAL and one_to_one else None


def fit(points: np.ndarray) -> Lattice | None:
    """The one lattice whose every place is taken by some of the points [n, axes], each clearly at its place; else None."""
    distinct = _distinct(points)
    candidates = [tuple(axes) for axes in itertools.product(*(_rows(points[:, d]) for d in range(points.shape[1])))]
    candidates += [
        tuple(np.sort(distinct[:, d]).reshape(count, -1).mean(1) for d, count in enumerate(shape))
        for shape in _factors(len(distinct), points.shape[1])
    ]
    fitting: dict[tuple[int, ...], Lattice] = {}
    for axes in candidates:
        lattice = Lattice(axes)
        if lattice.shape in fitting or np.prod(lattice.shape) > len(distinct) or not all(_even(axis) for axis in axes):
            continue
        cells = lattice.cells(points)
        if cells is not None and len(np.unique(cells, axis=0)) == np.prod(lattice.shape):
            fitting[lattice.shape] = lattice
    most = max((np.prod(shape) for shape in fitting), default=0)
    best = [lattice for shape, lattice in fitting.items() if np.prod(shape) == most]
    return best[0] if len(best) == 1 else None


def _distinct(points: np.ndarray) -> np.ndarray:
    """Points without those that are seen at the same place as another."""
    _, first = np.unique(np.round(points / SAME), axis=0, return_index=True)
    return points[first]


def _factors(number: int, axes: int) -> list[tuple[int, ...]]:
    """All ways to write a number as a product of so many."""
    if axes == 1:
        return [(number,)]
    return [(n, *rest) for n in range(1, number + 1) if number % n == 0 for rest in _factors(number // n, axes - 1)]


def _even(axis: np.ndarray) -> bool:
    """Whether rows are evenly spaced, but for the outermost, and a single row is in the middle."""
    steps = np.diff(axis)
    if len(steps) == 0:
        return True
    inside = steps[1:-1] if len(steps) > 2 else steps
    return bool(
        steps.min() > 0 and inside.max() < UNEVEN * inside.min() and steps.max() < UNEVEN * inside.max()
        and steps.min() > SQUEEZED * inside.min()
    )  # fmt: skip


def _rows(values: np.ndarray) -> list[np.ndarray]:
    """Ways to part numbers into rows with gaps between them, each as the rows' means."""
    ordered = np.sort(values)
    gaps = np.diff(ordered)
    widest = np.sort(gaps)[::-1]
    found = [np.array([values.mean()])] if np.ptp(values) < CLOSE else []
    for count in range(2, len(values) + 1):
        inner = widest[count - 1] if count - 1 < len(widest) else 0.0
        if widest[count - 2] <= 2 * inner or widest[count - 2] <= 1e-9:
            continue
        rows = np.split(ordered, np.flatnonzero(gaps > (widest[count - 2] + inner) / 2) + 1)
        found.append(np.array([row.mean() for row in rows]))
    return found


def of_grid(grid: tuple[int, ...]) -> Lattice:
    """The lattice of a grid of patches that cover the image."""
    return Lattice(tuple((np.arange(side) + 0.5) / side for side in grid))


def beside(fine: Lattice, coarse: Lattice) -> np.ndarray | None:
    """Where the rows of a coarse lattice are in units of a fine one: [axes] of (first place, step), or None if not regular.

    Pooling and strided convolutions put a token at a whole number of halves of a patch: a stride of s with a kernel of k
    and p of padding puts token i at s i + (k - 1) / 2 - p.
    """
    found = []
    for d, (a, b) in enumerate(zip(fine.axes, coarse.axes, strict=True)):
        unit = fine.spacing[d]
        step = coarse.spacing[d] / unit if len(b) > 1 else float(len(a))
        whole = max(round(step), 1)
        if len(b) > 1 and abs(step - whole) > 0.1 * whole:
            return None
        if abs(whole * len(b) - len(a)) > max(whole, EXTENT * len(a)):
            return None
        origin = np.median(a / unit - np.arange(len(a)))  # of most rows: zero padding pushes the outer ones inwards
        first = np.median(b / unit - origin - whole * np.arange(len(b)))
        half = round(2 * first) / 2
        if abs(first - half) > HALVES:
            return None
        found.append((half, float(whole)))
    return np.array(found)
