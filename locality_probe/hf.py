"""How a HuggingFace model wants its images: what its processor's configuration says, and what is done where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms import InterpolationMode, functional

from cil import data
from cil.files import read_json

SIZE = 224  # pixels, where neither the model nor its processor says
RESAMPLE = {
    0: InterpolationMode.NEAREST, 1: InterpolationMode.LANCZOS, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC,
    4: InterpolationMode.BOX, 5: InterpolationMode.HAMMING,
}  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """crop: a Pillow image -> what the network sees of it; mean, std: of pixels from 0 to 1; notes: sentences for the user."""

    crop: Callable[[Image.Image], Image.Image]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()


def preprocessing(folder: Path, config: Any) -> Preprocessing:
    """As processor_config.json (its image_processor) or preprocessor_config.json in the folder says, and config.image_size.

    Raises ValueError for a configuration that is no JSON, or has a size that is none.
    """
    settings, file = _settings(folder)
    own = getattr(config, "image_size", None)
    notes = []
    if file is None:
        size = _sides(own) or (SIZE, SIZE)
        notes.append(
            f"{folder.name} has no preprocessor_config.json: images are scaled to {size[0]} x {size[1]} and normalised with "
            "ImageNet's mean and standard deviation"
        )
        return Preprocessing(lambda image: data.cover(image, size), data.IMAGENET_MEAN, data.IMAGENET_STD, tuple(notes))
    mode = RESAMPLE.get(settings.get("resample", 3), InterpolationMode.BICUBIC)
    shortest, sides = _size(settings.get("size"), folder)
    crop = _size(settings.get("crop_size"), folder)[1] if settings.get("do_center_crop") else None
    wanted = crop or sides or _sides(own) or ((shortest, shortest) if shortest else (SIZE, SIZE))

    def cut(image: Image.Image) -> Image.Image:
        if settings.get("do_resize", True):
            image = functional.resize(data.trimmed(image), [shortest] if shortest else list(sides or wanted), mode)
        return (
            functional.center_crop(image, list(crop))
            if crop
            else image
            if image.size == wanted[::-1]
            else data.cover(image, wanted)
        )

    # (255 f x - mean) / std of pixels x from 0 to 1, f being the factor by which 0..255 is scaled
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    normalised = settings.get("do_normalize", True)
    mean = settings.get("image_mean", data.IMAGENET_MEAN) if normalised else (0.0,) * 3
    std = settings.get("image_std", data.IMAGENET_STD) if normalised else (1.0,) * 3
    for name, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, (list, tuple)) or not all(
            isinstance(v, (int, float)) and math.isfinite(v) for v in values
        ):
            raise ValueError(f"{file or folder} has an {name} of {values}: three numbers are wanted")
    if min(std) <= 0:
        raise ValueError(f"{file or folder} has an image_std of {std}: numbers above 0 are wanted")
    return Preprocessing(cut, tuple(m / scale for m in mean), tuple(s / scale for s in std), tuple(notes))


def _settings(folder: Path) -> tuple[dict[str, Any], Path | None]:
    """The image processor's settings, and the file that they are from."""
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if not file.is_file():
            continue
        found = read_json(file)
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds no settings of an image processor")
        found = found.get("image_processor", found)
        if isinstance(found, dict) and ({"size", "image_mean", "image_std", "do_normalize", "do_resize"} & set(found)):
            return found, file
    return {}, None


def _size(value: Any, folder: Path) -> tuple[int | None, tuple[int, int] | None]:
    """Of a size in a configuration: the shortest edge, or (height, width)."""
    if value is None:
        return None, None
    if isinstance(value, dict):
        if "shortest_edge" in value:
            return int(value["shortest_edge"]), None
        value = (value.get("height"), value.get("width"))
    sides = _sides(value)
    if sides is None:
        raise ValueError(
            f"{folder} has an image size of {value}: a number, height and width, or shortest_edge is wanted"
        )
    return None, sides


def _sides(value: Any) -> tuple[int, int] | None:
    sides = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    return sides if len(sides) == 2 and all(isinstance(s, int) and 0 < s < 10_000 for s in sides) else None
