"""The attention of one layer, taken a few images or a block of queries at a time, so that it is never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from locality_probe.record.layer import Layer

CHUNK_BYTES = 64 * 2**20  # of attention in float32 that a measure sees at a time: whole images, at least one
BLOCK = 1_200_000  # numbers of attention at once where it is added up block by block: about a core's cache
BLOCK_ROWS = 128  # queries of a block, where all of them are too many


class Maps:
    """The attention of a layer in one forward pass, [B, H, Q, K], as part(images) -> float32 [b, H, Q, K]."""

    def __init__(self, part: Callable[[slice], Tensor], shape: tuple[int, ...]):
        self._part, self.shape = part, tuple(shape)

    def part(self, images: slice) -> Tensor:
        return self._part(images)

    def visit(self, visitor: Visitor) -> None:
        """Show all of it, block by block: whole images at a time are made, a block of queries at a time is shown."""
        batch, heads, queries, keys = self.shape
        step, rows = max(1, BLOCK // (heads * queries * keys)), rows_of_block(queries, keys)
        for images in slices(batch, step):
            attention = self.part(images)
            for some in slices(queries, rows):
                visitor(attention[:, :, some].contiguous(), images, slice(0, heads), some.start)


Visitor = Callable[[Tensor, slice, slice, int], None]  # attention [b, h, q, K], contiguous; images, heads, first query
Reader = Callable[[Layer, Maps], dict[str, Tensor]]  # -> values [B, ...]
Measure = Callable[[Tensor, Layer], dict[str, Tensor]]


def rows_of_block(queries: int, keys: int) -> int:
    """Queries of a block: all of them where their attention is small, else BLOCK_ROWS."""
    return queries if queries * keys <= BLOCK // 8 else min(queries, BLOCK_ROWS)


def slices(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover range(length); the last may be shorter."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def wide(x: Tensor) -> Tensor:
    """Half precision -> float32"""
    return x.to(torch.promote_types(x.dtype, torch.float32))
