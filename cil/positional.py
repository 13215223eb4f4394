"""Attention over patches with positional scores w.r_ij, fused and written out; local starts of w.

Patch tokens i, j lie on grid = (g_h, g_w) in row-major order; r_ij = (dx, dy, dx^2 + dy^2), (dx, dy) = p_j - p_i, dx along
columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor | None = None, grid: tuple[int, int] = (0, 0)) -> Tensor:
    """softmax_j(q_i.k_j + w.r_ij) v_j -> [B, H, N, d]: q, k, v [B, H, N, d], scales already in q; w = pos_weight [H, 3].

    grid: rows and columns of the N patches, for pos_weight.
    """
    return (written_out if writes_out(q) else fused)(q, k, v, pos_weight, grid)


def writes_out(q: Tensor) -> bool:
    """Which formulation is the faster one: the only place that chooses (benchmarks/layers.py).

    Fused, but not in half precision on a CPU. Fused / written out, whole layers of 384, 144 or 96 channels, one thread of
    an AVX-512 CPU without AMX: 0.8 to 1.15 in float32; in bf16 1.2 to 1.8, and 1.6 to 6 with the backward pass.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == "cpu" and half and q.shape[-2] <= 1024  # beyond, [B, H, N, N] costs too much memory


def written_out(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Three operations in the dtype of q: softmax is float32 inside, and autocast would copy its input and output."""
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ k.mT
        if pos_weight is not None:
            scores += positional_bias(pos_weight, grid).to(q.dtype)
        return scores.softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Flash attention, O(N) memory: w.r_ij enters as further columns of q and k, never as a mask [H, N, N]."""
    if pos_weight is None:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
    with torch.autocast(q.device.type, enabled=False):
        q_columns, k_columns = positional_columns(pos_weight, grid, q.dtype)
        d, c = q.shape[-1], q_columns.shape[-1]
        pad = -(c + d) % 8  # GPU kernels ask for a multiple of 8; and flash kernels for a v as wide as q and k
        q = torch.cat([q, F.pad(q_columns, (0, pad)).expand(len(q), -1, -1, -1)], -1)
        k = torch.cat([k, F.pad(k_columns, (0, pad)).expand(*k.shape[:2], -1, -1)], -1)
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, c + pad)), scale=1.0)[..., :d]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, dim] -> [B, H, N, d]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, N, dim]"""
    return x.transpose(1, 2).flatten(2)


def wide(x: Tensor) -> Tensor:
    """Half precision -> float32"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positional_scores(weight: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """weight [H, 3] on (dx, dy, dx^2 + dy^2) -> its parts along rows [H, g_h, g_h] and along columns [H, g_w, g_w].

    w.r_ij is the sum of the two: a function of dy alone and one of dx alone. At least float32, also under autocast.
    """
    dy, dx = (
        torch.arange(g, device=weight.device)[None, :] - torch.arange(g, device=weight.device)[:, None] for g in grid
    )
    w_x, w_y, w_2 = wide(weight).T[:, :, None, None]
    return w_y * dy + w_2 * dy**2, w_x * dx + w_2 * dx**2


def positional_bias(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """w.r_ij [H, N, N], at least float32, less its maximum over j (softmax cancels it), and clamped.

    At 14 x 14 the local start reaches -300: denormals, at which a CPU crawls. e^-60 is nothing beside the maximum. And
    with the maximum at 0, half precision rounds least where it matters.
    """
    along_y, along_x = (s - s.amax(-1, keepdim=True).detach() for s in positional_scores(weight, grid))
    return (along_y[:, :, None, :, None] + along_x[:, None, :, None, :]).flatten(3).flatten(1, 2).clamp_min(-60)


def positional_columns(weight: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns to add to q [H, N, c] and k [N, c], whose dot product is w.r_ij but for terms of i, which softmax cancels.

    With w = (a, b, e) and p = (x, y): w.r_ij = (a - 2 e x_i) x_j + (b - 2 e y_i) y_j + e |p_j|^2 + terms of i. Coordinates
    are centred, to be small. Each value is split into 8 bits and the rest, without which half precision would be off by
    1 at 14 x 14 (8 bits are enough for x_j and y_j); float32 pays nothing for it, as 8 columns keep d a multiple of 8.
    """
    y, x = (torch.arange(g, device=weight.device, dtype=wide(weight).dtype) - (g - 1) / 2 for g in grid)
    y, x = y.repeat_interleave(len(x)), x.repeat(len(y))
    a, b, e = wide(weight).T[:, :, None]
    q = torch.stack([a - 2 * e * x, b - 2 * e * y, e.expand(-1, len(x))], -1)
    k = torch.stack([x, y, x**2 + y**2], -1)
    q_high, k_high = q.bfloat16(), k.bfloat16()
    q_low, k_low = q - q_high, k - k_high
    q_columns = [q_high, q_low, q_high[..., 2:], q_low[..., 2:]]
    k_columns = [k_high, k_high, k_low[..., 2:], k_low[..., 2:]]
    q_all, k_all = (torch.cat([t.to(dtype) for t in columns], -1) for columns in (q_columns, k_columns))
    return q_all, k_all


def positional_weights(num_heads: int, strength: float, extra_heads: str, start: str = "local") -> Tensor:
    """GPSA's w or LPA's v at the start, [H, 3]: `local_heads`, or with `random` a normal draw for every head.

    The random draw has mean 0 and, for each of the three coefficients, the root mean square that it has over the local heads:
    as large, and not local.
    """
    weight = local_heads(num_heads, strength, extra_heads)
    if start == "local":
        return weight
    k = int(num_heads**0.5)
    return torch.randn(num_heads, 3) * weight[: k * k].square().mean(0).sqrt()


def local_heads(num_heads: int, strength: float, extra_heads: str) -> Tensor:
    """Local initialisation [H, 3] of ConViT: each of the first K x K heads attends at one offset of a centred K x K grid.

    With strength 1, head i + K j attends around (x, y) = (j, i) - (K - 1) / 2, by softmax(-||delta - offset||^2).
    The remaining heads are random (as released) or uniform (all zero).
    """
    weight = torch.zeros(num_heads, 3)
    if extra_heads == "random":
        nn.init.trunc_normal_(weight, std=0.02)
    k = int(num_heads**0.5)
    offset = torch.arange(k) - (k - 1) / 2
    x, y = offset.repeat_interleave(k), offset.repeat(k)
    weight[: k * k] = torch.stack([2 * x, 2 * y, -torch.ones(k * k)], dim=1) * strength
    return weight
