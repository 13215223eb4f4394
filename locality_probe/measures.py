"""Measures of attention maps: tensors in, tensors out; no model, file or device in them.

A grid is (rows, columns) of patches in row-major order, or (N,) for a sequence; distances are in patches or positions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MEASURES = ("d_loc", "rms_distance", "prefix_mass", "entropy", "self_mass", "centroid_shift")


@functools.lru_cache(maxsize=32)
def positions(grid: tuple[int, ...]) -> Tensor:
    """Where the patches of a grid are: [N, 2] as (x, y), or [N, 1] for a sequence; float64."""
    axes = torch.meshgrid(*(torch.arange(side).double() for side in grid), indexing="ij")
    return torch.stack(axes[::-1], dim=-1).flatten(0, -2)


@functools.lru_cache(maxsize=32)
def distances(grid: tuple[int, ...]) -> Tensor:
    """||p_j - p_i|| between the patches of a grid: [N, N] in float64, unit patches, row-major order."""
    p = positions(grid)
    return (p[:, None] - p[None]).square().sum(-1).sqrt()


@functools.lru_cache(maxsize=128)
def uniform_nonlocality(grid: tuple[int, ...], causal: bool = False) -> float:
    """D_loc of uniform attention: the mean distance of two patches drawn from the whole grid; causal: j at most i."""
    if not causal:
        return distances(tuple(grid)).mean().item()
    n = math.prod(grid)
    return (distances(tuple(grid)).tril().sum(1) / torch.arange(1, n + 1)).mean().item()


@dataclass(frozen=True)
class Geometry:
    """Where the tokens of an attention map are: `num_prefix_tokens` that have no place, then the patches of `grid`."""

    grid: tuple[int, ...]
    num_prefix_tokens: int = 0

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.num_prefix_tokens + self.patches


@functools.lru_cache(maxsize=16)  # of one grid, layer after layer; all queries at once would need N^2 memory
def _weights(
    geometry: Geometry, first: int, last: int, squares: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Of the queries first..last: [last - first, 2 or 3, tokens] with 1, ||p_j - p_i|| and its square; 0 for prefix keys.

    Keys go last, as they do in attention: a product over them is then 1.5 to 7 times as fast (benchmarks/probe.py).
    """
    p = positions(geometry.grid).to(device, dtype)
    places = torch.arange(first, last, device=device) - geometry.num_prefix_tokens
    square = sum((axis - axis[places.clamp_min(0), None]).square() for axis in p.T) * (places >= 0)[:, None]
    weights = p.new_zeros(last - first, 2 + squares, geometry.tokens)
    patches = weights[:, :, geometry.num_prefix_tokens :]
    patches[:, 0] = 1
    patches[:, 1] = square.sqrt()
    if squares:
        patches[:, 2] = square
    return weights


class Sums:
    """What each measure needs of each row of attention maps [B, H, Q, K], added block by block: nothing else is kept.

    A row is summed in the precision it comes in, rows are added in float64: near float64, at the price of float32.
    """

    # The sums of a row: over patches of A, A ||p_j - p_i||, A ||p_j - p_i||^2, A log A; A_ii; A on prefix tokens; then A p_j.
    MASS, DISTANCE, SQUARE, ENTROPY, SELF, PREFIX, PLACE = range(7)

    def __init__(self, geometry: Geometry, shape: tuple[int, ...], like: Tensor, wanted: tuple[str, ...] = MEASURES):
        self.geometry, self.wanted = geometry, check_measures(wanted)
        p = positions(geometry.grid)
        self.places = torch.nn.functional.pad(p - p.mean(0), (0, 0, geometry.num_prefix_tokens, 0)).to(
            like
        )  # [tokens, 2]
        self.rows = like.new_zeros(*shape, geometry.tokens, self.PLACE + len(geometry.grid))
        self.scratch: Tensor | None = None

    def add(self, attention: Tensor, images: slice, heads: slice, first: int) -> None:
        """attention [b, h, q, K], contiguous: of these images and heads, for the queries `first`, first + 1, ..."""
        b, h, q, keys = attention.shape
        prefix, squares = self.geometry.num_prefix_tokens, "rms_distance" in self.wanted
        rows = self.rows[images, heads, first : first + q]
        weights = _weights(self.geometry, first, first + q, squares, attention.dtype, attention.device)
        # Not einsum over [b, h, q, K]: a batch of products, one a query, that reads each row once.
        sums = torch.bmm(weights, attention.view(b * h, q, keys).permute(1, 2, 0))  # [q, 3, K] @ [q, K, b * h]
        rows[..., : 2 + squares] = sums.permute(2, 0, 1).view(b, h, q, -1)
        if "centroid_shift" in self.wanted:
            rows[..., self.PLACE :] = (attention.view(-1, keys) @ self.places).view(b, h, q, -1)
        if "prefix_mass" in self.wanted and prefix:
            rows[..., self.PREFIX] = attention[..., :prefix].sum(-1)
        if "self_mass" in self.wanted:
            rows[..., self.SELF] = attention.diagonal(first, 2, 3)
        if "entropy" in self.wanted:
            rows[..., self.ENTROPY] = self._a_log_a(attention[..., prefix:])

    def _a_log_a(self, patches: Tensor) -> Tensor:
        """sum_j A_ij log A_ij: [b, h, q, N] -> [b, h, q]"""
        if self.scratch is None or self.scratch.numel() < patches.numel():
            self.scratch = patches.new_empty(patches.numel())
        logs = self.scratch[: patches.numel()].view(patches.shape)
        # 0 log 0 = 0. The logarithm is vectorised, which torch.special.entr is not (ten times as long).
        torch.log(patches, out=logs).clamp_(min=-1e4).mul_(patches)
        return logs.sum(-1)

    def values(self) -> dict[str, Tensor]:
        """Each wanted measure [B, H] in float64: NaN where no patch attends to a patch."""
        rows = self.rows[:, :, self.geometry.num_prefix_tokens :].double()  # queries that are patches
        mass = rows[..., self.MASS]
        empty = mass == 0
        share, count = mass.masked_fill(empty, 1.0), (~empty).sum(-1)
        p = positions(self.geometry.grid).to(rows.device)

        def mean(per_query: Tensor) -> Tensor:
            return per_query.masked_fill(empty, 0.0).sum(-1) / count

        measures = {
            "d_loc": lambda: mean(rows[..., self.DISTANCE] / share),
            "rms_distance": lambda: mean(rows[..., self.SQUARE] / share).sqrt(),
            "prefix_mass": lambda: rows[..., self.PREFIX].mean(-1),
            "entropy": lambda: mean(share.log() - rows[..., self.ENTROPY] / share) / math.log(len(p)),
            "self_mass": lambda: mean(rows[..., self.SELF] / share),
            "centroid_shift": lambda: mean((rows[..., self.PLACE :] / share[..., None] - (p - p.mean(0))).norm(dim=-1)),
        }
        return {name: measures[name]() for name in self.wanted}


def check_measures(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError that names an unknown measure."""
    unknown = [name for name in wanted if name not in MEASURES]
    if unknown:
        raise ValueError(f"no measure {unknown[0]!r}; there: {', '.join(MEASURES)}")
    return tuple(wanted)


def measure_attention(
    attention: Tensor, grid: tuple[int, ...], num_prefix_tokens: int = 0, wanted: tuple[str, ...] = MEASURES
) -> dict[str, Tensor]:
    """The measures of each image and head, over patch-to-patch attention: each [B, H], float64.

    Prefix rows and columns are dropped and each row is renormalised to 1, per image: A' below. A patch whose attention is
    all on prefix tokens attends to no distance; it is left out of the means.

    - d_loc: 1/N sum_ij A'_ij ||p_j - p_i||, patches (nonlocality: arXiv 2304.06971, eq. 1)
    - rms_distance: sqrt(1/N sum_ij A'_ij ||p_j - p_i||^2), patches; never below d_loc
    - prefix_mass: mean attention of patches on prefix tokens, 0 to 1
    - entropy: mean over patches of -sum_j A'_ij log A'_ij, over log N: 0 one key, 1 uniform
    - self_mass: mean of A'_ii, 0 to 1
    - centroid_shift: mean of ||sum_j A'_ij p_j - p_i||, patches; never above d_loc

    attention: [B, H, prefix + N, prefix + N], rows sum to 1, N = product of `grid`, in row-major order.
    Raises ValueError when the shape does not fit the grid, and for an unknown measure.
    """
    geometry = Geometry(tuple(grid), num_prefix_tokens)
    if attention.ndim != 4 or attention.shape[-2:] != (geometry.tokens, geometry.tokens):
        raise ValueError(
            f"attention {tuple(attention.shape)} is not [B, H, T, T] with T = {num_prefix_tokens} prefix tokens + "
            f"{' x '.join(map(str, grid))} patches"
        )
    sums = Sums(geometry, tuple(attention.shape[:2]), attention, wanted)
    sums.add(attention.contiguous(), slice(None), slice(None), 0)
    return sums.values()


def nonlocality(attention: Tensor, grid: tuple[int, ...], num_prefix_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """d_loc and prefix_mass of `measure_attention`: two of [B, H], float64."""
    values = measure_attention(attention, grid, num_prefix_tokens, ("d_loc", "prefix_mass"))
    return values["d_loc"], values["prefix_mass"]
