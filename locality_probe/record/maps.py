"""The attention of one layer, taken a few images or a block of queries at a time, so that it is never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from locality_probe.record.layer import Layer

CHUNK_BYTES = 64 * 2**20  # of attention in float32 that a measure sees at a time: whole images, at least one
BLOCK = 1_200_000  # numbers of attention at once where it is added up block by block: about a core's cache
BLOCK_OF_GPU = 16_777_216  # the same where launching a kernel costs more than what a cache saves: 64 MiB
WHOLE = 4_194_304  # numbers of attention up to which a head is shown at once to whoever asks for that: 16 MiB
BLOCK_ROWS = 128  # queries of a block, where all of them are too many


class Maps:
    """The attention of a layer in one forward pass, [B, H, Q, K], as part(images) -> float32 [b, H, Q, K]."""

    def __init__(self, part: Callable[[slice], Tensor], shape: tuple[int, ...], device: torch.device):
        self._part, self.shape, self.device = part, tuple(shape), device

    def part(self, images: slice) -> Tensor:
        return self._part(images)

    def visit(self, visitor: Visitor, whole: bool = False) -> None:
        """Show all of it, block by block: whole images at a time are made, a block of queries at a time is shown; `whole`:
        all queries of a head at once, unless they are very many."""
        batch, heads, queries, keys = self.shape
        step, rows = (
            max(1, block(self.device) // (heads * queries * keys)),
            rows_of_block(queries, keys, self.device, whole),
        )
        for images in slices(batch, step):
            attention = self.part(images)
            for some in slices(queries, rows):
                visitor(attention[:, :, some].contiguous(), images, slice(0, heads), some.start)


Visitor = Callable[[Tensor, slice, slice, int], None]  # attention [b, h, q, K], contiguous; images, heads, first query
Reader = Callable[[Layer, Maps], dict[str, Tensor]]  # -> values [B, ...]
Measure = Callable[[Tensor, Layer], dict[str, Tensor]]


def block(device: torch.device) -> int:
    """Numbers of attention at once on a device."""
    return BLOCK if device.type == "cpu" else BLOCK_OF_GPU


def rows_of_block(queries: int, keys: int, device: torch.device, whole: bool = False) -> int:
    """Queries of a block: all of them where their attention is small, else BLOCK_ROWS, or as many as a block has room for.

    whole: all of them unless they are very many, for whoever would have to see the blocks twice otherwise.
    """
    if queries * keys <= (WHOLE if whole else block(device) // 8):
        return queries
    return min(queries, max(BLOCK_ROWS, 0 if device.type == "cpu" else block(device) // keys))


def slices(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover range(length); the last may be shorter."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def wide(x: Tensor) -> Tensor:
    """Half precision -> float32"""
    return x.to(torch.promote_types(x.dtype, torch.float32))
