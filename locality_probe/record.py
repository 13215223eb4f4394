"""Run a model once and see the attention of each layer at its real input, whatever the model, one layer at a time.

Layers that offer `attention_map` (ours) are asked. In any other model `F.scaled_dot_product_attention` is watched while it
stays fused, and where a layer writes attention out, the softmax that is then multiplied with the values; a
TorchFunctionMode sees both, so nothing is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CHUNK_BYTES = 64 * 2**20  # of attention in float32 at a time: whole images, at least one


@runtime_checkable
class AttentionLayer(Protocol):
    """A layer that says what it attends to. K = num_prefix_tokens + the patches of grid, Q = K or tokens only."""

    grid: tuple[int, int]
    num_prefix_tokens: int

    def attention_map(self, *inputs: Tensor) -> Tensor:
        """The layer's own inputs, each [B, N, dim] -> [B, H, Q, K]"""


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model and what became of it: `status` is ok, or skipped with a `reason`."""

    index: int
    name: str
    kind: str
    num_heads: int
    queries: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    status: str = "ok"
    reason: str = ""

    @property
    def keys(self) -> int:
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def between_patches(self) -> bool:
        """Whether patches are among the queries; not so where a class or task token alone looks at them."""
        return self.queries == self.keys

    def skipped(self, reason: str) -> Layer:
        return replace(self, status="skipped", reason=reason)


@dataclass
class Recorded:
    """A layer, and the measure's values: tensors [B, ...], empty if the layer was skipped."""

    layer: Layer
    values: dict[str, Tensor] = field(default_factory=dict)


Measure = Callable[[Tensor, Layer], dict[str, Tensor]]


@torch.no_grad()
def record(
    model: nn.Module,
    images: Tensor,
    measure: Measure,
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int | None = None,
) -> list[Recorded]:
    """Forward `images` [B, 3, H, W] in eval mode and apply `measure` to the attention [b, H, Q, K] of every layer.

    The measure gets a few images at a time in float32 and returns tensors [b, ...]; no more than one chunk of one layer's
    attention is alive. grid and num_prefix_tokens are read off the model where it has timm's names for them. The model
    comes back as it was: hooks, training mode of each module, gradient mode.

    Raises ValueError for a model without attention, a compiled one, and when the grid cannot be told.
    """
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules()):
        raise ValueError("a torch.compile'd model hides its attention; give the model itself (model._orig_mod)")
    watch = _Watch(model, measure, _geometry(model, images, grid, num_prefix_tokens), images)
    with _evaluating(model), watch.hooked(), watch:
        model(images)
    recorded = watch.result()
    if not recorded:
        raise ValueError(f"{type(model).__name__} has no attention layer that can be seen")
    return recorded


def _geometry(model, images, grid, num_prefix_tokens) -> Callable[[], tuple[tuple[int, int], int]]:
    """How to find (grid, num_prefix_tokens) of a layer that does not say so itself; asked only where needed."""

    def find() -> tuple[tuple[int, int], int]:
        embed, size = getattr(model, "patch_embed", None), tuple(images.shape[-2:])
        patch = getattr(embed, "patch_size", None)
        found = grid
        if found is None and hasattr(embed, "dynamic_feat_size"):  # timm's: knows of padding and of a CNN in front
            found = tuple(embed.dynamic_feat_size(size))
        elif found is None and patch is not None:
            patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
            found = tuple(side // p for side, p in zip(size, patch, strict=True))
        prefix = num_prefix_tokens if num_prefix_tokens is not None else getattr(model, "num_prefix_tokens", None)
        if found is None or prefix is None:
            raise ValueError(
                f"the patch grid of {type(model).__name__} cannot be told from it; give grid=(rows, columns) and "
                "num_prefix_tokens"
            )
        return found, prefix

    return find


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module's own training mode comes back, for frozen parts differ from their parents."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


SOFTMAX = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax}
CASTS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.bmm, torch.Tensor.bmm}
NOT_BETWEEN_PATCHES = {  # by what is in the name of the class, where no shape can tell
    "xca": "it attends between channels",
    "covariance": "it attends between channels",
    "channel": "it attends between channels",
    "maskunit": "its tokens are ordered by mask units, not by rows of the grid",
}


class _Watch(TorchFunctionMode):
    """Sees attention as the model computes it and knows whose it is by a stack of the modules that are running."""

    def __init__(self, model: nn.Module, measure: Measure, geometry, images: Tensor):
        super().__init__()
        self.measure, self.geometry, self.batch, self.device = measure, geometry, len(images), images.device.type
        self.names = {module: name for name, module in model.named_modules()}
        self.asked = {module for module in self.names if isinstance(module, AttentionLayer)}
        self.running: list[nn.Module] = []
        self.softmaxed: list[tuple[Tensor, nn.Module]] = []  # on their way to the values, and whose they are
        self.seen: dict[nn.Module, Recorded] = {}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for module in self.names:
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        self.running.append(module)
        if module in self.asked:

            def part(rows: slice) -> Tensor:
                return module.attention_map(*(x[rows] for x in inputs))

            shape = part(slice(0, 1)).shape[1:]
            self._see(module, part, len(inputs[0]), shape, tuple(module.grid), module.num_prefix_tokens)

    def _leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        self.running.pop()
        left = [attention for attention, owner in self.softmaxed if owner is module]
        self.softmaxed = [(attention, owner) for attention, owner in self.softmaxed if owner is not module]
        for attention in left:
            if attention is output and self.running:  # a module for the softmax alone
                self.softmaxed.append((attention, self.running[-1]))
                continue
            square = attention.shape[-2] == attention.shape[-1]
            if module not in self.seen and (square or _looks_like_attention(module)):
                self._skip(module, "its softmax does not meet the values as it is")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.running or not self.asked.isdisjoint(self.running):  # layers that are asked need no watching
            return result
        if func is F.scaled_dot_product_attention:
            self._see_fused(result, *args, **kwargs)
        elif func in SOFTMAX:
            if result.ndim > 2 and _named(args, kwargs, 1, "dim") in (-1, result.ndim - 1):
                self.softmaxed.append((result, self.running[-1]))
        elif self.softmaxed and func in CASTS:
            self.softmaxed = [(result if a is args[0] else a, owner) for a, owner in self.softmaxed]
        elif self.softmaxed and (func in PRODUCTS or func is torch.einsum):
            self._see_written_out(func, args, kwargs)
        return result

    def _see_fused(self, out, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **_):
        def part(rows: slice) -> Tensor:
            return fused_map(query, key, attn_mask, is_causal, scale, rows)

        self._see_watched(self.running[-1], part, (*out.shape[:-1], key.shape[-2]))

    def _see_written_out(self, func, args: tuple, kwargs: dict) -> None:
        for place, (attention, owner) in enumerate(self.softmaxed):
            if _multiplies(func, args, kwargs, attention):
                del self.softmaxed[place]
                self._see_watched(owner, lambda rows, a=attention: a[rows].float(), tuple(attention.shape))
                return

    def _see_watched(self, module: nn.Module, part: Callable[[slice], Tensor], shape: tuple[int, ...]) -> None:
        """Attention that the model computed: of all tokens of an image, or of some, or not of tokens at all."""
        other = next((why for word, why in NOT_BETWEEN_PATCHES.items() if word in type(module).__name__.lower()), None)
        if len(shape) != 4:
            self._skip(module, f"its attention {list(shape)} is not [B, H, Q, K]")
        elif shape[0] != self.batch:
            self._skip(module, f"it attends within parts of an image: {shape[0]} of {self.batch} images")
        elif other:
            self._skip(module, other)
        else:
            grid, prefix = self.geometry()
            queries, keys = shape[2:]
            if queries != keys and queries > max(1, prefix):
                self._skip(module, f"its {queries} queries are neither its {keys} keys nor a token alone")
            else:
                self._see(module, part, shape[0], shape[1:], grid, prefix)

    def _see(self, module, part: Callable[[slice], Tensor], batch: int, shape, grid, prefix) -> None:
        heads, queries, keys = shape
        layer = Layer(-1, self.names[module], type(module).__name__, heads, queries, grid, prefix)
        if module in self.seen:
            self.seen[module] = Recorded(layer.skipped("it attends more than once in a forward pass"))
        elif keys != layer.keys:
            reason = f"its {keys} keys are not {prefix} prefix tokens + {grid[0]} x {grid[1]} patches"
            self.seen[module] = Recorded(layer.skipped(reason))
        else:
            step = max(1, CHUNK_BYTES // (4 * heads * queries * keys))
            with torch.autocast(self.device, enabled=False):  # float32, also where the model computes in less
                chunks = [self.measure(part(slice(i, i + step)), layer) for i in range(0, batch, step)]
            self.seen[module] = Recorded(layer, {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]})

    def _skip(self, module: nn.Module, reason: str) -> None:
        layer = Layer(-1, self.names[module], type(module).__name__, 0, 0, (0, 0), 0)
        self.seen[module] = Recorded(layer.skipped(reason))

    def result(self) -> list[Recorded]:
        """Every attention layer of the model in its order: those that were seen, and those that should have been."""
        for module in self.names:
            inside = (other for other in module.modules() if other is not module)
            if not _looks_like_attention(module) or module in self.seen:
                continue
            if not any(other in self.seen or _looks_like_attention(other) for other in inside):
                self._skip(module, "neither scaled_dot_product_attention nor softmax is seen in it")
        recorded = [self.seen[module] for module in self.names if module in self.seen]
        for index, item in enumerate(recorded):
            item.layer = replace(item.layer, index=index)
        return recorded


def fused_map(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None, rows: slice) -> Tensor:
    """The attention [b, H, Q, K] that scaled_dot_product_attention applies for the images `rows`, scores in float32."""
    q, k = (x[rows] if len(x) > 1 else x for x in (q, k))
    if k.shape[1] != q.shape[1]:  # grouped queries
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.float() @ k.float().transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        mask = mask[rows] if mask.ndim == 4 and mask.shape[0] > 1 else mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    attention = scores.softmax(-1)
    # A query whose every key is masked attends to nothing.
    return attention if mask is None else attention.masked_fill_(scores.amax(-1, keepdim=True) == float("-inf"), 0.0)


def _named(args: tuple, kwargs: dict, place: int, name: str):
    return args[place] if len(args) > place else kwargs.get(name)


def _multiplies(func, args: tuple, kwargs: dict, attention: Tensor) -> bool:
    """Whether this product sums over the keys of `attention`, as that with the values does."""
    if func is not torch.einsum:
        return _named(args, kwargs, 0, "input") is attention
    operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    terms, _, out = args[0].replace(" ", "").partition("->")
    named = [term for term, operand in zip(terms.split(","), operands, strict=False) if operand is attention]
    return bool(named) and bool(out) and named[0][-1] not in out and all(letter in out for letter in named[0][:-1])


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, AttentionLayer) or "attention" in name or name.endswith("attn")
