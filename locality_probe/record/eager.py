"""Attention that a layer writes out: a softmax over the keys, followed until it is multiplied with the values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from locality_probe.record.maps import Maps, wide

SOFTMAX = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax}
CASTS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.bmm, torch.Tensor.bmm}


def eager_maps(attention: Tensor) -> Maps:
    """The maps of a softmax that the layer has computed, [B, H, Q, K]."""
    return Maps(lambda rows: wide(attention[rows]), attention.shape)


def argument(args: tuple, kwargs: dict, place: int, name: str):
    """What a call was given for the parameter `name` at `place`, or None."""
    return args[place] if len(args) > place else kwargs.get(name)


def is_over_keys(args: tuple, kwargs: dict, result: Tensor) -> bool:
    """Whether a softmax with these arguments is over the last dimension of something like [B, H, Q, K]."""
    return result.ndim > 2 and argument(args, kwargs, 1, "dim") in (-1, result.ndim - 1)


def multiplies(func, args: tuple, kwargs: dict, attention: Tensor) -> bool:
    """Whether this product sums over the keys of `attention`, as that with the values does."""
    if func is not torch.einsum:
        return argument(args, kwargs, 0, "input") is attention
    operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    terms, _, out = args[0].replace(" ", "").partition("->")
    named = [term for term, operand in zip(terms.split(","), operands, strict=False) if operand is attention]
    return bool(named) and bool(out) and named[0][-1] not in out and all(letter in out for letter in named[0][:-1])
