"""Attention that runs fused in scaled_dot_product_attention: the map that its kernels apply, from what they are given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from locality_probe.record import maps
from locality_probe.record.maps import Maps, Visitor, rows_of_block, slices, wide
from locality_probe.record.sighting import Sighting, Sorting

aten = torch.ops.aten
# The arguments of each kernel after query, key and value, as far as they matter here. Where none of these runs,
# scaled_dot_product_attention is a softmax between two products, and is seen as such.
KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": ("dropout_p", "is_causal"),
    "_scaled_dot_product_flash_attention": ("dropout_p", "is_causal"),
    "_scaled_dot_product_efficient_attention": ("attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"),
    "_scaled_dot_product_cudnn_attention": ("attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"),
    "_scaled_dot_product_fused_attention_overrideable": ("attn_bias", "dropout_p", "is_causal"),
    "_scaled_dot_product_attention_math_for_mps": ("attn_mask", "dropout_p", "is_causal"),
}
OPERATORS = {getattr(aten, name).default: names for name, names in KERNELS.items() if hasattr(aten, name)}


def sees(func, args: tuple, kwargs: dict) -> Sighting | None:
    """The attention of one of the KERNELS; its query is [B, H, Q, d], its key and value [B, H or fewer, K, d]."""
    names = OPERATORS.get(func)
    if names is None:
        return None
    query, key, value, *rest = args
    given = dict(zip(names, rest, strict=False)) | kwargs
    mask = given.get("attn_mask", given.get("attn_bias"))
    whole = (*query.shape[:-1], key.shape[-2])
    options = bool(given.get("is_causal")), given.get("scale"), float(given.get("dropout_p") or 0)

    def sorted_scores(sorting: Sorting) -> Scores:
        if whole[:2] == (sorting.images * sorting.windows, sorting.heads):
            return Scores(query, key, value, mask, *options, replaces=True)
        q, k, v = (sorting(_full(x, whole)) for x in (query, key, value))
        return Scores(q, k, v, None if mask is None else sorting(_full(mask, whole)), *options)

    def output(out: Tensor) -> object:
        """As the kernel returns it: with the log-sum-exp, which only its backward pass reads; of other kernels with all that
        else they return."""
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return out, query.new_zeros(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
        return (out, *func(*args, **kwargs)[1:])

    scores = Scores(query, key, value, mask, *options)
    return Sighting("sdpa", whole, _full(query, whole), (_full(key, whole), _full(value, whole)), _full(value, whole),
                    sorted_scores, output, causal=lambda: is_causal_map(scores))  # fmt: skip


def _full(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B or 1, H or fewer, n, d] -> [B, H, n, d]; a mask [.., Q, K] likewise"""
    x = x[(None,) * (4 - x.ndim)]
    if x.shape[1] not in (1, shape[1]):  # grouped queries
        x = x.repeat_interleave(shape[1] // x.shape[1], dim=1)
    return x.expand(*shape[:2], *(shape[2:] if x.shape[2:] == (1, 1) else x.shape[2:]))


class Scores(Maps):
    """The attention softmax(scale * query key' + mask) of [B', H, Q, d]; scores are float32 at least."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False,
        scale: float | None = None, dropout_p: float = 0.0, replaces: bool = False,
    ):  # fmt: skip
        self.query, self.key, self.value = query, key, value
        self.mask, self.causal = mask, causal
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.shape = (*query.shape[:-1], key.shape[-2])
        # Where attention is worked out anyway, in the model's own precision, the kernel need not run too.
        as_exact = query.dtype in (torch.float32, torch.float64) and query.device.type == "cpu" and dropout_p == 0
        self.replaces = replaces and as_exact and len(query) == len(value) and not torch.is_grad_enabled()
        self.out: Tensor | None = None  # what the kernel would return, once `visit` has worked it out

    def part(self, images: slice) -> Tensor:
        return fused_map(self.query, self.key, self.mask, self.causal, self.scale, images)

    def visit(self, visitor: Visitor, whole: bool = False) -> None:
        """Attention and, where it `replaces` the kernel, its output, a block of images, heads and queries at a time.

        A block fits a core's cache, so that this costs little more than the fused kernel, and no more memory.
        """
        batch, heads, queries, keys = self.shape
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        rows, block = rows_of_block(queries, keys, self.query.device, whole), maps.block(self.query.device)
        area = rows * keys
        at_once = max(1, min(block // area, max(8, block // (4 * area))))  # blocks of one head and image
        step, together = (
            -(-heads // -(-heads // at_once)),
            max(1, at_once // heads),
        )  # heads in equal parts, or whole images
        scratch = self.query.new_empty(min(at_once, batch * heads) * area, dtype=dtype)
        mask = None if self.mask is None else self.mask.expand(self.shape)
        out = None
        if self.replaces:  # laid out as models want it next: heads side by side
            out = self.out = self.value.new_empty(batch, queries, heads, self.value.shape[-1]).transpose(1, 2)
        for images in slices(batch, together):
            q, k, v = (self._of(x, images, dtype) for x in (self.query, self.key, self.value))
            q, k = q * self.scale, k.mT.contiguous()
            for some in slices(queries, rows):
                for these in slices(heads, step):
                    b, h, n = len(q), these.stop - these.start, some.stop - some.start
                    a = scratch[: b * h * n * keys].view(b * h, n, keys)
                    torch.bmm(q[:, these, some].flatten(0, 1), k[:, these].flatten(0, 1), out=a)
                    shown = a.view(b, h, n, keys)
                    _softmax(shown, None if mask is None else mask[images, these, some], self.causal * (some.start + 1))
                    if out is not None:
                        out[images, these, some] = torch.bmm(a, v[:, these].flatten(0, 1)).view(b, h, n, -1)
                    visitor(shown, images, these, some.start)

    def _of(self, x: Tensor, images: slice, dtype: torch.dtype) -> Tensor:
        """[B, H, N, d], perhaps of fewer heads or of one image for all -> [b, H, N, d]"""
        if x.shape[1] != self.shape[1]:  # grouped queries
            x = x.repeat_interleave(self.shape[1] // x.shape[1], dim=1)
        return x.expand(self.shape[0], -1, -1, -1)[images].to(dtype)


def fused_map(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None, rows: slice) -> Tensor:
    """The attention [b, H, Q, K] that scaled_dot_product_attention applies for the images `rows`, scores in float32."""
    q, k = (x[rows] if len(x) > 1 else x for x in (q, k))
    if k.shape[1] != q.shape[1]:  # grouped queries
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = wide(q) @ wide(k).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = mask[rows] if mask is not None and mask.ndim == 4 and mask.shape[0] > 1 else mask
    return _softmax(scores, mask, int(causal))


def _softmax(scores: Tensor, mask: Tensor | None, causal: int) -> Tensor:
    """In place over the keys of scores [b, h, q, K]; causal: 1 + the place of the first query, or 0.

    A query whose every key is masked attends to nothing.
    """
    if causal:
        scores.masked_fill_(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(causal), -math.inf
        )
    if mask is None:
        return torch.softmax(scores, -1, out=scores)
    scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    empty = scores.amax(-1, keepdim=True) == -math.inf
    return torch.softmax(scores, -1, out=scores).masked_fill_(empty, 0.0)


def is_causal_map(scores: Scores) -> bool:
    """Whether no query sees a later key: by is_causal, or by a mask that says so for all images and heads alike."""
    if scores.causal or scores.mask is None or scores.shape[-1] == 1:
        return scores.causal
    mask = scores.mask.expand(scores.shape)[0, 0]
    closed = ~mask if mask.dtype == torch.bool else mask <= -1e4
    return bool((closed == torch.ones_like(closed).triu(1)).all())
