"""Images that come as patches already: a batch padded to the longest (SigLIP 2, NaFlex), or one after another (Qwen2-VL).

Their inputs say where each patch is, so that the experiment can let its noise grow along the rows and the columns of each
image as it does in a picture. Where the model's own tokens are is observed all the same: it may put them in another order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FLAT = ("grid_thw", "image_grid_thw")  # Qwen2-VL's: frames, rows and columns of each image, [images, 3]


@dataclass(frozen=True)
class Pack:
    """patches: the input, [B, N, ...], or if `flat` [N of all, ...]; places: of each image's patches, [n, 2] as row and column
    in parts of the image's sides, NaN for padding; grids: under the name of the input that gave them."""

    patches: Tensor
    places: list[Tensor]
    flat: bool
    name: str

    def __len__(self) -> int:
        return len(self.places)

    def image(self, row: int) -> Tensor:
        """The patches of one image, [n, ...]."""
        if not self.flat:
            return self.patches[row]
        return self.patches.split([len(places) for places in self.places])[row]


def pack_of(model: nn.Module, inputs: tuple, named: dict) -> Pack | None:
    """What the inputs hold of packed patches, or None.

    Raises ValueError for grids that are not those of the patches, and for a batch of several grids, whose maps are of one
    shape and mean different places.
    """
    for mapping in (named, *(x for x in inputs if isinstance(x, Mapping))):
        pixels = mapping.get("patches", mapping.get("pixel_values"))
        first = pixels if isinstance(pixels, Tensor) else next((x for x in inputs if isinstance(x, Tensor)), None)
        if first is None or not first.is_floating_point():
            continue
        if isinstance(places := mapping.get("patch_coord"), Tensor):
            valid = mapping.get("patch_valid", torch.ones(places.shape[:2], dtype=torch.bool))
            return _alike(Pack(first, [_parts(p, v) for p, v in zip(places, valid, strict=True)], False, "patch_coord"))
        if isinstance(shapes := mapping.get("spatial_shapes"), Tensor):
            padded = [_padded(shape, first.shape[1]) for shape in shapes.tolist()]
            return _alike(Pack(first, padded, False, "spatial_shapes"))
        for name in FLAT:
            if isinstance(shapes := mapping.get(name), Tensor):
                merged = _merged(model)
                found = Pack(first, [_merge_order(shape, merged) for shape in shapes.tolist()], True, name)
                if sum(map(len, found.places)) != len(first):
                    raise ValueError(f"{name} is of {sum(map(len, found.places))} patches, and there are {len(first)}")
                return found
    return None


def _alike(pack: Pack) -> Pack:
    if any(not torch.equal(places.nan_to_num(-1), pack.places[0].nan_to_num(-1)) for places in pack.places):
        raise ValueError(f"{pack.name} holds images of several grids: measure those of each grid by themselves")
    return pack


def _parts(places: Tensor, valid: Tensor) -> Tensor:
    """Whole-number rows and columns [n, 2] -> parts of the sides."""
    sides = places[valid].amax(0) + 1
    return ((places.double() + 0.5) / sides).masked_fill(~valid[:, None], math.nan).float()


def _padded(shape: list[int], length: int) -> Tensor:
    rows, columns = shape
    if rows * columns > length:
        raise ValueError(f"spatial_shapes has an image of {rows} x {columns} patches, and there are {length} of each")
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    valid = torch.arange(length) < rows * columns
    return _parts(torch.cat([places, torch.zeros(length - len(places), 2).long()]), valid)


def _merge_order(shape: list[int], merged: int) -> Tensor:
    """Patches of every frame in blocks of merged x merged, as Qwen2-VL's processor puts them."""
    frames, rows, columns = shape
    if rows % merged or columns % merged:
        raise ValueError(f"an image of {rows} x {columns} patches is not of whole blocks of {merged} x {merged}")
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    blocks = places.view(rows // merged, merged, columns // merged, merged, 2).transpose(1, 2).reshape(-1, 2)
    return _parts(blocks.repeat(frames, 1), torch.ones(frames * rows * columns, dtype=torch.bool))


def _merged(model: nn.Module) -> int:
    """How many patches on a side the model merges into one, as its config or its tower says."""
    config = getattr(model, "config", None)
    for holder in (model, config, getattr(config, "vision_config", None)):
        if isinstance(size := getattr(holder, "spatial_merge_size", None), int):
            return size
    return 1
