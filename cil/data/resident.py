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

    def to(self, device: str) -> ImageSet:
        """The same with its images on a device, and its labels where they were."""
        return dataclasses.replace(self, images=self.images.to(device))

    def batches(self, indices: Sequence[Tensor], seeds: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """uint8 [b, 3, H, W] for each index tensor [b]. seeds are for the crops of a FileSet, and change nothing here."""
        for batch in indices:
            yield self.pixels(batch.to(self.images.device))

    def arrivals(self, indices: Sequence[Tensor], seeds: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """What of each batch a training step sends to the device: its indices [b], for the images are there."""
        yield from indices

    def pixels(self, arrived: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] of what `arrivals` gave, on the device of the images."""
        return self.images.index_select(0, arrived)

    def with_labels(self, labels: Tensor) -> ImageSet:
        """The same images under other labels [n]."""
        return dataclasses.replace(self, labels=labels)

    def pictures(self) -> list[Image.Image]:
        """Every image, for Pillow."""
        return [to_pil(pixels) for pixels in self.images]
