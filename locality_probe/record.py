"""Run a model once and see the attention of each layer at its real input, whatever the model, one layer at a time.

Layers that offer `attention_map` (ours) are asked. In any other model `F.scaled_dot_product_attention` is watched while it
stays fused, and softmax where a layer writes attention out; both are seen by a TorchFunctionMode, so nothing is replaced.
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
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise ValueError("a torch.compile'd model hides its attention; give the model itself (model._orig_mod)")
    geometry = _geometry(model, images, grid, num_prefix_tokens)
    watch = _Watch(model, measure, geometry)
    with _evaluating(model), watch.hooked(), watch:
        model(images)
    recorded = watch.result()
    if not recorded:
        raise ValueError(f"{type(model).__name__} has no attention layer that can be seen")
    return recorded


def _geometry(model, images, grid, num_prefix_tokens) -> Callable[[], tuple[tuple[int, int], int]]:
    """How to find (grid, num_prefix_tokens) of a layer that does not say so itself; asked only where needed."""

    def find() -> tuple[tuple[int, int], int]:
        embed = getattr(model, "patch_embed", None)
        patch = getattr(embed, "patch_size", None)
        found = grid
        if found is None and patch is not None:
            patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
            pad = bool(getattr(embed, "dynamic_img_pad", False))
            found = tuple((side + (p - 1 if pad else 0)) // p for side, p in zip(images.shape[-2:], patch, strict=True))
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


SOFTMAX = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.nn.functional.softmax}


class _Watch(TorchFunctionMode):
    """Sees attention as the model computes it and knows whose it is by a stack of the modules that are running."""

    def __init__(self, model: nn.Module, measure: Measure, geometry):
        super().__init__()
        self.model, self.measure, self.geometry = model, measure, geometry
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.asking = False  # inside attention_map of a layer of ours: what is computed there is not the model's
        self.seen: dict[nn.Module, Recorded] = {}
        self.fused: set[nn.Module] = set()

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
        if isinstance(module, AttentionLayer):
            self.asking = True
            try:
                batch = inputs[0].shape[0]

                def part(rows: slice) -> Tensor:
                    return module.attention_map(*(x[rows] for x in inputs))

                one = part(slice(0, 1))
                self._see(module, part, batch, one.shape[1:], tuple(module.grid), module.num_prefix_tokens)
            finally:
                self.asking = False

    def _leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        self.running.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.asking or not self.running or any(isinstance(m, AttentionLayer) for m in self.running):
            return result
        if func is F.scaled_dot_product_attention:
            q, k = _named(args, kwargs, 0, "query"), _named(args, kwargs, 1, "key")
            if q.ndim == 4:
                self.fused.add(self.running[-1])
                mask = _named(args, kwargs, 3, "attn_mask")
                causal, scale = _named(args, kwargs, 5, "is_causal"), kwargs.get("scale")
                shape = (q.shape[1], q.shape[2], k.shape[2])
                self._see_watched(lambda rows: fused_map(q, k, mask, causal, scale, rows), len(q), shape)
        elif func in SOFTMAX and isinstance(result, Tensor) and result.ndim == 4:
            # Written-out attention: a square map in a module that calls itself attention and did not call the fused one.
            owner = next((m for m in reversed(self.running) if _looks_like_attention(m)), None)
            if owner is not None and owner not in self.fused and result.shape[-1] > 1:
                self._see_watched(lambda rows: result[rows].float(), len(result), result.shape[1:], owner)
        return result

    def _see_watched(self, part, batch: int, shape, owner: nn.Module | None = None) -> None:
        grid, prefix = self.geometry()
        self._see(owner or self.running[-1], part, batch, shape, grid, prefix)

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
            chunks = [self.measure(part(slice(i, i + step)), layer) for i in range(0, batch, step)]
            self.seen[module] = Recorded(layer, {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]})

    def result(self) -> list[Recorded]:
        """Every attention layer of the model in its order: those that were seen, and those that should have been."""
        recorded = []
        for module, name in self.names.items():
            if module in self.seen:
                recorded.append(self.seen[module])
            elif _looks_like_attention(module) and not any(
                other in self.seen or _looks_like_attention(other) for other in module.modules() if other is not module
            ):
                layer = Layer(-1, name, type(module).__name__, 0, 0, (0, 0), 0)
                recorded.append(
                    Recorded(layer.skipped("its attention passes neither scaled_dot_product_attention nor softmax"))
                )
        for index, item in enumerate(recorded):
            item.layer = replace(item.layer, index=index)
        return recorded


def fused_map(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool | None, scale: float | None, rows: slice
) -> Tensor:
    """The attention [b, H, Q, K] that scaled_dot_product_attention applies for the images `rows`, scores in float32."""
    k = k[rows]
    if k.shape[1] != q.shape[1]:  # grouped queries
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q[rows].float() @ k.float().transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        mask = mask[rows] if mask.ndim == 4 and mask.shape[0] > 1 else mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _named(args: tuple, kwargs: dict, place: int, name: str):
    return args[place] if len(args) > place else kwargs.get(name)


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, AttentionLayer) or "attention" in name or name.endswith("attn")
