"""Where tokens are: places of queries and keys in patches, windows, and the D_loc of uniform attention over them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@functools.lru_cache(maxsize=32)
def positions(grid: tuple[int, ...]) -> Tensor:
    """Where the patches of a grid are: [N, 2] as (x, y), or [N, 1] for a sequence; float64."""
    with everyday_tensors():
        axes = torch.meshgrid(*(torch.arange(side).double() for side in grid), indexing="ij")
        return torch.stack(axes[::-1], dim=-1).flatten(0, -2)


@functools.lru_cache(maxsize=32)
def distances(grid: tuple[int, ...]) -> Tensor:
    """||p_j - p_i|| between the patches of a grid: [N, N] in float64, unit patches, row-major order."""
    with everyday_tensors():
        p = positions(grid)
        return (p[:, None] - p[None]).square().sum(-1).sqrt()


@functools.lru_cache(maxsize=128)
def uniform_nonlocality(grid: tuple[int, ...], causal: bool = False) -> float:
    """D_loc of uniform attention: the mean distance of two patches drawn from the whole grid; causal: j at most i."""
    with everyday_tensors():
        if not causal:
            return distances(tuple(grid)).mean().item()
        n = math.prod(grid)
        return (distances(tuple(grid)).tril().sum(1) / torch.arange(1, n + 1)).mean().item()


class Geometry:
    """Where the queries and the keys of an attention map are, in patches.

    queries, keys: [W, Q, D] and [W, K, D] float64, one row per window (W = 1 where attention is over the whole image); NaN
    where a token has no place in the image: class, register and prompt tokens, padding. grid: (rows, columns), (N,) or
    (frames, rows, columns): how many places there are along each axis, in the whole image or in one window.
    patch_pixels: pixels of the input between neighbouring places, per axis, where that is known; image: its height and width.
    """

    def __init__(
        self, queries: Tensor, keys: Tensor, grid: tuple[int, ...], patch_pixels: tuple[float, ...] | None = None,
        image: tuple[int, ...] | None = None,
    ):  # fmt: skip
        self.queries, self.keys, self.grid = queries.double(), keys.double(), tuple(grid)
        self.patch_pixels, self.image = patch_pixels, image
        self._identity = (
            self.grid, patch_pixels, image, tuple(queries.shape), tuple(keys.shape),
            self.queries.numpy().tobytes(), self.keys.numpy().tobytes(),
        )  # fmt: skip

    @classmethod
    def of_grid(
        cls, grid: tuple[int, ...], num_prefix_tokens: int = 0, queries: int | None = None,
        patch_pixels: tuple[float, ...] | None = None, image: tuple[int, ...] | None = None,
    ) -> Geometry:  # fmt: skip
        """Tokens that have no place, then the patches of a grid in row-major order; queries: how many, where they are not
        the keys, and then none of them has a place."""
        grid = tuple(grid)
        with everyday_tensors():
            nowhere = torch.full((num_prefix_tokens, len(grid)), math.nan, dtype=torch.float64)
            keys = torch.cat([nowhere, positions(grid).flip(-1)])[None]
            places = (
                keys if queries in (None, keys.shape[1]) else torch.full((1, queries, len(grid)), math.nan).double()
            )
        return cls(places, keys, grid, patch_pixels, image)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Geometry) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        return (
            f"Geometry({self.grid}, {self.windows} windows, {self.queries.shape[1]} queries, {self.keys.shape[1]} keys)"
        )

    @property
    def windows(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def placed_queries(self) -> Tensor:
        """Which queries have a place: bool [W, Q]."""
        return ~self.queries.isnan().any(-1)

    @functools.cached_property
    def placed_keys(self) -> Tensor:
        """Which keys have a place: bool [W, K]."""
        return ~self.keys.isnan().any(-1)

    @functools.cached_property
    def classes(self) -> Tensor:
        """For each window the first one whose tokens lie alike, seen from one another: [W]. They share weights."""
        alike: dict[bytes, int] = {}
        first = []
        for window in range(self.windows):
            origin = (
                self.keys[window][self.placed_keys[window]].nan_to_num().amin(0)
                if self.placed_keys[window].any()
                else 0
            )
            places = torch.cat([self.queries[window] - origin, self.keys[window] - origin]).numpy().tobytes()
            first.append(alike.setdefault(places, window))
        return torch.tensor(first)

    @functools.cached_property
    def unplaced_keys(self) -> int:
        """How many keys of a window have no place, padding apart: the fewest of all windows."""
        return int((~self.placed_keys).sum(1).min())

    @functools.cached_property
    def same_places(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return torch.equal(self.queries.nan_to_num(-1.0), self.keys.nan_to_num(-1.0))

    @functools.cached_property
    def self_keys(self) -> Tensor | None:
        """For each query the key at its own place, -1 where there is none: [W, Q]; None where no query has one."""
        found = torch.full(self.queries.shape[:2], -1)
        for window in self.classes.unique().tolist():
            places = {tuple(p): n for n, p in reversed(list(enumerate(self.keys[window].tolist()))) if p == p}
            same = [places.get(tuple(p), -1) for p in self.queries[window].tolist()]
            found[self.classes == window] = torch.tensor(same)
        found[~self.placed_queries] = -1
        return found if (found >= 0).any() else None

    @functools.cached_property
    def key_order(self) -> Tensor | None:
        """Which key each place of the grid is, row by row: [product of grid]; None in windows, or where some place has none."""
        return self._order(self.keys)

    @functools.cached_property
    def query_order(self) -> Tensor | None:
        """The same of queries."""
        return self._order(self.queries)

    def _order(self, places: Tensor) -> Tensor | None:
        if self.windows > 1:
            return None
        found = {tuple(p): n for n, p in reversed(list(enumerate(places[0].tolist()))) if p == p}
        wanted = [tuple(p) for p in positions(self.grid).flip(-1).tolist()]
        return torch.tensor([found[p] for p in wanted]) if all(p in found for p in wanted) else None

    @functools.cached_property
    def is_row_major(self) -> bool:
        """Whether this is one window of tokens without a place, then the whole grid in row-major order, as in a plain ViT."""
        return (
            self
            == Geometry.of_grid(
                self.grid, self.keys.shape[1] - math.prod(self.grid), patch_pixels=self.patch_pixels, image=self.image
            )
            if self.windows == 1 and self.same_places and self.keys.shape[1] >= math.prod(self.grid)
            else False
        )

    def uniform(self, causal: bool = False) -> float:
        """D_loc of equal attention to every key that has a place, in patches: the mean over the queries that have one.

        causal: to the keys at most as far in the sequence as the query. In windows it is that of a whole window: the most
        common value, so that windows which the image's border cuts or a shift wraps do not count.
        """
        return self._uniform_causal if causal else self._uniform

    @functools.cached_property
    def _uniform_causal(self) -> float:
        return uniform_nonlocality(self.grid, True)

    @functools.cached_property
    def _uniform(self) -> float:
        if self.is_row_major:
            return uniform_nonlocality(self.grid)
        values: dict[int, float] = {}
        for window in self.classes.unique().tolist():
            queries, keys = (
                self.queries[window][self.placed_queries[window]],
                self.keys[window][self.placed_keys[window]],
            )
            if len(queries) and len(keys):
                parts = [
                    torch.cdist(some, keys, compute_mode="donot_use_mm_for_euclid_dist").mean(1)
                    for some in queries.split(512)
                ]
                values[window] = round(torch.cat(parts).mean().item(), 12)
        whole = [
            w
            for w in self.classes.tolist()
            if w in values and self.placed_keys[w].sum() == self.placed_keys.sum(1).max()
        ]
        counts = [values[w] for w in whole]
        return max(set(counts), key=lambda value: (counts.count(value), -value)) if counts else math.nan


@contextlib.contextmanager
def everyday_tensors() -> Iterator[None]:
    """Plain tensors on the CPU, whatever device, fake or inference mode is on around: what is cached outlives it."""
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        yield
