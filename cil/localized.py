"""LPA inside networks of timm: eq. 3 put into the attention of a ViT, from scratch or trained; `cil.attention.localize`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from cil.positional import local_heads, merge_heads, positional_bias, wide, writes_out

STARTS = ("content", "local")


class LocalizedAttention(Attention):
    """timm's Attention with Locality-Preserved Attention (arXiv 2304.06971, eq. 3) between its patches.

    Scores are lambda q.k / sqrt d + v.r_ij between patches i and j on `grid`; r_ij = (dx, dy, dx^2 + dy^2). Class and register
    tokens, which come first, are nowhere: v.r counts as 0 where one of them is query or key. pos_weight: v, [H, 3];
    content_scale: lambda, [H]. All else is the given layer's, under its own names.
    """

    grid: tuple[int, int]
    num_prefix_tokens: int
    pos_weight: nn.Parameter
    content_scale: nn.Parameter

    @classmethod
    def of(
        cls, attention: Attention, grid: tuple[int, int], num_prefix_tokens: int, start: str, lambda_init: float
    ) -> LocalizedAttention:
        """The layer with its own parts, none of them copied."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.__dict__.update(
            {k: v for k, v in vars(attention).items() if k not in ("_parameters", "_buffers", "_modules")}
        )
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        weight, local = attention.qkv.weight, start == "local"
        v = local_heads(self.num_heads, 1.0, "random") if local else torch.zeros(self.num_heads, 3)
        self.pos_weight = nn.Parameter(v.to(weight))
        self.content_scale = nn.Parameter(weight.new_full((self.num_heads,), lambda_init if local else 1.0))
        return self

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, prefix + patches, dim] -> the same. Raises ValueError for other patches than those of `grid`, and a mask."""
        patches = self.grid[0] * self.grid[1]
        if x.shape[1] != self.num_prefix_tokens + patches or attn_mask is not None or is_causal:
            raise ValueError(
                f"this attention is local on {self.grid[0]} x {self.grid[1]} patches and {self.num_prefix_tokens} tokens "
                f"before them, without a mask; it got {x.shape[1]} tokens{' and a mask' * (attn_mask is not None or is_causal)}"
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, H, N, d]
        q, k = self.q_norm(q), self.k_norm(k)
        q = q * (self.content_scale * self.scale).to(q.dtype)[:, None, None]
        dropout = self.attn_drop.p if self.training else 0.0
        with torch.autocast(q.device.type, enabled=False):
            out = merge_heads((self.written_out if writes_out(q) else self.fused)(q, k, v, dropout))
        parts = dict(self.named_children())
        out = parts["norm"](out) if "norm" in parts else out  # scale_norm and gated, which older versions of timm lack
        out = out * parts["gate"](x).sigmoid() if "gate" in parts else out
        return self.proj_drop(self.proj(out))

    def written_out(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """q, with all scales in it, k, v: [B, H, N, d] -> the same, by way of the map [B, H, N, N]."""
        n = self.num_prefix_tokens
        scores = wide(q @ k.mT)
        most = self.largest()[:, :, None]  # of a patch's own bias, which positional_bias takes off
        bias = (positional_bias(self.pos_weight, self.grid) + most).to(scores.dtype)
        scores = scores + F.pad(bias, (n, 0, n, 0))
        return F.dropout(scores.softmax(-1), dropout).to(v.dtype) @ v

    def largest(self) -> Tensor:
        """max_j v.r_ij [H, N], whose place no gradient needs."""
        x, y = self._coordinates()
        dx, dy = x[None] - x[:, None], y[None] - y[:, None]
        w_x, w_y, w_2 = wide(self.pos_weight).T[:, :, None, None]
        return (w_x * dx + w_y * dy + w_2 * (dx**2 + dy**2)).amax(-1).detach()

    def fused(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """The same, O(N) in memory: v.r_ij enters as further columns of q and k, 0 for tokens that are nowhere.

        With v = (a, b, e): v.r_ij = (a - 2 e x_i) x_j + (b - 2 e y_i) y_j + e |p_j|^2 + (e |p_i|^2 - a x_i - b y_i). Unlike
        where all keys are patches, the terms of i do not cancel.
        """
        n, d = self.num_prefix_tokens, q.shape[-1]
        x, y = self._coordinates()
        a, b, e = wide(self.pos_weight).T[:, :, None]  # each [H, 1]
        square = x**2 + y**2
        of_q = torch.stack([a - 2 * e * x, b - 2 * e * y, e.expand(-1, len(x)), e * square - a * x - b * y], -1)
        of_k = torch.stack([x, y, square, torch.ones_like(x)], -1)
        if q.dtype in (torch.float16, torch.bfloat16):  # 8 bits and the rest: of |p_j|^2 too, as in positional_columns
            low_q, low_k = of_q - of_q.bfloat16(), of_k - of_k.bfloat16()
            of_q = torch.cat([of_q - low_q, low_q, (of_q - low_q)[..., 2:3]], -1)
            of_k = torch.cat([of_k - low_k, of_k - low_k, low_k[..., 2:3]], -1)
        wider = of_q.shape[-1] + -(d + of_q.shape[-1]) % 8  # GPUs want a multiple of 8, and a v as wide as q and k
        columns = (F.pad(c, (0, wider - c.shape[-1], n, 0)).to(q.dtype) for c in (of_q, of_k))
        q, k = (torch.cat([t, c.expand(*t.shape[:2], -1, -1)], -1) for t, c in zip((q, k), columns, strict=True))
        v = F.pad(v, (0, wider))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=1.0)[..., :d]

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """x and y of each patch [N], centred."""
        y, x = (torch.arange(g, device=self.pos_weight.device, dtype=wide(self.pos_weight).dtype) for g in self.grid)
        y, x = y - y.mean(), x - x.mean()
        return x.repeat(len(y)), y.repeat_interleave(len(x))


def localize(model: Any, layers: Iterable[int] | None = None, start: str = "content", lambda_init: float = 0.02) -> Any:
    """Put eq. 3 into the attention of a timm ViT, in place; the model is returned.

    layers: numbers of its blocks; None: all. start: `content`, and the network is what it was (lambda = 1, v = 0), so that a
    trained one can learn locality; `local`, and it begins as the paper's (heads at offsets around each patch, lambda =
    lambda_init), with its own value projection.
    Raises ValueError for a network whose blocks have no attention of timm's kind, for a layer that is not there, or already
    is local, and for another start.
    """
    if start not in STARTS:
        raise ValueError(f"start={start!r} is none of {', '.join(STARTS)}")
    blocks, embed = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    if blocks is None or grid is None:
        raise ValueError(f"{type(model).__name__} has no blocks over a grid of patches, as timm's ViTs have")
    chosen = list(range(len(blocks)) if layers is None else layers)
    for number in chosen:
        attention = getattr(blocks[number], "attn", None) if 0 <= number < len(blocks) else None
        if not 0 <= number < len(blocks):
            raise ValueError(f"there is no layer {number}: {type(model).__name__} has {len(blocks)} blocks, from 0")
        if isinstance(attention, LocalizedAttention):
            raise ValueError(f"layer {number} is local already")
        if type(attention) is not Attention:
            kind = type(attention).__name__
            raise ValueError(
                f"layer {number} has {kind}, and LPA goes into timm's Attention alone (ViT, DeiT, DINOv2, ...)"
            )
    for number in chosen:
        old = blocks[number].attn
        blocks[number].attn = LocalizedAttention.of(old, tuple(grid), model.num_prefix_tokens, start, lambda_init)
    return model
