"""Attention that a layer writes out: a product of queries and keys, followed through what is done to it until it meets values.

Whatever the spelling (softmax as function or method, exp over its sum, einsum, baddbmm, a scripted function), by the time it
reaches the operators of aten it is a batched product, elementwise operations and views, and a second batched product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from locality_probe.record.maps import Maps, wide
from locality_probe.record.sighting import Sighting, Sorting

aten = torch.ops.aten
PRODUCTS = {aten.bmm.default: 0, aten.baddbmm.default: 1}  # and which argument is its left factor
ELEMENTWISE = {  # besides the operators that aten itself tags as pointwise
    aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default, aten.clone.default, aten._to_copy.default,
    aten.native_dropout.default, aten.contiguous.default, aten.dropout.default, aten.nan_to_num.default,
}  # fmt: skip
COPIES = {aten._unsafe_view.default, aten.index_select.default, aten.cat.default}
NOISE = {aten.bernoulli_.float, aten.bernoulli_.Tensor, aten.bernoulli.default, aten.bernoulli.p}
NOT_ONE = "its weights sum to {:.3g} where they meet the values, not to 1: it is no attention that D_loc is defined for"
NEGATIVE = (
    "its weights are negative in places, down to {:.2g}: they are no shares of attention (heads mixed, or subtracted)"
)
KEYS_FIRST = "its keys meet the values before the queries (linear attention): there is no map of tokens on tokens"
LOST = "what is done to its scores before they meet the values cannot be followed: heads mixed, or keys put in another order"
MIXERS = {
    aten.mm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten.native_layer_norm.default,
    aten.native_batch_norm.default,
}


@dataclass
class Product:
    """queries @ keys on its way to the values. labels: [..], as the product is shaped now, the flat index of its query in
    `query` [n * Q, d], with stride 0 along the keys; clean: the weights before dropout."""

    query: Tensor
    labels: Tensor
    owner: object
    clean: Tensor | None = None
    lost: bool = False

    @property
    def keys_dim(self) -> int | None:
        """Along which dimension the keys are; None where that is not known."""
        still = [
            d
            for d, (n, stride) in enumerate(zip(self.labels.shape, self.labels.stride(), strict=True))
            if n > 1 and not stride
        ]
        return still[0] if len(still) == 1 else None


class Products:
    """Follows the products of one forward pass. Nothing is kept alive by it but queries."""

    def __init__(self) -> None:
        self.known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.noise: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def sees(self, func, args: tuple, kwargs: dict) -> tuple[Sighting, object] | None:
        """What a product with values tells, before it is run, and the module that its weights began in."""
        if func not in PRODUCTS or not self.known:
            return None
        left, right = args[PRODUCTS[func] : PRODUCTS[func] + 2]
        known_left, known_right = self.known.get(left), self.known.get(right)
        known = known_left or known_right
        if known is None or (known_left and known_right):
            return None
        on_left, dim = known is known_left, known.keys_dim
        weights, values = (left, right) if on_left else (right.mT, left.mT)  # [n, Q, K], [n, K, d]
        if known.lost or dim is None:
            return Sighting("eager", reason=LOST, by_name=True), known.owner
        if dim != (2 if on_left else 1):
            return Sighting("eager", reason=KEYS_FIRST, by_name=True), known.owner
        labels = known.labels if on_left else known.labels.mT
        query = known.query[labels[:, :, 0]]
        weights, reason = _checked(weights, known.clean if on_left or known.clean is None else known.clean.mT)

        def output(out: Tensor) -> Tensor:
            out = out.flatten(0, 1) if on_left else out.flatten(0, 1).mT
            return out.contiguous() if func is aten.bmm.default else out + args[0]

        def maps(sorting: Sorting) -> Maps:
            ordered = sorting(weights[:, None])
            return Maps(lambda rows: wide(ordered[rows]), ordered.shape, ordered.device)

        return Sighting("eager", (len(weights), 1, *weights.shape[1:]), query[:, None], (values[:, None],), values[:, None],
                        maps, output, reason, causal=lambda: _is_causal(weights)), known.owner  # fmt: skip

    def follow(self, func, args: tuple, result: object, owner: object) -> None:
        """Note what became of the products: a new one, or an old one in another shape."""
        if func in PRODUCTS:
            left = args[PRODUCTS[func]]
            if isinstance(result, Tensor) and result.shape[-1] > 1:
                n, queries, keys = result.shape
                labels = torch.arange(n * queries, device=result.device).view(n, queries, 1).expand(n, queries, keys)
                self.known[result] = Product(left.flatten(0, 1), labels, owner)
            return
        if func in NOISE:
            self.noise[result] = True
        if not self.known:
            return
        first = args[0] if args else None
        flat = [x for x in (first if isinstance(first, (list, tuple)) else args) if isinstance(x, Tensor)]
        known, source = next(((self.known[x], x) for x in flat if x in self.known), (None, None))
        if (
            known is not None
            and func in MIXERS
            and isinstance(out := result[0] if isinstance(result, tuple) else result, Tensor)
        ):
            self.known[out] = Product(known.query, known.labels, known.owner, None, True)
            return
        if (
            known is None
            or source is None
            or not (func.is_view or func in COPIES or func in ELEMENTWISE or torch.Tag.pointwise in func.tags)
        ):
            return
        if func.is_view or func in COPIES:
            self._moved(func, args, known, source, result)
            return
        out = result[0] if isinstance(result, tuple) else result
        if not isinstance(out, Tensor) or out.shape != source.shape:
            return
        dropped = func is aten.native_dropout.default or any(x in self.noise for x in flat)
        self.known[out] = Product(
            known.query, known.labels, known.owner, source if dropped else known.clean, known.lost
        )

    def _moved(self, func, args: tuple, known: Product, source: Tensor, result: object) -> None:
        """A view or a copy in another shape: the labels, and the weights before dropout, go the same way."""
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        labels = _alike(func, args, known.labels, known.keys_dim, len(results))
        cleans = _alike(func, args, known.clean, known.keys_dim, len(results))
        for out, its, clean in zip(results, labels, cleans, strict=True):
            lost = known.lost or its is None
            self.known[out] = Product(known.query, known.labels if its is None else its, known.owner, clean, lost)


def _alike(func, args: tuple, x: Tensor | None, keys_dim: int | None, count: int) -> list[Tensor | None]:
    """What a view or copy makes of another tensor of its source's shape; None where it cannot be done."""
    try:
        if x is None:
            return [None] * count
        if func is aten.cat.default:
            moved = _joined(x, args, keys_dim)
        elif func is aten._unsafe_view.default:
            moved = x.view(args[1])
        elif func is aten.index_select.default and args[1] == keys_dim:
            moved = None
        else:
            moved = func(x, *args[1:])
        return list(moved) if isinstance(moved, (list, tuple)) else [moved]
    except (RuntimeError, TypeError):
        return [None] * count


def _is_causal(weights: Tensor) -> bool:
    """Whether no query of [n, Q, Q] attends to a later key, not even a little."""
    some = weights[:: max(1, len(weights) // 8)]
    return weights.shape[1] == weights.shape[2] > 1 and not bool(some.triu(1).any())


def _joined(x: Tensor, args: tuple, keys_dim: int | None) -> Tensor | None:
    """The labels of scores that are put together along the keys, as for a memory of more keys."""
    dim = (args[1] if len(args) > 1 else 0) % x.ndim
    if dim != keys_dim or x.stride(dim):
        return None
    total = sum(y.shape[dim] for y in args[0])
    return x.narrow(dim, 0, 1).expand(*x.shape[:dim], total, *x.shape[dim + 1 :])


def _checked(weights: Tensor, clean: Tensor | None) -> tuple[Tensor, str]:
    """The weights [n, Q, K] as they are before dropout, and why they are no attention, if so: seen on some of them."""
    weights = weights if clean is None else clean.reshape(weights.shape)
    some = wide(weights[:: max(1, len(weights) // 8)])
    least, sums = some.amin().item(), some.sum(-1)
    if least < -1e-6:
        return weights, NEGATIVE.format(least)
    far = (sums - 1).abs()
    tolerance = 1e-3 if weights.dtype in (torch.float32, torch.float64) else 3e-2
    if bool(((far > tolerance) & (sums != 0)).any()):
        return weights, NOT_ONE.format(sums.flatten()[far.argmax()].item())
    return weights, ""
