"""Where the tokens of a layer are: declared, given, or observed; never what happens to fit.

What was observed is checked against what the model declares and what is given; where two of them differ, the layer is
refused and both are said.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from locality_probe.geometry import Geometry
from locality_probe.record import lattice
from locality_probe.record.experiment import Response, Seen, sum_of
from locality_probe.record.lattice import Lattice
from locality_probe.record.sighting import Sorting

IRREGULAR = "its tokens are at no regular places of the image"
CHANNELS = "each of its tokens is of the whole image, as where attention is between channels: there are no distances"
QUERIES = "its queries are at no regular places of the image"
SHIFT = 0.12  # of the spacing: heads that are farther from each other, on average over their tokens, are windows
APART = (
    0.35  # of the spacing: so far from its place a token of another window is on average, where a shift wraps it around
)
UNFIT = "its keys and its queries are at places that do not fit together"
BLURRED = (IRREGULAR, QUERIES, UNFIT)  # reasons that a sharper look may remove
HALF_SEEN = "some of its tokens are seen as keys and not as queries, or as queries and not as keys"
MOVES = "its tokens are at other places from pass to pass, or from image to image"
NO_IMAGE_TOKENS = (
    "none of its keys is a place of the image: give grid=(N,) for a sequence, "
    "or grid={'its module': (N,)} for one tower"
)


@dataclass(frozen=True)
class Placed:
    """Where a layer's tokens are, how that is known, and how its maps are sorted."""

    geometry: Geometry
    places: str
    windows: int
    heads: int
    heads_first: bool

    def sorting(self, images: int) -> Sorting:
        return Sorting(images, self.windows, self.heads, self.heads_first)


@dataclass(frozen=True)
class Declared:
    """What is declared by the model, or given by hand: (rows, columns), (N,) or (frames, rows, columns), and how many tokens
    have no place. None where it is not said."""

    grid: tuple[int, ...] | None = None
    num_prefix_tokens: int | None = None

    def says(self, keys: int) -> bool:
        """Whether it speaks of a layer of so many keys."""
        return self.grid is not None and keys == math.prod(self.grid) + (self.num_prefix_tokens or 0)

    def __str__(self) -> str:
        return f"{self.num_prefix_tokens or 0} tokens without a place + {' x '.join(map(str, self.grid or ()))}"


def declared_by(model: nn.Module, image: Tensor | None) -> Declared:
    """What a model says of itself, as timm's do: patch_embed and num_prefix_tokens."""
    prefix = getattr(model, "num_prefix_tokens", None)
    prefix = prefix if isinstance(prefix, int) else None
    embed: Any = getattr(model, "patch_embed", None)
    if image is None or image.ndim != 4 or embed is None:
        return Declared(None, prefix)
    size = tuple(image.shape[-2:])
    if hasattr(embed, "dynamic_feat_size"):  # timm's: knows of padding and of a CNN in front
        return Declared(tuple(embed.dynamic_feat_size(size)), prefix)
    patch = getattr(embed, "patch_size", None)
    if isinstance(patch, int):
        patch = (patch, patch)
    if not isinstance(patch, (tuple, list)) or len(patch) != 2:
        return Declared(None, prefix)
    return Declared(tuple(side // p for side, p in zip(size, patch, strict=True)), prefix)


def place_unseen(shape: tuple[int, int, int, int], images: int, said: Declared, how: str, why: str) -> Placed | str:
    """A layer whose tokens could not be observed: where they are by what is said, or the reason to skip it."""
    batch, heads, queries, keys = shape
    if said.grid is None:
        return f"{why}: give grid=(rows, columns) or (N,), and num_prefix_tokens"
    if not said.says(keys):
        return f"its {keys} keys are not {said} patches"
    if batch != images and (batch * heads) % images:
        return f"it attends within parts of an image: {batch} of {images} images"
    if batch != images and heads != 1:
        return f"it attends within parts of an image: {batch} of {images} images"
    if queries != keys and queries > max(1, said.num_prefix_tokens or 0):
        return f"its {queries} queries are neither its {keys} keys nor a token alone"
    geometry = Geometry.of_grid(said.grid, said.num_prefix_tokens or 0, queries)
    return Placed(geometry, how, 1, batch * heads // images, False)


def place(passes: list[Seen], given: Declared, declared: Declared, sides: tuple[int, ...]) -> Placed | str:
    """Where the tokens of a layer are by what they answered in several passes, or the reason to skip it.

    sides: of the input, in pixels, along the axes that noise grew along.
    """
    seen = passes[0]
    query, key = sum_of([p.query for p in passes]), sum_of([p.key for p in passes])
    keys = seen.shape[3]
    if not key.answered.any():
        said, how = (given, "given") if given.grid is not None else (declared, "declared")
        # Constant keys get equal attention wherever they are; of a text, a grid must be given.
        if said.says(keys) and (how == "given" or not seen.copies.any()):
            return place_unseen(seen.shape, seen.images, said, how, "")
        return NO_IMAGE_TOKENS
    if len(sides) > 2 and (given.grid is None or len(given.grid) != 3):
        return "its input has frames or tiles: give grid=(frames, rows, columns)"
    if bool((key.places[key.answered].std(0, correction=0) < 0.1).all()) and key.answered.sum() > 1:
        return CHANNELS  # a grid that covers the image spreads by a quarter of it at least
    reason = IRREGULAR
    for skipped in dict.fromkeys((0, given.num_prefix_tokens or declared.num_prefix_tokens or 0)):
        for windows, heads, heads_first in sortings(seen):
            pooled = key.pooled(windows, heads, heads_first)
            answered = pooled.answered
            answered[:, :skipped] = False
            copies = seen.copies.unflatten(0, (heads, windows))[0] if heads_first else seen.copies[::heads]
            found = _cells(pooled.places, answered, copies, (given, declared) if len(sides) == 2 else ())
            sorting = (windows, heads, heads_first)
            if found is None or not _agree(key, found, answered, sorting, SHIFT):
                continue
            if not all(_agree(p.key.pooled(*sorting), found, answered, (windows, 1, False)) for p in passes):
                reason = MOVES
                continue
            for part in zip(*(p.parts for p in passes), strict=True):
                alone = sum_of(part).pooled(*sorting)
                if alone.answered.any() and not _agree(alone, found, answered, (windows, 1, False)):
                    return "its keys and its values are of different tokens"
            queries = query.pooled(windows, heads, heads_first)
            asking = queries.answered
            asking[:, :skipped] = False
            if seen.shape[2] == keys and asking.any() and bool((asking != answered).any()):
                return HALF_SEEN
            placed = _geometry(found, answered, queries, skipped if seen.shape[2] == keys else 0, sides)
            if isinstance(placed, str):
                return placed
            geometry, whole = placed
            problem = _contradiction(given, "given", geometry, whole) or _contradiction(
                declared, "declared", geometry, whole
            )
            if problem:
                return problem
            if math.prod(geometry.grid) == 1:
                return "its grid is one patch: there are no distances"
            known = "given" if given.grid is not None else "observed"
            return Placed(geometry, known, windows, heads, heads_first)
    return MOVES if len(passes) > 1 and _moved(passes) else reason


def sortings(seen: Seen) -> list[tuple[int, int, bool]]:
    """Ways in which the maps of an image may be windows and heads: (windows, heads, heads first), the likely ones first."""
    total = len(seen.key.strength)
    heads = [seen.shape[1]] if seen.shape[1] > 1 and total % seen.shape[1] == 0 else []
    heads += [n for n in range(total, 0, -1) if total % n == 0]
    found = [(total // n, n, first) for n in heads for first in ((False,) if n in (1, total) else (False, True))]
    return list(dict.fromkeys(found))


def _cells(
    places: Tensor, answered: Tensor, copies: Tensor, said: tuple[Declared, ...]
) -> tuple[Lattice, np.ndarray] | None:
    """The lattice that the answering keys [W, K] are at, and the cell [W, K, axes] of each, -1 for the others; or None."""
    points = places[answered].numpy()
    fitted = lattice.fit(points)
    for one in said if fitted is None else ():  # tokens that were dropped leave places empty: the grid must be known
        if one.grid is not None and len(one.grid) == points.shape[1] and len(points) <= math.prod(one.grid):
            whole = lattice.of_grid(one.grid)
            fitted = whole if whole.cells(points) is not None else fitted
    found = None if fitted is None else fitted.cells(points)
    if fitted is None or found is None:
        return None
    cells = np.full((*answered.shape, points.shape[1]), -1)
    cells[answered.numpy()] = found
    for window, there, same in zip(cells, answered.numpy(), copies.numpy(), strict=True):
        originals = there & (same == np.arange(len(there)))
        if len(np.unique(window[originals], axis=0)) < originals.sum():
            return None  # two tokens at one place: one of them is of the whole image, or of a part that another has
    if len({window.tobytes() for window in cells}) < len(cells):
        return None  # two windows of the same tokens: they are heads of one
    return fitted, cells


def _agree(
    single: Response,
    found: tuple[Lattice, np.ndarray],
    answered: Tensor,
    sorting: tuple[int, int, bool],
    shift: float = 0.5,
) -> bool:
    """Whether each head by itself sees the tokens where all together do: not far APART on average along any axis, and all of
    them not shifted by more than `shift`, as windows would be that were taken for heads."""
    windows, heads, heads_first = sorting
    fitted, cells = found
    centres = np.stack([axis[cells[..., d]] for d, axis in enumerate(fitted.axes)], -1)  # [W, K, axes]
    shape = (heads, windows) if heads_first else (windows, heads)
    places, strong = single.places.unflatten(0, shape).numpy(), single.answered.unflatten(0, shape).numpy()
    if heads_first:
        places, strong = places.swapaxes(0, 1), strong.swapaxes(0, 1)  # [W, H, K, axes]
    away = (places - centres[:, None]) / fitted.spacing
    use = strong & answered.numpy()[:, None]
    for window, head in itertools.product(range(windows), range(heads)):
        some = away[window, head][use[window, head]]
        if len(some) and (np.abs(some).mean(0).max() > APART or np.abs(some.mean(0)).max() > shift):
            return False
    return True


def _moved(passes: list[Seen]) -> bool:
    """Whether the tokens were at other places from one pass to the next, by far more than noise."""
    first, second = (sum_of([p.key]).places.nan_to_num(0.0) for p in passes[:2])
    both = passes[0].key.answered & passes[1].key.answered
    return bool(both.any()) and (first - second).abs()[both].mean().item() > 0.1


def _geometry(
    found: tuple[Lattice, np.ndarray], answered: Tensor, queries: Response, skipped: int, sides: tuple[int, ...]
) -> tuple[Geometry, tuple[int, ...]] | str:
    """Places of queries and keys in units of the finer of their lattices, and how many places that has along each axis."""
    keys, cells_k = found
    answered_q = queries.answered
    answered_q[:, :skipped] = False
    points = queries.places[answered_q].numpy()
    cells_q, asking = keys.cells(points), keys
    if cells_q is None:
        fitted = lattice.fit(points)
        cells_q = None if fitted is None else fitted.cells(points)
        if fitted is None or cells_q is None:
            return QUERIES
        asking = fitted
    if _shared(answered_q.numpy(), cells_q):
        return QUERIES  # each of them is of a large part of the image, as after a wide convolution
    fine, coarse = (keys, asking) if math.prod(keys.shape) > math.prod(asking.shape) else (asking, keys)
    at = {id(fine): lambda cells: cells.astype(float)}
    if fine is not coarse:
        steps = lattice.beside(fine, coarse)
        if steps is None:
            return UNFIT
        at[id(coarse)] = lambda cells: steps[:, 0] + steps[:, 1] * cells
    q = np.full((*answered_q.shape, points.shape[1]), math.nan)
    q[answered_q.numpy()] = at[id(asking)](cells_q)
    k = np.full(cells_k.shape, math.nan)
    k[answered.numpy()] = at[id(keys)](cells_k[answered.numpy()])
    axes = _axes(fine, points.shape[1])
    grid = whole = tuple(fine.shape[d] for d in axes)
    if len(cells_k) > 1:
        grid = tuple(max(len(np.unique(window[there][:, d])) for window, there in zip(cells_k, answered.numpy(), strict=True)
                         if there.any()) for d in axes)  # fmt: skip
    pixels = tuple(_pixels(fine.axes[d], sides[d]) for d in axes[-2:])
    known = all(p == p for p in pixels) and len(axes) > 1
    geometry = Geometry(torch.from_numpy(q)[..., axes], torch.from_numpy(k)[..., axes], grid, pixels if known else None,
                        tuple(sides[-2:]) if known else None)  # fmt: skip
    return geometry, whole


def _shared(there: np.ndarray, cells: np.ndarray) -> bool:
    """Whether two tokens of one window are at one place; there: [W, N], cells [n, axes] of those that are there."""
    windows = np.broadcast_to(np.arange(len(there))[:, None], there.shape)[there]
    return len(np.unique(np.column_stack([windows, cells]), axis=0)) < len(cells)


def _axes(fine: Lattice, count: int) -> list[int]:
    """The axes that places are along: rows and columns, and of a video, whose frames may come before channels, the frames."""
    if count == 2:
        return [0, 1]
    return [max(range(count - 2), key=lambda d: fine.shape[d]), count - 2, count - 1]


def _pixels(axis: np.ndarray, side: int) -> float:
    """Pixels between neighbouring places: of a grid that covers the side, or of whole-number strides that leave a rest of it,
    within 3 percent of what is seen; NaN where it is neither."""
    count = len(axis)
    if count == 1:
        return float(side)
    observed = (axis[-1] - axis[0]) / (count - 1) * side
    strides = [side / count, *(float(p) for p in range(1, side + 1) if side // p == count and side % p)]
    near = [p for p in strides if abs(p - observed) < 0.03 * observed]
    return near[0] if near and (near[0] == side / count or len(near) == 1) else math.nan


def _contradiction(said: Declared, who: str, geometry: Geometry, whole: tuple[int, ...]) -> str:
    """Both sides, where what is said of a layer's tokens is not what was observed. What a model declares is of the layers that
    have so many keys; what is given by hand is of all."""
    keys, unplaced = geometry.keys.shape[1], geometry.unplaced_keys
    if who == "declared" and (geometry.windows > 1 or not said.says(keys) or not geometry.placed_queries.any()):
        return ""
    observed = f"{unplaced} tokens without a place + {' x '.join(map(str, whole))} patches"
    if said.grid is not None and said.grid != whole:
        return f"{said} is {who}, but {observed} are observed: give the grid that is right, or none"
    prefix = said.num_prefix_tokens if who == "given" else said.num_prefix_tokens or 0
    if prefix is not None and prefix != unplaced and geometry.windows == 1:
        return f"{prefix} tokens without a place are {who}, but {observed} are observed: give the number that is right, or none"
    return ""
