"""Measures of attention maps: tensors in, tensors out; no model, file or device in them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def distances(grid: tuple[int, int]) -> Tensor:
    """||p_j - p_i|| between the patches of a (rows, columns) grid: [N, N] in float64, unit patches, row-major order."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    p = torch.stack([x, y], dim=-1).flatten(0, 1).double()
    return (p[:, None] - p[None]).square().sum(-1).sqrt()


def uniform_nonlocality(grid: tuple[int, int]) -> float:
    """D_loc of uniform attention, in patches: the mean distance of two patches, each drawn from the whole grid."""
    return distances(tuple(grid)).mean().item()


def nonlocality(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """D_loc of each image and head, and the mass that patches give to prefix tokens: two of [B, H], float64.

    D_loc = 1/N sum_ij A_ij ||p_j - p_i|| in patches (arXiv 2304.06971, eq. 1), over patch-to-patch attention: prefix
    rows and columns are dropped and each row is renormalised to 1, per image. A patch whose attention is all on prefix
    tokens attends to no distance; it is left out of the mean.

    attention: [B, H, prefix + N, prefix + N], rows sum to 1, N = rows * columns of `grid` in row-major order.
    Raises ValueError when the shape does not fit the grid.
    """
    n = grid[0] * grid[1]
    if attention.ndim != 4 or attention.shape[-2:] != (num_prefix_tokens + n, num_prefix_tokens + n):
        raise ValueError(
            f"attention {tuple(attention.shape)} is not [B, H, T, T] with T = {num_prefix_tokens} prefix tokens + "
            f"{grid[0]} x {grid[1]} patches"
        )
    patches = attention[:, :, num_prefix_tokens:, num_prefix_tokens:]
    # A row is summed in the precision it comes in, rows are added in float64: near float64, at the price of float32.
    distance = distances(tuple(grid)).to(patches)
    attended = torch.einsum("bhqk,qk->bhq", patches, distance).double()
    mass = patches.sum(-1).double()
    empty = mass == 0
    per_query = torch.where(empty, 0.0, attended / mass.masked_fill(empty, 1.0))
    d_loc = per_query.sum(-1) / (~empty).sum(-1)
    prefix = attention[:, :, num_prefix_tokens:, :num_prefix_tokens].sum(-1).double().mean(-1)
    return d_loc, prefix
