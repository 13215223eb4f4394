"""Attention layers: content (MHSA), gated positional (GPSA), locality-preserved (LPA), and task attention.

Each says what it attends to: `attention_map(x) -> [B, H, Q, K]`, with `grid` and `num_prefix_tokens`; `forward` uses the
same scores. Patch tokens i, j lie on grid = (g_h, g_w) in row-major order; delta = p_j - p_i = (dx, dy), dx along columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        return (q @ k.transpose(-2, -1) * self.scale).float().softmax(-1)

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

    def __init__(self, dim, num_heads, grid, qkv_bias=False, locality_strength=1.0, extra_heads="random"):
        super().__init__(dim, num_heads, grid, qkv_bias)
        self.pos_weight = nn.Parameter(local_heads(num_heads, locality_strength, extra_heads))  # [H, 3]
        self.pos_bias = nn.Parameter(torch.zeros(num_heads))  # softmax cancels it; released weights have it
        self.gate = nn.Parameter(torch.ones(num_heads))

    def positional_maps(self) -> tuple[Tensor, Tensor]:
        """The positional softmax, which is the outer product of one along rows [H, g_h, g_h] and one along columns."""
        along_y, along_x = positional_scores(self.pos_weight, self.grid)
        return along_y.softmax(-1), (along_x + self.pos_bias[:, None, None]).softmax(-1)

    def attention_map(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, H, N, N]"""
        along_y, along_x = self.positional_maps()
        positional = torch.einsum("hab,hcd->hacbd", along_y, along_x).flatten(3).flatten(1, 2)  # [H, N, N]
        s = self.gate.sigmoid()[:, None, None]
        return (1 - s) * super().attention_map(x) + s * positional

    def attend(self, x: Tensor, v: Tensor) -> Tensor:
        along_y, along_x = (m.to(v.dtype) for m in self.positional_maps())
        s = self.gate.sigmoid().to(v.dtype)[:, None, None]
        # Along columns, then rows: O(g^3) where the [N, N] map would cost O(g^4).
        g_h, g_w = self.grid
        by_column = along_x[:, None] @ v.unflatten(2, (g_h, g_w))  # (B, H, N, d) -> (B, H, g_h, g_w, d)
        by_row = along_y @ by_column.flatten(3)  # (B, H, g_h, g_w * d)
        return (1 - s) * super().attend(x, v) + s * by_row.view_as(v)


class LPA(SelfAttention):
    """Locality-Preserved Attention (arXiv 2304.06971, eq. 3): A = softmax_j(lambda q.k / sqrt d + v.r_ij), one softmax."""

    def __init__(
        self, dim, num_heads, grid, qkv_bias=False, locality_strength=1.0, extra_heads="random",
        lambda_init=0.02, lambda_init_mode="constant",
    ):  # fmt: skip
        super().__init__(dim, num_heads, grid, qkv_bias)
        self.pos_weight = nn.Parameter(local_heads(num_heads, locality_strength, extra_heads))  # [H, 3]
        self.content_scale = nn.Parameter(torch.full((num_heads,), float(lambda_init)))  # the paper's lambda
        if lambda_init_mode == "normal":  # as released: lambda_init is a standard deviation, and signs are random
            nn.init.trunc_normal_(self.content_scale, std=lambda_init)

    def scaled_query_key_bias(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q with every scale in it and k [B, H, N, d], bias [H, N, N] in float32."""
        q, k = self.query_key(x)
        along_y, along_x = positional_scores(self.pos_weight, self.grid)
        bias = (along_y[:, :, None, :, None] + along_x[:, None, :, None, :]).flatten(3).flatten(1, 2)
        # At 14 x 14 the local start reaches -300: denormals, at which a CPU crawls. e^-60 is nothing beside the maximum.
        bias = (bias - bias.amax(-1, keepdim=True)).clamp_min(-60)
        return q * (self.content_scale.to(q.dtype)[:, None, None] * self.scale), k, bias

    def attention_map(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, H, N, N]"""
        q, k, bias = self.scaled_query_key_bias(x)
        return (q @ k.transpose(-2, -1) + bias).softmax(-1)

    def attend(self, x: Tensor, v: Tensor) -> Tensor:
        q, k, bias = self.scaled_query_key_bias(x)
        return attend(q, k, v, bias)


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
        scores = torch.cat([(q * own).sum(-1, keepdim=True), q @ k.transpose(-2, -1)], dim=-1)
        return (scores * self.scale).float().softmax(-1)

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """-> [B, T, dim]"""
        a = self.attention_map(tokens, patches)
        own, v = (split_heads(self.v(x), self.num_heads) for x in (tokens, patches))
        a = a.to(v.dtype)
        return self.proj(merge_heads(a[..., :1] * own + a[..., 1:] @ v))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T + bias) v; q, k, v [B, H, N, d], scales already in q; bias [H, N, N] in float32 or None.

    The one place that chooses a formulation (benchmarks/attention.py). The fused kernel, but not to train on a CPU with a
    bias that needs a gradient, which it does not fuse, or in bf16, where its backward pass takes twice as long.
    """
    if q.device.type == "cpu" and q.requires_grad and (bias is not None or q.dtype != torch.float32):
        scores = q @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v
    mask = None if bias is None else bias.to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, dim] -> [B, H, N, d]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, N, dim]"""
    return x.transpose(1, 2).flatten(2)


def positional_scores(weight: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """weight [H, 3] on (dx, dy, dx^2 + dy^2) -> its parts along rows [H, g_h, g_h] and along columns [H, g_w, g_w].

    w.r_ij is the sum of the two: a function of dy alone and one of dx alone. Float32 also under autocast.
    """
    dy, dx = (
        torch.arange(g, device=weight.device)[None, :] - torch.arange(g, device=weight.device)[:, None] for g in grid
    )
    w_x, w_y, w_2 = weight.float().T[:, :, None, None]
    return w_y * dy + w_2 * dy**2, w_x * dx + w_2 * dx**2


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
