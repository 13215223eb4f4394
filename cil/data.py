"""Image sets. Resident as uint8: digits (embedded), cifar100 (three layouts), image folders. Decoded when asked for:
imagenet100."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm"}
PIECE = 16  # images that a worker decodes in one go: all workers share the first batch, and stopping is quick


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
        return tuple(self.images.shape[-2:])

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


@dataclass(frozen=True)
class FileSet:
    """Images that are decoded when asked for. labels: int64 [n], original class numbers; image_size: (H, W) as seen.

    workers: processes that decode; None: one for each core that this process may use, none for a few images.
    """

    files: list[Path]
    labels: Tensor
    image_size: tuple[int, int]
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, indices: Sequence[Tensor], seeds: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """uint8 [b, 3, H, W] for each index tensor [b], in order, decoded by workers about two batches ahead.

        seeds: int64 [b] each, of which torch uses the low 32 bits. With them images are cut by `random_crop`, each by its
        own seed alone, so that the pixels depend neither on workers nor on batches; without them by `centre_crop`.
        Closing the iterator ends the workers. Raises ValueError naming a file that is no image, PermissionError, and
        ChildProcessError when a worker is killed.
        """
        crops = [None] * len(indices) if seeds is None else seeds
        batches = [_pieces(*batch) for batch in zip(indices, crops, strict=True)]
        decoded = _decoded(self, [piece for batch in batches for piece in batch], max(map(len, batches), default=0))
        for batch in batches:
            yield torch.cat(list(itertools.islice(decoded, len(batch))))

    def decode(self, places: list[int], seeds: list[int] | None) -> Tensor:
        """Here and now: uint8 [k, 3, H, W] of the images at `places`, as `batches` cuts them."""
        pixels = torch.empty(len(places), 3, *self.image_size, dtype=torch.uint8)
        for n, place in enumerate(places):
            image, size = open_image(self.files[place]), self.image_size
            pixels[n] = to_tensor(centre_crop(image, size) if seeds is None else random_crop(image, size, seeds[n]))
        return pixels

    def with_labels(self, labels: Tensor) -> FileSet:
        """The same files under other labels [n]."""
        return dataclasses.replace(self, labels=labels)

    def pictures(self) -> list[Path]:
        """Every image's file."""
        return self.files


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


def load(name: str, data_dir: str | Path = "data", image_size: int = 0) -> Dataset:
    """The data set `digits`, `cifar100`, `imagenet100` or `folder:PATH`.

    image_size: pixels of the square that images of folders are cut to; 0 leaves them, and then they must be equal, or is
    the 224 of imagenet100.
    Raises ValueError that says where files were looked for.
    """
    kind, _, path = name.partition(":")
    if kind not in DATASETS or (kind == "folder") != bool(path):
        raise ValueError(f"no data set {name!r}; there are: {names()}")
    dataset = DATASETS[kind](Path(path or data_dir), image_size)
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
    return _dataset(*sets, classes)


def image_files(root: Path) -> list[Path]:
    """Image files of a folder, sorted. Raises ValueError when there is none."""
    # Names as plain strings: ImageNet has 130000, and a Path for each that is looked at, or a stat, takes its time.
    found = os.listdir(root) if root.is_dir() else []
    files = sorted(name for name in found if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
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


def crop_for(name: str) -> Callable[[Image.Image, tuple[int, int]], Image.Image]:
    """How a picture of any size is cut to (H, W) for a network trained on the data set `name`: as its test images are."""
    return {"imagenet100": centre_crop}.get(name, cover)


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


_Piece = tuple[list[int], list[int] | None]  # places [k] in a FileSet, and their seeds or None


def _pieces(places: Tensor, seeds: Tensor | None) -> list[_Piece]:
    """A batch [b] in pieces of PIECE; one empty piece for an empty batch. Raises ValueError unless there are b seeds."""
    if seeds is None:
        return [(part.tolist(), None) for part in places.split(PIECE)]
    if seeds.shape != places.shape:
        raise ValueError(f"{len(places)} images need that many seeds, got {tuple(seeds.shape)}")
    return [(p.tolist(), s.tolist()) for p, s in zip(places.split(PIECE), seeds.split(PIECE), strict=True)]


class _Decoder:
    """What a DataLoader asks for a piece. An error comes back as a value: raised, it would be wrapped in a traceback."""

    def __init__(self, files: FileSet):
        self.files = files

    def __getitem__(self, piece: _Piece) -> Tensor | Exception:
        try:
            return self.files.decode(*piece)
        except (ValueError, OSError) as error:
            return error


def _decoded(files: FileSet, pieces: list[_Piece], a_batch: int) -> Iterator[Tensor]:
    """Each piece's images uint8 [k, 3, H, W], in order; about two batches of `a_batch` pieces are decoded ahead."""
    workers = files.workers
    if workers is None:
        workers = min(_cores(), len(pieces)) if len(pieces) >= 4 else 0  # to start them takes as long as a piece or two
    options = {}
    if workers:
        options["prefetch_factor"] = max(2, -(-2 * a_batch // workers))
        if sys.platform == "linux":  # Python's newer ways to start a process import torch anew in each, every epoch
            options["multiprocessing_context"] = "fork"
    # With a generator of its own a DataLoader leaves torch's alone.
    loader = DataLoader(
        _Decoder(files), sampler=pieces, batch_size=None, num_workers=workers, generator=torch.Generator(), **options
    )
    arriving = None
    try:
        # Ctrl-C waits, and the workers, who inherit that, never see one: what it means is for this process to say.
        with _held(signal.SIGINT):
            arriving = iter(loader)
        while (piece := _next(arriving)) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        # What torch does when it drops the iterator, but now: a traceback may hold that for long. When a worker was
        # killed, torch raises that again as each of the others ends, and would leave some behind.
        with _held(signal.SIGCHLD):
            getattr(arriving, "_shutdown_workers", lambda: None)()


def _next(arriving: Iterator[Tensor | Exception]) -> Tensor | Exception | None:
    """The next piece, or None after the last. Raises ChildProcessError when the workers do not bring it."""
    try:
        return next(arriving, None)
    except (RuntimeError, EOFError, OSError) as error:  # according to what the worker was at when it was killed
        reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
        raise ChildProcessError(f"decoding images failed ({reason}); is memory or /dev/shm full?") from None


@contextlib.contextmanager
def _held(what: signal.Signals) -> Iterator[None]:
    """A signal that comes during the body is dealt with after it; processes that the body starts never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {what})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cores() -> int:
    """Cores that this process may use; torchrun's processes on one machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


DATASETS: dict[str, Callable[[Path, int], Dataset]] = {
    "digits": digits,
    "cifar100": cifar100,
    "imagenet100": imagenet100,
    "folder": folder,
}
