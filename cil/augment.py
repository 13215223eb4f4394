"""Training augmentation for batches of small images, vectorised over the batch: pure functions of images and parameters.

Images are uint8 tensors [B, C, H, W] on any device; every image gets parameters of its own, and nothing loops over
images. The distribution is that of the per-image pipeline which timm 1.0, torchvision and Pillow build for CIFAR-100:
random crop, horizontal flip, RandAugment, normalisation, mixup. Each RandAugment operation reproduces Pillow's pixels:
its rounding, its bicubic kernel, its treatment of the border.

Nothing is drawn here: parameters come from cil.draws, as tensors on the images' device. Arithmetic on pixels is float32 or
integer. No function changes its input. Images of another type raise TypeError, of another number of dimensions ValueError.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FILL = (124, 116, 104)  # the ImageNet mean


def crop(images: Tensor, offset: Tensor, padding: int) -> Tensor:
    """Shift each image, black where nothing was: uint8 [B, C, H, W] to same.

    offset: int64 [2, B], rows and columns, 0 to 2 padding; `padding` leaves an image where it is. As torchvision's
    RandomCrop((H, W), padding) cuts. ValueError for padding < 0.
    """
    _, _, h, w = _check_images(images)
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")
    rows, cols = (offset[axis][:, None] + torch.arange(side, device=images.device) for axis, side in enumerate((h, w)))
    index = rows[:, :, None] * (w + 2 * padding) + cols[:, None, :]
    return _take(F.pad(images, (padding,) * 4), index)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left to right the images where `mirrored`, bool [B], holds: uint8 [B, C, H, W] to same."""
    _check_images(images)
    return torch.where(_per_image(mirrored), images.flip(3), images)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std by channel, as torchvision's ToTensor and Normalize: uint8 to float32 [B, C, H, W].

    mean, std: C numbers each, for pixels in [0, 1]; ValueError if there are not C of them.
    """
    c = _check_images(images)[1]
    if len(mean) != c or len(std) != c:
        raise ValueError(f"mean and std need {c} numbers each, got {len(mean)} and {len(std)}")
    shift, scale = (_constant(tuple(255 * float(v) for v in values), str(images.device)) for values in (mean, std))
    return images.float().sub_(shift).div_(scale)


def make_constants(mean: Sequence[float], std: Sequence[float], device: str) -> None:
    """Bring what `normalize` and `rand_augment` need to a device before the first step, which then waits for nothing."""
    for values in ((255 * float(v) for v in mean), (255 * float(v) for v in std), map(float, FILL)):
        _constant(tuple(values), device)


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: str) -> Tensor:
    """float32 [C, 1, 1], made once: on a GPU each making is a copy that the host waits for."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def mixup(
    images: Tensor, labels: Tensor, num_classes: int, lam: float | Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Blend the batch with itself in reverse order: `lam` of an image and 1 - lam of its partner; None blends nothing.

    images: float [B, C, H, W]; labels: int64 [B] in [0, num_classes), others make torch's scatter fail. Returns images
    of the same type and soft targets, float32 [B, num_classes]. smoothing, in [0, 1), is the part of a label spread evenly
    over all classes, without blending too. TypeError if the images are not float, ValueError if there are not B labels or
    a number is out of range. Source: mixup, arXiv 1710.09412, as timm's Mixup(mode="batch", prob=1, cutmix_alpha=0), but B
    may be odd; the middle image is then its own partner.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, got {images.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need that many labels, got {tuple(labels.shape)}")
    # A tensor on a GPU is not looked at: the host would wait for it.
    if not ((lam is None or isinstance(lam, Tensor) or 0 <= lam <= 1) and 0 <= smoothing < 1):
        raise ValueError(f"lam must be in [0, 1] or None, and smoothing in [0, 1), got {lam} and {smoothing}")
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + off)
    if lam is None:
        return images, targets
    return torch.lerp(images.flip(0), images, lam), torch.lerp(targets.flip(0), targets, lam)


class Operations(NamedTuple):
    """What RandAugment does to n images, layer after layer; an operation has k places, and not all need be taken."""

    rows: Tensor  # int64 [layers, 15, k], the image in each place of each of APPLY's operations; anyone where none is
    argument: Tensor  # float32 [layers, 15, k], what the operation is given: degrees, a factor, bits, ...
    source: Tensor  # int64 [layers, n], an image's place after the layer: i as it was, or n + operation * k + place


def rand_augment(images: Tensor, operations: Operations, fill: Sequence[float] = FILL) -> Tensor:
    """Apply the operations of each layer in turn, an image being in one operation of a layer or in none: uint8 to uint8.

    fill: red, green, blue in [0, 255] for ground that a rotation, shear or shift uncovers; default the ImageNet mean.
    ValueError if images or `fill` have not 3 channels. Source: RandAugment, arXiv 1909.13719, as timm's auto_augment
    (operations, ranges) and Pillow (pixels) have it.
    """
    c = _check_images(images)[1]
    if c != 3 or len(fill) != 3:
        raise ValueError(f"images and fill need 3 channels, got {c} and {len(fill)}")
    ground = _constant(tuple(map(float, fill)), str(images.device)).flatten()
    for rows, argument, source in zip(*operations, strict=True):
        changed = [apply(images[r], a, ground) for apply, r, a in zip(APPLY.values(), rows, argument, strict=True)]
        images = torch.cat([images, *changed]).index_select(0, source)
    return images


class RandAugment(NamedTuple):
    """A RandAugment spec, parsed."""

    magnitude: float  # of 10
    std: float  # its standard deviation
    increasing: bool  # whether all operations grow stronger with it
    layers: int  # operations an image, each skipped with probability 1/2


def parse(spec: str) -> RandAugment:
    """ "rand", then any of these after dashes: m<float> magnitude out of 10 (default 10), mstd<float> its standard deviation
    (0), inc<0|1> whether all operations grow stronger with it (0), n<int> (2); "rand-m9-mstd0.5-inc1", say.

    ValueError, naming it, for an unknown part.
    """
    name, *parts = spec.split("-")
    if name != "rand":
        raise ValueError(f"RandAugment spec {spec!r} must begin with 'rand', not {name!r}")
    values = {"m": 10.0, "mstd": 0.0, "inc": 0.0, "n": 2.0}
    for part in parts:
        match = re.fullmatch(r"(?:(m|mstd)(\d+\.?\d*)|(inc)([01])|(n)([1-9]\d*))", part)
        if not match:
            raise ValueError(f"unknown part {part!r} in RandAugment spec {spec!r}")
        key, value = filter(None, match.groups())
        values[key] = float(value)
    if values["mstd"] > 100:  # timm's code for "uniform": refused rather than read as a plain number
        raise ValueError(f"mstd above 100 is not supported in RandAugment spec {spec!r}")
    return RandAugment(values["m"], values["mstd"], values["inc"] == 1, int(values["n"]))


# Takes images uint8 [n, 3, H, W], one argument an image float32 [n], ground colour float32 [3]; returns uint8.
_Apply = Callable[[Tensor, Tensor, Tensor], Tensor]
# Takes level / 10 in [0, 1] and sign -1 or 1, float64 [n] each; returns the operation's argument [n].
_ToArgument = Callable[[Tensor, Tensor], Tensor]


def arguments(increasing: bool) -> dict[str, _ToArgument]:
    """The range of each of timm's 15 operations, in its order: level / 10 and sign -> argument."""

    def unused(level: Tensor, sign: Tensor) -> Tensor:
        return level

    def enhance(level: Tensor, sign: Tensor) -> Tensor:  # factor 1 changes nothing
        return (1 + sign * (level * 0.9)).clamp(min=0.1) if increasing else level * 1.8 + 0.1

    def bits(level: Tensor, sign: Tensor) -> Tensor:
        return 4 - (level * 4).floor() if increasing else (level * 4).floor()

    def threshold(level: Tensor, sign: Tensor) -> Tensor:
        return 256 - (level * 256).floor() if increasing else (level * 256).floor()

    def up_to(limit: float) -> _ToArgument:
        return lambda level, sign: sign * (level * limit)

    return {
        "AutoContrast": unused,
        "Equalize": unused,
        "Invert": unused,
        "Rotate": up_to(30.0),  # degrees
        "Posterize": bits,
        "Solarize": threshold,
        "SolarizeAdd": lambda level, sign: (level * 110).floor(),
        "Color": enhance,
        "Contrast": enhance,
        "Brightness": enhance,
        "Sharpness": enhance,
        "ShearX": up_to(0.3),
        "ShearY": up_to(0.3),
        "TranslateX": up_to(0.45),  # part of the width
        "TranslateY": up_to(0.45),
    }


# Operations on grey levels


def _posterize(images: Tensor, bits: Tensor, ground: Tensor) -> Tensor:
    mask = (256 - 2 ** (8 - bits)).to(torch.uint8)
    return images & _per_image(mask)


def _solarize(images: Tensor, threshold: Tensor, ground: Tensor) -> Tensor:
    return torch.where(images < _per_image(threshold), images, 255 - images)


def _solarize_add(images: Tensor, add: Tensor, ground: Tensor) -> Tensor:
    return torch.where(images < 128, images + _per_image(add.to(torch.uint8)), images)  # at most 127 + 110


def _auto_contrast(images: Tensor, _: Tensor, ground: Tensor) -> Tensor:
    """Stretch each channel to 0..255. Pillow's float64 comes out 1 lower at 0.4 % of all (low, high, level)."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low).int() * 255 // (high - low).int().clamp(min=1)
    return torch.where(high > low, stretched.to(torch.uint8), images)


def _equalize(images: Tensor, _: Tensor, ground: Tensor) -> Tensor:
    """Flatten each channel's histogram: a level becomes its share of the darker pixels, in Pillow's integer steps."""
    levels = images.flatten(2).long()
    count = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    brightest = count.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    table = (step // 2 + count.cumsum(2) - count) // step.clamp(min=1)
    equalized = table.clamp(max=255).gather(2, levels).to(torch.uint8).view_as(images)
    return torch.where(step[..., None] > 0, equalized, images)  # too few pixels to tell: as it was


# Enhancements: a blend of the image with a degenerate of it


def _color(images: Tensor, factor: Tensor, ground: Tensor) -> Tensor:
    return _blend(_grey(images), images, factor)


def _contrast(images: Tensor, factor: Tensor, ground: Tensor) -> Tensor:
    grey = _grey(images)
    pixels = grey.shape[2] * grey.shape[3]
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)  # rounded half up
    return _blend(mean, images, factor)


def _brightness(images: Tensor, factor: Tensor, ground: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, factor)


def _sharpness(images: Tensor, factor: Tensor, ground: Tensor) -> Tensor:
    x = images.float()
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = x.clone()  # Pillow leaves the outermost pixels as they are
    smooth[..., 1:-1, 1:-1] = ((box + 4 * x[..., 1:-1, 1:-1]) / 13 + 0.5).floor()  # kernel 1 1 1, 1 5 1, 1 1 1
    return _blend(smooth, images, factor)


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend: cut off, not rounded. Multiplied and added apart, since a fused step would round otherwise."""
    start = degenerate.float()
    return (images.float() - start).mul_(_per_image(factor)).add_(start).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Pillow's integer luma (ITU-R 601), int32 [n, 1, H, W]."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


# Affine maps. A pixel's centre is at + 0.5; a map goes from output to input, and gives ground outside the input.


def _shear_x(images: Tensor, factor: Tensor, ground: Tensor) -> Tensor:
    y = torch.arange(images.shape[2], device=images.device) + 0.5
    return _shift_rows(images, factor[:, None] * y, ground)


def _translate_x(images: Tensor, part: Tensor, ground: Tensor) -> Tensor:
    shift = part[:, None] * images.shape[3]
    return _shift_rows(images, shift.expand(-1, images.shape[2]), ground)


def _vertically(apply: _Apply) -> _Apply:
    return lambda images, *rest: apply(images.transpose(2, 3), *rest).transpose(2, 3)


def _shift_rows(images: Tensor, shift: Tensor, ground: Tensor) -> Tensor:
    """Output (y, x) is input (y, x + shift[y]), shift [n, H] in pixels: 4 taps, where a general map takes 16."""
    w = images.shape[3]
    whole = shift.floor()
    taps = torch.arange(-1, w + 2, device=images.device)
    cols = (whole.long()[..., None] + taps).clamp(0, w - 1)
    wide = images.gather(3, cols[:, None].expand(-1, 3, -1, -1)).float()
    value = _cubic([wide[..., tap : tap + w] for tap in range(4)], (shift - whole)[:, None, :, None])
    centre = shift[..., None] + (taps[1:-2] + 0.5)
    return _on_ground(value, (centre >= 0) & (centre < w), ground)


def _rotate(images: Tensor, degrees: Tensor, ground: Tensor) -> Tensor:
    """Counter-clockwise about the middle of the image."""
    h, w = images.shape[2:]
    angle = degrees.deg2rad()[:, None, None]
    x = torch.arange(w, device=images.device) + (0.5 - w / 2)
    y = torch.arange(h, device=images.device)[:, None] + (0.5 - h / 2)
    from_x = angle.cos() * x - angle.sin() * y + w / 2
    from_y = angle.sin() * x + angle.cos() * y + h / 2
    left, top = (from_x - 0.5).floor(), (from_y - 0.5).floor()
    taps = torch.arange(-1, 3, device=images.device)[:, None, None]
    cols = (left.long()[:, None] + taps).clamp(0, w - 1)
    rows = (top.long()[:, None] + taps).clamp(0, h - 1)
    near = _take(images, rows[:, :, None] * w + cols[:, None]).float()  # [n, 3, 4 rows, 4 cols, H, W]
    across = _cubic(near.unbind(3), (from_x - 0.5 - left)[:, None, None])
    value = _cubic(across.unbind(2), (from_y - 0.5 - top)[:, None])
    inside = (from_x >= 0) & (from_x < w) & (from_y >= 0) & (from_y < h)
    return _on_ground(value, inside, ground)


def _cubic(taps: Sequence[Tensor], t: Tensor) -> Tensor:
    """Value at t in [0, 1) between taps[1] and taps[2], by the cubic kernel of Pillow's transforms (a = -1).

    Written in differences, so that flat areas and t = 0 come out exact: the result is cut off to an integer, and an
    error of one part in a million would cost a whole grey level there.
    """
    a, b, c, d = taps
    cubed = b - a + d - c
    squared = a - b - cubed
    return b + t * (c - a + t * (squared + t * cubed))


def _on_ground(value: Tensor, inside: Tensor, ground: Tensor) -> Tensor:
    return torch.where(inside[:, None], value.clamp_(0, 255), ground[:, None, None]).to(torch.uint8)


# What RandAugment chooses from, in timm's order.
APPLY: dict[str, _Apply] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": lambda images, *_: 255 - images,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _vertically(_shear_x),
    "TranslateX": _translate_x,
    "TranslateY": _vertically(_translate_x),
}


# Shapes


def _check_images(images: Tensor) -> torch.Size:
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got {tuple(images.shape)}")
    return images.shape


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _take(images: Tensor, index: Tensor) -> Tensor:
    """Pixels of images [n, c, H, W] at index [n, ...] = row * W + column, the same in all channels: [n, c, ...]."""
    n, c = images.shape[:2]
    flat = index.flatten(1)[:, None].expand(-1, c, -1)
    return images.flatten(2).gather(2, flat).view(n, c, *index.shape[1:])
