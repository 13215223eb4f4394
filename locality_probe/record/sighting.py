"""One attention as a kernel or a product applied it, before it is known which of its rows are images, windows and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from locality_probe.record.maps import Maps


@dataclass(frozen=True)
class Sorting:
    """How the rows of what a kernel gets are sorted: image by image, then windows and heads in this or the other order."""

    images: int
    windows: int
    heads: int
    heads_first: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """[B0, H0, N, d] with B0 * H0 = images * windows * heads -> [images * windows, heads, N, d], a view where it can be."""
        wanted = (self.images * self.windows, self.heads)
        if x.shape[:2] == wanted:
            return x
        if not self.heads_first or 1 in (self.windows, self.heads):
            return x.flatten(0, 1).unflatten(0, wanted)
        return x.flatten(0, 1).unflatten(0, (self.images, self.heads, self.windows)).transpose(1, 2).flatten(0, 1)

    def undo(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """[images * windows, heads, ...] -> [B0, H0, ...] of this shape."""
        if self.heads_first and 1 not in (self.windows, self.heads):
            x = x.unflatten(0, (self.images, self.windows)).transpose(1, 2).flatten(0, 2)
            return x.unflatten(0, shape)
        return x if x.shape[:2] == shape else x.flatten(0, 1).unflatten(0, shape)


@dataclass
class Sighting:
    """how, and shape: [B0, H0, Q, K]. query: [B0, H0, Q, d]; keys: one tensor or more of [B0, H0, K, any], all of whose
    changes tell where a key is. maps: what gives the attention once its rows are sorted. replaced: gives the output in the
    shape that the model waits for, from [B0, H0, Q, d]; reason: why there is no map to read, if there is none."""

    how: str
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    query: Tensor | None = None
    keys: tuple[Tensor, ...] = ()
    values: Tensor | None = None
    maps: Callable[[Sorting], Maps] | None = None
    output: Callable[[Tensor], object] = field(default=lambda out: out)
    reason: str = ""
    by_name: bool = False  # a reason that counts only where nothing better is known of the module
    causal: Callable[[], bool] = field(default=lambda: False)


class Run(Protocol):
    """What the model would have run."""

    def __call__(self) -> object: ...


class Consumer(Protocol):
    """What is done with attention while the model runs: it is measured, or taken out of the way."""

    def __call__(self, name: str, sighting: Sighting, run: Run) -> object:
        """The output that the model goes on with."""
