"""Image files: which files of a folder are images, how one is opened, how it is cut, and pixels as tensors."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from cil.files import regular

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
# What is not opened, whatever its name: their readers start another program (EPS: Ghostscript), or ask for one.
OTHER_PROGRAMS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "FITS", "MPEG"}
LONGEST = 100  # times its shorter side: what is farther from the middle of a strip, no crop shows


def passed_over(root: Path) -> dict[str, int]:
    """How many files of a folder `image_files` leaves out, by suffix; hidden ones and folders are not counted."""
    names = [entry.name for entry in os.scandir(root) if entry.is_file() and not entry.name.startswith(".")]
    suffixes = sorted(os.path.splitext(name)[1].lower() for name in names)
    return dict(Counter(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES))


def image_files(root: Path) -> list[Path]:
    """Image files of a folder, sorted. Raises ValueError when there is none."""
    # Names as plain strings: ImageNet has 130000, and a Path for each that is looked at, or a stat, takes its time.
    found = os.listdir(root) if root.is_dir() else []
    suffixed = (name for name in found if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
    files = sorted(name for name in suffixed if not name.startswith("."))  # hidden ones are the system's own
    if not files:
        raise ValueError(f"no image files in {root}")
    return [root / name for name in files]


def read_images(files: list[Path], image_size: int = 0) -> Tensor:
    """Image files -> uint8 [n, 3, H, W], cut to squares of image_size, or left as they are for 0.

    Raises ValueError naming a file that is no image, or two that differ in size.
    """
    images = [open_image(f) for f in files]
    if image_size:
        images = [cover(image, (image_size, image_size)) for image in images]
    odd = next((i for i, image in enumerate(images) if image.size != images[0].size), None)
    if odd is not None:
        sizes = [f"{files[i].name} {images[i].width}x{images[i].height}" for i in (0, odd)]
        raise ValueError(f"images differ in size ({sizes[0]}, {sizes[1]}): set image_size")
    return torch.stack([to_tensor(image) for image in images])


def open_image(path: Path) -> Image.Image:
    """An upright RGB image. Raises ValueError when Pillow cannot read it."""
    if not Path(path).exists():
        raise ValueError(f"no image {path}")
    try:
        Image.init()
        with Image.open(regular(path), formats=[name for name in Image.ID if name not in OTHER_PROGRAMS]) as opened:
            opened.load()
            try:
                image = ImageOps.exif_transpose(opened)
            except Exception:  # notes in the file that cannot be read leave the picture as it is stored
                image = opened.copy()
    except PermissionError:
        raise
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path} has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels that Pillow opens"
        ) from None
    except Exception:  # Pillow's decoders raise a different class for each way in which a file is torn
        raise ValueError(f"{path} is not an image that Pillow can read") from None
    if image.mode[0] in "IF":  # one channel of more than 8 bits, which Pillow would clip at 255
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{path} has pixels of 32 bits, whose range cannot be told; save it with 8 or 16 bits")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.mode == "P":  # straight to RGB, Pillow warns about a transparent palette
        image = image.convert("RGBA")
    return image.convert("RGB")


def trimmed(image: Image.Image) -> Image.Image:
    """The middle of a strip, LONGEST times as long as it is wide: to scale all of it would take gigabytes."""
    shorter = min(image.size)
    width, height = (min(side, LONGEST * shorter) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled (bicubic) to cover size = (H, W), and cut from the centre."""
    return ImageOps.fit(image, size[::-1], method=Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """ImageNet's test transform to size = (H, W): the shorter side scaled (bicubic) to 256/224 of it, the centre cut."""
    shorter = round(max(size) * 256 / 224)
    return functional.center_crop(functional.resize(image, [shorter], InterpolationMode.BICUBIC), list(size))


def random_crop(image: Image.Image, size: tuple[int, int], seed: int) -> Image.Image:
    """ImageNet's training crop: torchvision's RandomResizedCrop(size = (H, W), bicubic) as `seed` alone draws it."""
    # Neither all devices' generators, which a forked process may not touch, nor the caller's: it comes back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        box = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
    return functional.resized_crop(image, *box, list(size), InterpolationMode.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> uint8 [3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pil(pixels: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> an RGB image"""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
