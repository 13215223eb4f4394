"""Data sets by name: DATASETS holds all that is to be said of each, `load` gives its images."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cil.data.decoded import FileSet
from cil.data.images import centre_crop, cover, image_files, read_images
from cil.data.resident import ImageSet

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Dataset:
    """Training and test images of named classes; mean and std are those of the pixels in 0..1, a channel."""

    train: ImageSet | FileSet
    test: ImageSet | FileSet
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)"""
        return self.train.image_size

    def to(self, device: str) -> Dataset:
        """The same with resident images on a device; labels stay where they are."""
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))


Crop = Callable[[Image.Image, tuple[int, int]], Image.Image]  # a picture of any size, (H, W) -> a picture of that size


@dataclass(frozen=True)
class Source:
    """A data set, and all that is to be said of it.

    load: (folder, image_size) -> its images. crop: how its test images are cut. how_to_get: words for whoever lacks its
    files; empty where nothing is to be fetched. nominal: the published numbers of training and test images of a class and
    the pixels of a side, to plan without the files; None where the files are always there.
    """

    load: Callable[[Path, int], Dataset]
    crop: Crop = cover
    how_to_get: str = ""
    nominal: tuple[int, int, int] | None = None


def load(name: str, data_dir: str | Path = "data", image_size: int = 0) -> Dataset:
    """The data set `digits`, `cifar100`, `imagenet100` or `folder:PATH`.

    image_size: pixels of the square that images of folders are cut to; 0 leaves them, and then they must be equal, or is
    the 224 of imagenet100.
    Raises ValueError that says where files were looked for.
    """
    kind, _, path = name.partition(":")
    if kind not in DATASETS or (kind == "folder") != bool(path):
        raise ValueError(f"no data set {name!r}; there are: {names()}")
    dataset = DATASETS[kind].load(Path(path or data_dir), image_size)
    if image_size and dataset.image_size != (image_size, image_size):
        raise ValueError(f"image_size={image_size}, but the images of {name} are {dataset.image_size}; leave it at 0")
    return dataset


def names() -> str:
    """The data sets, as `load` takes them."""
    return ", ".join("folder:PATH" if name == "folder" else name for name in DATASETS)


def digits(_: Path, __: int = 0) -> Dataset:
    """scikit-learn's 1797 scanned digits (UCI Optical Recognition of Handwritten Digits), 8x8, a quarter for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy((pixels.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(labels.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    sets = [ImageSet(images[i], labels[i]) for i in (train, test)]
    return _dataset(sets[0], sets[1], [str(d) for d in range(10)])


def cifar100(root: Path, _: int = 0) -> Dataset:
    """CIFAR-100 from whichever of its layouts is in `root`: `cifar-100-python/`, `cifar100.npz` (or the npz itself), or
    image folders `train/<class>/`, `test/<class>/`. Fine labels in alphabetical order; the usual published mean, std."""
    train: ImageSet | FileSet
    test: ImageSet | FileSet
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
    train, test = (
        ImageSet(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts
    )
    return train, test, list(parts[0].classes)


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
    train, test = (
        ImageSet(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64)))
        for x, y in sets
    )
    return train, test, classes


def imagenet100(root: Path, image_size: int = 0) -> Dataset:
    """The first 100 synsets, in sorted order, of ImageNet's standard layout: `train/<wnid>/*` and `val/<wnid>/*`.

    Folders that are not named like a synset are passed over, and so are synsets after the hundredth; fewer than 100 are
    taken as they are. image_size 0 means 224. Raises ValueError naming what is missing.
    """
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if missing:
        raise ValueError(f"no ImageNet in {root}: there is no {missing[0]}/<wnid>/; name its place with --data")
    classes = sorted(f.name for f in os.scandir(root / "train") if re.fullmatch(r"n\d{8}", f.name) and f.is_dir())[:100]
    if len(classes) < 2:
        raise ValueError(f"{root / 'train'} holds {len(classes)} folders named like the synset n01440764, not 100")
    size = (image_size or 224,) * 2
    train, test = (_file_set([root / split / c for c in classes], size) for split in ("train", "val"))
    return Dataset(train, test, classes, IMAGENET_MEAN, IMAGENET_STD)


def _file_set(folders: list[Path], size: tuple[int, int]) -> FileSet:
    """The image files of each class's folder; labels are places in `folders`."""
    files = [image_files(folder) for folder in folders]
    labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(f) for f in files]))
    return FileSet(list(itertools.chain(*files)), labels, size)


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
    return _dataset(sets[0], sets[1], classes)


def _dataset(train: ImageSet, test: ImageSet, classes: list[str]) -> Dataset:
    pixels = train.images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return Dataset(train, test, classes, *(tuple(round(v, 4) for v in m.tolist()) for m in (mean, std)))


def crop_for(name: str) -> Crop:
    """How a picture of any size is cut to (H, W) for a network trained on the data set `name`: as its test images are."""
    kind = name.partition(":")[0]
    return DATASETS[kind].crop if kind in DATASETS else cover


DATASETS: dict[str, Source] = {
    "digits": Source(digits),
    "cifar100": Source(
        cifar100,
        how_to_get="CIFAR-100: name its folder with --data, or fetch it: locality-probe train small-b10-10-baseline "
        "--data data --download",
        nominal=(500, 100, 32),
    ),
    "imagenet100": Source(
        imagenet100,
        crop=centre_crop,
        how_to_get="ImageNet-100: the first 100 synsets of ILSVRC-2012 as train/<wnid>/ and val/<wnid>/, from "
        "image-net.org; name their folder with --data",
        nominal=(1300, 50, 224),
    ),
    "folder": Source(folder),
}
