"""Attention layers: content (MHSA), gated positional (GPSA), locality-preserved (LPA), and task attention.

Each says what it attends to: `attention_map(x) -> [B, H, Q, K]`, with `grid` and `num_prefix_tokens`; `forward` uses the
same scores. Patch tokens i, j lie on grid = (g_h, g_w) in row-major order; delta = p_j - p_i = (dx, dy), dx along columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.localized import LocalizedAttention, localize
from cil.positional import (
    attend,
    fused,
    local_heads,
    merge_heads,
    positional_bias,
    positional_columns,
    positional_scores,
    positional_weights,
    split_heads,
    wide,
    writes_out,
    written_out,
)  # fmt: skip

__all__ = [
    "ATTENTION", "GPSA", "LPA", "LocalizedAttention", "SelfAttention", "TaskAttention", "attend", "fused", "local_heads",
    "localize", "merge_heads", "positional_bias", "positional_columns", "positional_scores", "positional_weights",
    "split_heads", "wide", "writes_out", "written_out",
]  # fmt: skip


class SelfAttention(nn.Module):
    """MHSA between patches: A = softmax_j(q.k / sqrt d). Input and output [B, N, dim]."""

    num_prefix_tokens = 0

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], qkv_bias: bool = False):
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        self.scale = (dim // num_heads) ** -0.5
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, dim] -> two of [B, H, N, d]"""
        q, k = self.qk(x).chunk(2, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads)

    def attention_map(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, H, N, N]"""
        q, k = self.query_key(x)
        return wide(q @ k.mT * self.scale).softmax(-1)

    def attend(self, x: Tensor, v: Tensor) -> Tensor:
        """attention_map(x) @ v without the map: v [B, H, N, d] -> [B, H, N, d]"""
        q, k = self.query_key(x)
        return attend(q * self.scale, k, v)

    def forward(self, x: Tensor) -> Tensor:
        v = split_heads(self.v(x), self.num_heads)
        return self.proj(merge_heads(self.attend(x, v)))


class GPSA(SelfAttention):
    """ConViT's gated positional self-attention (arXiv 2103.10697, eq. 7), the baseline's and DyTox's block.

    A = (1 - s) softmax_j(q.k / sqrt d) + s softmax_j(w.r_ij + b), s = sigmoid(gate) a head, r_ij = (dx, dy, dx^2 + dy^2).
    """

    def __init__(
        self, dim, num_heads, grid, qkv_bias=False, locality_strength=1.0, extra_heads="random", positional_start="local",
        gate_init=1.0,
    ):  # fmt: skip
        super().__init__(dim, num_heads, grid, qkv_bias)
        weight = positional_weights(num_heads, locality_strength, extra_heads, positional_start)
        self.pos_weight = nn.Parameter(weight)  # [H, 3]
        self.pos_bias = nn.Parameter(torch.zeros(num_heads))  # softmax cancels it; released weights have it
        self.gate = nn.Parameter(torch.full((num_heads,), float(gate_init)))

    def positional_maps(self) -> tuple[Tensor, Tensor]:
        """The positional softmax, which is the outer product of one along rows [H, g_h, g_h] and one along columns."""
        along_y, along_x = positional_scores(self.pos_weight, self.grid)
        return along_y.softmax(-1), (along_x + self.pos_bias[:, None, None]).softmax(-1)

    def attention_map(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, H, N, N]"""
        along_y, along_x = self.positional_maps()
        positional = (along_y[:, :, None, :, None] * along_x[:, None, :, None, :]).flatten(3).flatten(1, 2)  # [H, N, N]
        s = self.gate.sigmoid()[:, None, None]
        return (1 - s) * super().attention_map(x) + s * positional

    def attend(self, x: Tensor, v: Tensor) -> Tensor:
        along_y, along_x = self.positional_maps()
        s = self.gate.sigmoid()[:, None, None]
        # Along columns, then rows: O(g^3) where the [N, N] map would cost O(g^4).
        g_h, g_w = self.grid
        by_column = along_x.to(v.dtype)[:, None] @ v.unflatten(2, (g_h, g_w))  # (B, H, N, d) -> (B, H, g_h, g_w, d)
        by_row = (s * along_y).to(v.dtype) @ by_column.flatten(3)  # (B, H, g_h, g_w * d)
        return torch.addcmul(by_row.view_as(v), super().attend(x, v), (1 - s).to(v.dtype))  # one pass, not three


class LPA(SelfAttention):
    """Locality-Preserved Attention (arXiv 2304.06971, eq. 3): A = softmax_j(lambda q.k / sqrt d + v.r_ij), one softmax."""

    def __init__(
        self, dim, num_heads, grid, qkv_bias=False, locality_strength=1.0, extra_heads="random",
        positional_start="local", lambda_init=0.02, lambda_init_mode="constant",
    ):  # fmt: skip
        super().__init__(dim, num_heads, grid, qkv_bias)
        weight = positional_weights(num_heads, locality_strength, extra_heads, positional_start)
        self.pos_weight = nn.Parameter(weight)  # [H, 3]
        self.content_scale = nn.Parameter(torch.full((num_heads,), float(lambda_init)))  # the paper's lambda
        if lambda_init_mode == "normal":  # as released: lambda_init is a standard deviation, and signs are random
            nn.init.trunc_normal_(self.content_scale, std=lambda_init)

    def scaled_query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """query_key with every scale in q: multiplied into the weight, which is smaller than q (4 to 12 % of a layer)."""
        scale = self.content_scale * self.scale
        factor = torch.stack([scale, torch.ones_like(scale)]).repeat_interleave(x.shape[-1] // self.num_heads)
        bias = None if self.qk.bias is None else self.qk.bias * factor
        q, k = F.linear(x, self.qk.weight * factor[:, None], bias).chunk(2, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads)

    def attention_map(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, H, N, N]"""
        q, k = self.scaled_query_key(x)
        return (q @ k.mT + positional_bias(self.pos_weight, self.grid)).softmax(-1)

    def attend(self, x: Tensor, v: Tensor) -> Tensor:
        return attend(*self.scaled_query_key(x), v, self.pos_weight, self.grid)


class TaskAttention(nn.Module):
    """The task-attention block's layer: each of T tokens attends to itself and to all patches, never to another token."""

    num_prefix_tokens = 1  # the token itself, as first key

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int]):
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        self.scale = (dim // num_heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def attention_map(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """[B, T, dim], [B, N, dim] -> [B, H, T, 1 + N]; a row is its own token, then the patches"""
        q, own, k = (
            split_heads(f(x), self.num_heads) for f, x in ((self.q, tokens), (self.k, tokens), (self.k, patches))
        )
        scores = torch.cat([(q * own).sum(-1, keepdim=True), q @ k.mT], dim=-1)
        return wide(scores * self.scale).softmax(-1)

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """-> [B, T, dim]"""
        a = self.attention_map(tokens, patches)
        own, v = (split_heads(self.v(x), self.num_heads) for x in (tokens, patches))
        a = a.to(v.dtype)
        return self.proj(merge_heads(a[..., :1] * own + a[..., 1:] @ v))


# A new attention is a line here: a function of the cil.run.Run and the grid.
ATTENTION = {
    "mhsa": lambda run, grid: SelfAttention(run.dim, run.num_heads, grid),
    "gpsa": lambda run, grid: GPSA(
        run.dim, run.num_heads, grid, locality_strength=run.locality_strength, extra_heads=run.extra_heads,
        positional_start=run.positional_start, gate_init=run.gate_init,
    ),
    "lpa": lambda run, grid: LPA(
        run.dim, run.num_heads, grid, locality_strength=run.locality_strength, extra_heads=run.extra_heads,
        positional_start=run.positional_start, lambda_init=run.lambda_init, lambda_init_mode=run.lambda_init_mode,
    ),
}  # fmt: skip
