"""Attention kernels of other libraries: flash-attn, xformers, flex_attention. They are read by what they do.

An operator that takes queries, keys and values and is linear in the values gives its attention away: with the unit vector
e_j for the value of key j, entry j of its output is A_ij. Nothing is told from its name; its layout, [B, N, H, d] or
[B, H, N, d], is what one changed value changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from locality_probe.record.maps import Maps
from locality_probe.record.sighting import Sighting, Sorting

UNSEEN = (
    "unseen kernel {}: run the model with torch's own attention (attn_implementation='sdpa' in transformers, "
    "XFORMERS_DISABLED=1, use_flash_attn=False)"
)


def looks_like_attention(func, args: tuple) -> bool:
    """Whether an operator could be an attention kernel: one of aten that is called so, or another's with three float tensors
    of at least three dimensions, the first two of one width."""
    name = str(func).lower()
    if name.startswith("aten."):
        return "attention" in name or "transformer_encoder" in name
    if name.startswith(("prim", "torchvision.", "quantized.")):
        return False
    tensors = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()][:3]
    return len(tensors) == 3 and len({x.ndim for x in tensors}) == 1 and tensors[0].ndim in (3, 4) and (
        tensors[0].shape[-1] == tensors[1].shape[-1]
    ) and tensors[1].shape[:-1] == tensors[2].shape[:-1]  # fmt: skip


def sees(func, args: tuple, kwargs: dict) -> Sighting | None:
    """What another library's operator does, as a Sighting; a reason where its attention cannot be read."""
    if not looks_like_attention(func, args):
        return None
    where = [n for n, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()][:3]
    if len(where) < 3 or str(func).startswith("aten."):
        return Sighting("kernel", reason=UNSEEN.format(func), by_name=True)
    query, key, value = (args[n] for n in where)

    def run(values: Tensor) -> Tensor:
        result = func(*(values if n == where[2] else x for n, x in enumerate(args)), **kwargs)
        return result[0] if isinstance(result, (tuple, list)) else result

    layout = _layout(run, query, value)
    if isinstance(layout, str):
        return Sighting("kernel", reason=UNSEEN.format(func) + f" ({layout})", by_name=True)
    q, k, v = (layout.to_heads(x) for x in (query, key, value))
    heads = q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))

    def maps(sorting: Sorting) -> Maps:
        a = sorting(layout.attention(run, value, q.shape))
        return Maps(lambda rows: a[rows].float(), a.shape, a.device)

    def output(out: Tensor) -> object:
        result = func(*args, **kwargs)
        out = layout.to_model(out)
        return type(result)((out, *result[1:])) if isinstance(result, (tuple, list)) else out

    return Sighting("kernel", (*q.shape[:3], k.shape[2]), q, (k, v), v, maps, output)


@dataclass(frozen=True)
class _Layout:
    """tokens: the dimension of the tokens; heads: that of the heads, None where they are in the batch."""

    tokens: int
    heads: int | None
    ndim: int

    def to_heads(self, x: Tensor) -> Tensor:
        """As the operator has it -> [B, H, N, d]"""
        if self.ndim == 3:
            return x[:, None] if self.heads is None else x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.tokens == 1 else x

    def to_model(self, x: Tensor) -> Tensor:
        """[B, H, N, d] -> as the operator has it"""
        if self.ndim == 3:
            return x[:, 0] if self.heads is None else x[0].transpose(0, 1)
        return x.transpose(1, 2) if self.tokens == 1 else x

    def attention(self, run: Callable[[Tensor], Tensor], value: Tensor, query: torch.Size) -> Tensor:
        """[B, H, Q, K], a few keys at a time: as many as a value is wide."""
        keys, width = value.shape[self.tokens], value.shape[-1]
        a = value.new_empty(*query[:3], keys, dtype=torch.promote_types(value.dtype, torch.float32))
        for first in range(0, keys, width):
            unit, n = torch.zeros_like(value), min(width, keys - first)
            index = torch.arange(n, device=value.device)
            unit.movedim(self.tokens, 0)[first + index, ..., index] = 1
            a[..., first : first + n] = self.to_heads(run(unit))[..., :n]
        return a


def _layout(run: Callable[[Tensor], Tensor], query: Tensor, value: Tensor) -> _Layout | str:
    """Where tokens and heads are in what the operator takes, or why it is no attention of values."""
    ones = run(torch.ones_like(value))
    if not isinstance(ones, Tensor) or ones.shape[:-1] != query.shape[:-1]:
        return "its output is not shaped like its queries"
    tolerance = 1e-4 if value.dtype in (torch.float32, torch.float64) else 3e-2
    if not torch.allclose(ones, torch.ones_like(ones), atol=tolerance):
        return "its rows do not sum to 1"
    changed = torch.zeros_like(value)
    changed[(0,) * (value.ndim - 1)] = 1
    out = run(changed).abs().amax(-1)  # where the first value of all arrives
    others = [d for d in range(out.ndim) if (out.amax([n for n in range(out.ndim) if n != d]) > 0).sum() > 1]
    if value.ndim == 3:
        one = others[0] if len(others) == 1 else -1
        return {0: _Layout(0, 1, 3), 1: _Layout(1, None, 3)}.get(one, "its layout cannot be told")
    of_heads = [d for d in (1, 2) if value.shape[d] != query.shape[d]]  # grouped queries
    tokens = [d for d in others if d in (1, 2) and d not in of_heads]
    if 0 in others or len(tokens) != 1:
        return "its layout cannot be told"
    return _Layout(tokens[0], 3 - tokens[0], 4)
