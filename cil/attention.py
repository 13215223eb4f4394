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
