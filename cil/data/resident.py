"""ImageSet: images that are resident in memory as uint8."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from cil.data.images import to_pil


@dataclass(frozen=True)
class ImageSet:
    """Resident images. images: uint8 [n, 3, H, W]; labels: int64 [n], original class numbers."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)"""
        height, width = self.images.shape[-2:]
        return height, width

    def batches(self, indices: Sequence[Tensor], seeds: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """uint8 [b, 3, H, W] for each index tensor [b]. seeds are for the crops of a FileSet, and change nothing here."""
        for batch in indices:
            yield self.images[batch]

    def with_labels(self, labels: Tensor) -> ImageSet:
        """The same images under other labels [n]."""
        return dataclasses.replace(self, labels=labels)

    def pictures(self) -> list[Image.Image]:
        """Every image, for Pillow."""
        return [to_pil(pixels) for pixels in self.images]
