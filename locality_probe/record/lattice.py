"""Points that were observed with some error -> the regular places that they are at, or None: never the nearest guess."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

CLOSE = 0.25  # of the spacing: farther from its place than this, a point is at none
UNEVEN = 2.0  # the widest gap between neighbouring rows over the narrowest
SQUEEZED = 0.25  # of the usual gap: what the outermost rows may be pushed inwards to, where convolutions see the border
HALVES = 0.12  # of a patch: farther from a whole number of halves than this, it is not clear where a coarse row is


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
        """The place [n, axes] of each point, counted from 0, or None where one lies between places."""
        found = np.empty(points.shape, dtype=int)
        for d, axis in enumerate(self.axes):
            away = np.abs(points[:, d, None] - axis)
            found[:, d] = away.argmin(1)
            if (away.min(1) > CLOSE * self._narrowest(d)).any():
                return None
        return found

    def _narrowest(self, d: int) -> float:
        return float(np.diff(self.axes[d]).min()) if len(self.axes[d]) > 1 else 1.0


def fit(points: np.ndarray) -> Lattice | None:
    """The one lattice whose every place is taken by some of the points [n, axes], each close to its place; else None."""
    candidates = [_rows(points[:, d]) for d in range(points.shape[1])]
    fitting = []
    for axes in itertools.product(*candidates):
        lattice = Lattice(tuple(axes))
        if np.prod(lattice.shape) > len(points):
            continue
        cells = lattice.cells(points)
        if cells is not None and len(np.unique(cells, axis=0)) == np.prod(lattice.shape):
            fitting.append(lattice)
    if not fitting:
        return None
    most = max(np.prod(lattice.shape) for lattice in fitting)
    best = [lattice for lattice in fitting if np.prod(lattice.shape) == most]
    return best[0] if len(best) == 1 else None


def _rows(values: np.ndarray) -> list[np.ndarray]:
    """Ways to part numbers into evenly spaced rows with gaps between them, each as the rows' means."""
    ordered = np.sort(values)
    gaps = np.diff(ordered)
    widest = np.sort(gaps)[::-1]
    found = [np.array([values.mean()])] if np.ptp(values) < CLOSE else []
    for count in range(2, len(values) + 1):
        inner = widest[count - 1] if count - 1 < len(widest) else 0.0
        if widest[count - 2] <= 2 * inner or widest[count - 2] <= 1e-9:
            continue
        rows = np.split(ordered, np.flatnonzero(gaps > (widest[count - 2] + inner) / 2) + 1)
        means, spread = np.array([row.mean() for row in rows]), max(np.ptp(row) for row in rows)
        steps = np.diff(means)
        inside = steps[1:-1] if len(steps) > 2 else steps
        even = inside.max() < UNEVEN * inside.min() and steps.max() < UNEVEN * inside.max()
        if spread < 2 * CLOSE * steps.min() and even and steps.min() > SQUEEZED * inside.min():
            found.append(means)
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
        origin = np.median(a / unit - np.arange(len(a)))  # of most rows: zero padding pushes the outer ones inwards
        first = np.median(b / unit - origin - whole * np.arange(len(b)))
        half = round(2 * first) / 2
        if abs(first - half) > HALVES:
            return None
        found.append((half, float(whole)))
    return np.array(found)
