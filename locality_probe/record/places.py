"""Where the tokens of a layer are: on a grid or in a window, behind how many prefix tokens; declared, given or observed."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

MAX_PREFIX = 16  # more tokens than this in front of the patches are not taken for class and register tokens
NOT_BETWEEN_PATCHES = {  # by what is in the name of the class, where no shape can tell
    "xca": "it attends between channels",
    "covariance": "it attends between channels",
    "channel": "it attends between channels",
    "maskunit": "its tokens are ordered by mask units, not by rows of the grid",
}


Place = tuple[tuple[int, ...], int, str]  # grid, prefix tokens, extent


class Places:
    """Tells the grid, the prefix tokens and the extent of each layer of `model` during one forward pass at a time."""

    def __init__(self, model: nn.Module, grid: tuple[int, ...] | None, num_prefix_tokens: int | None):
        self.model, self.grid, self.num_prefix_tokens = model, grid, num_prefix_tokens
        self.tokens = sum(p.numel() // p.shape[-1] for name, p in model.named_parameters() if p.ndim and is_token(name))

    def begin(self, inputs: Tensor) -> None:
        """A forward pass on `inputs`, [B, ...], begins."""
        self.inputs, self.batch = inputs, len(inputs)
        self.shapes: dict[tuple[int, int], None] = {}  # of feature maps, or what looks like one; the newest last

    def observe(self, output: object) -> None:
        """What a module returned: a feature map [B, H, W, C] or [B, C, H, W] tells how many patches there are by then."""
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == self.batch:
            _, first, second, third = output.shape
            for shape in ((first, second), (second, third)):  # channels last, channels first
                if min(shape) > 1:
                    self.shapes.pop(shape, None)
                    self.shapes[shape] = None  # the newest is last

    def of(self, running: list[nn.Module], batch: int, queries: int, keys: int) -> Place | str:
        """(grid, prefix tokens, extent) of a layer that does not say so itself, or why that cannot be told."""
        if batch != self.batch:
            window = self._window(running) if batch % self.batch == 0 and queries == keys else None
            if isinstance(window, tuple) and keys == math.prod(window):
                return window, 0, "window"
            if isinstance(window, str):
                return window
            return f"it attends within parts of an image: {batch} of {self.batch} images"
        declared = self.num_prefix_tokens
        if declared is None:
            declared = getattr(self.model, "num_prefix_tokens", None)
        if queries != keys and queries > max(1, declared or 0):
            return f"its {queries} queries are neither its {keys} keys nor a token alone"
        if self.grid is not None:
            return tuple(self.grid), declared or 0, "grid"
        whole = self._declared_grid()
        if whole and keys == math.prod(whole) + (declared or 0):
            return whole, declared or 0, "grid"
        # Where tokens are merged or class tokens join late, feature maps tell: the newest that fits, with no prefix first.
        fitting = [
            (keys - h * w, (h, w))
            for h, w in reversed(self.shapes)
            if 0 <= keys - h * w <= min(self.tokens, MAX_PREFIX)
        ]
        allowed = [candidate for candidate in fitting if self.num_prefix_tokens in (None, candidate[0])]
        if allowed:
            prefix, grid = min(allowed, key=lambda candidate: candidate[0])
            return grid, prefix, "grid"
        window = self._window(running)
        if isinstance(window, tuple) and queries == keys == math.prod(
            window
        ):  # one window, of an image that is padded to it
            return window, 0, "window"
        if whole:
            return misfit(keys, whole, declared or 0)
        return (
            f"its {keys} keys are no grid of patches that can be told: give grid=(rows, columns) and num_prefix_tokens"
        )

    def _declared_grid(self) -> tuple[int, int] | None:
        embed: Any = getattr(self.model, "patch_embed", None)
        patch, size = getattr(embed, "patch_size", None), tuple(self.inputs.shape[-2:])
        if self.inputs.ndim != 4:
            return None
        if hasattr(embed, "dynamic_feat_size"):  # timm's: knows of padding and of a CNN in front
            return tuple(embed.dynamic_feat_size(size))
        if patch is None:
            return None
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        return tuple(side // p for side, p in zip(size, patch, strict=True))

    def _window(self, running: list[nn.Module]) -> tuple[int, int] | str | None:
        """The window of the layer that is running, by the names that Swin, Twins and MaxViT have for it, or why it is none."""
        for module in reversed(running[-3:]):
            if getattr(module, "partition_block", True) is False:  # MaxViT's grid attention
                return "it attends among every so many patches, which are no neighbours"
            for name in ("window_size", "ws", "partition_size"):
                size = getattr(module, name, None)
                if isinstance(size, int) and size > 0:
                    return size, size
                if isinstance(size, (tuple, list)) and len(size) == 2:
                    return tuple(size)
        return None


def misfit(keys: int, grid: tuple[int, ...], prefix: int) -> str:
    """The reason to skip a layer whose keys are not these prefix tokens and patches."""
    return f"its {keys} keys are not {prefix} prefix tokens + {' x '.join(map(str, grid))} patches"


def is_token(name: str) -> bool:
    """Whether a parameter holds class, register or distillation tokens, by the names of timm, HuggingFace and torchvision."""
    name = name.rpartition(".")[-1].lower()
    return any(word in name for word in ("token", "class_emb", "cls", "register"))
