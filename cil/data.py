"""Image sets, resident as uint8: digits (embedded), cifar100 (three layouts), image folders."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm"}


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 [n, 3, H, W]; labels: int64 [n], original class numbers."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Dataset:
    """Training and test images of named classes; mean and std are those of the pixels in 0..1, a channel."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)"""
        return tuple(self.train.images.shape[-2:])


def load(name: str, data_dir: str | Path = "data", image_size: int = 0) -> Dataset:
    """The data set `digits`, `cifar100` or `folder:PATH`.

    image_size: pixels of the square that images of folders are cut to; 0 leaves them, and then they must be equal.
    Raises ValueError that says where files were looked for.
    """
    kind, _, path = name.partition(":")
    if kind not in DATASETS or (kind == "folder") != bool(path):
        raise ValueError(f"no data set {name!r}; there are: digits, cifar100, folder:PATH")
    dataset = DATASETS[kind](Path(path or data_dir), image_size)
    if image_size and dataset.image_size != (image_size, image_size):
        raise ValueError(f"image_size={image_size}, but the images of {name} are {dataset.image_size}; leave it at 0")
    return dataset


def digits(_: Path, __: int = 0) -> Dataset:
    """scikit-learn's 1797 scanned digits (UCI Optical Recognition of Handwritten Digits), 8x8, a quarter for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy((pixels.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(labels.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return _dataset(*(ImageSet(images[i], labels[i]) for i in (train, test)), [str(d) for d in range(10)])


def cifar100(root: Path, _: int = 0) -> Dataset:
    """CIFAR-100 from whichever of its layouts is in `root`: `cifar-100-python/`, `cifar100.npz` (or the npz itself), or
    image folders `train/<class>/`, `test/<class>/`. Fine labels in alphabetical order; the usual published mean, std."""
    npz = root if root.suffix == ".npz" else root / "cifar100.npz"
    if npz.is_file():
        train, test, classes = _npz(npz)
    elif (root / "cifar-100-python").is_dir():
        train, test, classes = _cifar_python(root)
    elif (root / "train").is_dir():
        folders = folder(root)
        train, test, classes = folders.train, folders.test, folders.classes
    else:
        raise ValueError(
            f"no CIFAR-100 in {root}: neither cifar-100-python/, cifar100.npz nor train/<class>/ is there; "
            "name its place with --data, or fetch it with `train --download`"
        )
    if len(classes) != 100:
        raise ValueError(f"{root} holds {len(classes)} classes, not the 100 of CIFAR-100; use folder:{root}")
    return Dataset(train, test, classes, CIFAR100_MEAN, CIFAR100_STD)


def download_cifar100(root: str | Path) -> None:
    """Fetch the standard files into `root` with torchvision. Raises ValueError when that fails."""
    from torchvision.datasets import CIFAR100

    try:
        CIFAR100(root, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"CIFAR-100 could not be downloaded to {root}: {error}") from None


def _cifar_python(root: Path) -> tuple[ImageSet, ImageSet, list[str]]:
    # These files are pickles. torchvision opens them only after their MD5 sums were those of the published archive.
    from torchvision.datasets import CIFAR100

    try:
        parts = [CIFAR100(root, train=train) for train in (True, False)]
    except RuntimeError:
        raise ValueError(
            f"the files in {root / 'cifar-100-python'} are not the published ones (MD5); fetch them anew"
        ) from None
    sets = [ImageSet(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts]
    return *sets, list(parts[0].classes)


def _npz(path: Path) -> tuple[ImageSet, ImageSet, list[str]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            sets = [(arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test")]
            classes = [str(c) for c in arrays["classes"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no npz with x_train, y_train, x_test, y_test, classes: {error}") from None
    for x, y in sets:
        if y.ndim != 1 or y.dtype.kind not in "iu" or not len(y) or y.min() < 0 or y.max() >= len(classes):
            raise ValueError(
                f"{path}: labels are {y.dtype} {y.shape}, not whole numbers [n] from 0 to {len(classes) - 1}"
            )
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or len(x) != len(y):
            raise ValueError(f"{path}: images are {x.dtype} {x.shape} with {len(y)} labels, not uint8 [n, H, W, 3]")
    return *(
        ImageSet(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64)))
        for x, y in sets
    ), classes


def folder(root: Path, image_size: int = 0) -> Dataset:
    """`train/<class>/*` and `test/<class>/*`: classes in sorted order, images in sorted order."""
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise ValueError(f"{root} does not hold train/<class>/ and test/<class>/")
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    strangers = sorted({p.name for p in (root / "test").iterdir() if p.is_dir()} - set(classes))
    if len(classes) < 2 or strangers:
        raise ValueError(f"{root}: {len(classes)} classes in train" + f", and test adds {strangers}" * bool(strangers))
    sets = []
    for split in ("train", "test"):
        files = [(f, n) for n, c in enumerate(classes) for f in image_files(root / split / c)]
        sets.append(ImageSet(read_images([f for f, _ in files], image_size), torch.tensor([n for _, n in files])))
    return _dataset(*sets, classes)


def image_files(root: Path) -> list[Path]:
    """Image files of a folder, sorted. Raises ValueError when there is none."""
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if root.is_dir() else []
    if not files:
        raise ValueError(f"no image files in {root}")
    return files


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
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise ValueError(f"no image {path}") from None
    except PermissionError:
        raise
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has more than the {2 * Image.MAX_IMAGE_PIXELS} pixels that Pillow opens") from None
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


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled (bicubic) to cover size = (H, W), and cut from the centre."""
    return ImageOps.fit(image, size[::-1], method=Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> uint8 [3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pil(pixels: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> an RGB image"""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _dataset(train: ImageSet, test: ImageSet, classes: list[str]) -> Dataset:
    pixels = train.images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return Dataset(train, test, classes, *(tuple(round(v, 4) for v in m.tolist()) for m in (mean, std)))


DATASETS: dict[str, Callable[[Path, int], Dataset]] = {"digits": digits, "cifar100": cifar100, "folder": folder}
