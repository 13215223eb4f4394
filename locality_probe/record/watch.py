"""The watch: sees each attention layer while the model runs, and knows whose attention it is by a stack of the modules."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from locality_probe.record.asked import ASKED_AFTER, asked_after_maps, asked_maps, offers_map
from locality_probe.record.eager import CASTS, PRODUCTS, SOFTMAX, eager_maps, is_over_keys, multiplies
from locality_probe.record.layer import AttentionLayer, Layer, Recorded
from locality_probe.record.maps import Maps, Reader
from locality_probe.record.multihead import multihead_maps
from locality_probe.record.places import NOT_BETWEEN_PATCHES, Place, Places, misfit
from locality_probe.record.sdpa import Scores, is_causal_map


class Watch(TorchFunctionMode):
    """Sees attention as the model computes it and knows whose it is by a stack of the modules that are running."""

    def __init__(self, model: nn.Module, read: Reader, grid: tuple[int, ...] | None, num_prefix_tokens: int | None):
        super().__init__()
        self.model, self.read, self.places = model, read, Places(model, grid, num_prefix_tokens)
        self.names = {module: name for name, module in model.named_modules()}
        self.asked = {module for module in self.names if offers_map(module)}
        self.asked_after = {
            m: getattr(m, ASKED_AFTER[type(m).__name__])
            for m in self.names if hasattr(m, ASKED_AFTER.get(type(m).__name__, " "))
        }  # fmt: skip
        self.silent = self.asked | set(self.asked_after)

    @torch.no_grad()
    def forward(self, *inputs: object, **named: object) -> object:
        """The model's output, and in `seen` each layer with what was read off it."""
        tensors = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor) and x.ndim]
        if not tensors:
            raise ValueError("give the model's input as tensors, [B, ...]")
        self.batch, self.device = len(tensors[0]), tensors[0].device.type
        self.places.begin(tensors[0])
        self.running: list[nn.Module] = []
        self.softmaxed: list[tuple[Tensor, nn.Module]] = []  # on their way to the values, and whose they are
        self.seen: dict[nn.Module, Recorded] = {}
        with self:
            return self.model(*inputs, **named)

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
            layer = cast(AttentionLayer, module)
            place = tuple(layer.grid), layer.num_prefix_tokens, "grid"
            self._see(module, asked_maps(layer, inputs), "asked", place)

    def _leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if module in self.asked_after and module not in self.seen:
            maps = asked_after_maps(self.asked_after[module], inputs)
            self._see(module, maps, "asked")
        self.running.pop()
        self.places.observe(output)
        left = [attention for attention, owner in self.softmaxed if owner is module]
        self.softmaxed = [(attention, owner) for attention, owner in self.softmaxed if owner is not module]
        for attention in left:
            if attention is output and self.running:  # a module for the softmax alone
                self.softmaxed.append((attention, self.running[-1]))
                continue
            square = attention.shape[-2] == attention.shape[-1]
            if module not in self.seen and (square or looks_like_attention(module)):
                self._skip(module, "its softmax does not meet the values as it is")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.running or not self.silent.isdisjoint(self.running):  # layers that are asked need no watching
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            given = inspect.signature(Scores).bind(*args, **kwargs).arguments
            tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
            scores = Scores(**given | {name: self._batched(x) for name, x in tensors.items()})
            self._see_unasked(self.running[-1], scores, "sdpa")
            return func(*args, **kwargs) if scores.out is None else scores.out.reshape(*given["query"].shape[:-1], -1)
        result = func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            self._see_multihead(func, inspect.signature(func).bind(*args, **kwargs).arguments)
        elif func in SOFTMAX:
            if is_over_keys(args, kwargs, result):
                self.softmaxed.append((result, self.running[-1]))
        elif self.softmaxed and func in CASTS:
            self.softmaxed = [(result if a is args[0] else a, owner) for a, owner in self.softmaxed]
        elif self.softmaxed and (func in PRODUCTS or func is torch.einsum):
            self._see_eager(func, args, kwargs)
        return result

    def _see_eager(self, func, args: tuple, kwargs: dict) -> None:
        for place, (attention, owner) in enumerate(self.softmaxed):
            if multiplies(func, args, kwargs, attention):
                del self.softmaxed[place]
                a = self._batched(attention) if owner is self.running[-1] else attention
                self._see_unasked(owner, eager_maps(a), "eager")
                return

    def _see_multihead(self, func, given: dict) -> None:
        maps = multihead_maps(func, given)
        if isinstance(maps, str):
            return self._skip(self.running[-1], maps)
        self._see_unasked(self.running[-1], maps, "multihead")

    def _see_unasked(self, module: nn.Module, maps: Maps, how: str) -> None:
        """Attention that the model computed: of all tokens of an image, or of some, or not of tokens at all."""
        other = next((why for word, why in NOT_BETWEEN_PATCHES.items() if word in type(module).__name__.lower()), None)
        if getattr(module, "use_global", False):  # GC-ViT
            other = "its queries are of the whole image, its keys of a window"
        if len(maps.shape) != 4:
            self._skip(module, f"its attention {list(maps.shape)} is not [B, H, Q, K]")
        elif other:
            self._skip(module, other)
        else:
            self._see(module, maps, how)

    def _batched(self, x: Tensor) -> Tensor:
        """What the module that is running has as [B * H, ...] (SAM, BoTNet) or [B, windows, H, ...] (Twins) -> [B, H, ...]"""
        heads = getattr(self.running[-1], "num_heads", None)
        if x.ndim == 3 and isinstance(heads, int) and len(x) % heads == 0:
            return x.unflatten(0, (-1, heads))
        return x.flatten(0, 1) if x.ndim == 5 and getattr(self.running[-1], "ws", None) else x

    def _see(self, module: nn.Module, maps: Maps, how: str, place: Place | None = None) -> None:
        batch, heads, queries, keys = maps.shape
        if module in self.seen:
            return self._skip(module, "it attends more than once in a forward pass")
        place_or_reason = place or self.places.of(self.running, batch, queries, keys)
        if isinstance(place_or_reason, str):
            return self._skip(module, place_or_reason)
        grid, prefix, extent = place_or_reason
        layer = Layer(
            -1, self.names[module], type(module).__name__, heads, queries, grid, prefix, how=how, extent=extent
        )
        if keys != layer.keys:
            return self._skip(module, misfit(keys, grid, prefix))
        if layer.between_patches and math.prod(grid) == 1:
            return self._skip(module, "its grid is one patch: there are no distances")
        layer = replace(layer, causal=isinstance(maps, Scores) and queries == keys and is_causal_map(maps))
        with torch.autocast(self.device, enabled=False):  # float32, also where the model computes in less
            self.seen[module] = Recorded(layer, self.read(layer, maps))

    def _skip(self, module: nn.Module, reason: str) -> None:
        layer = Layer(-1, self.names[module], type(module).__name__, 0, 0, (0, 0), 0)
        self.seen[module] = Recorded(layer.skipped(reason))

    def result(self) -> list[Recorded]:
        """Every attention layer of the model in its order: those that were seen, and those that should have been.

        Raises ValueError for a model without any.
        """
        for module in self.names:
            inside = (other for other in module.modules() if other is not module)
            if not looks_like_attention(module) or module in self.seen:
                continue
            if not any(other in self.seen or looks_like_attention(other) for other in inside):
                self._skip(module, "neither scaled_dot_product_attention nor softmax is seen in it")
        recorded = [self.seen[module] for module in self.names if module in self.seen]
        if not recorded:
            raise ValueError(f"{type(self.model).__name__} has no attention layer that can be seen")
        for index, item in enumerate(recorded):
            item.layer = replace(item.layer, index=index)
        return recorded


def looks_like_attention(module: nn.Module) -> bool:
    """Whether the class of a module says that it is attention, or the module gives its map."""
    name = type(module).__name__.lower()
    return any(word in name for word in ("attention", "attn", "litemla")) or offers_map(module)
