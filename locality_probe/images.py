"""The images that a model is measured on: a fixed, recorded set, from a data set, a folder or an array."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cil import data
from cil.files import reason_of, regular
from locality_probe.subject import Subject
from locality_probe.typed import Typed

DEFAULT_N = 256


@dataclass(frozen=True)
class ProbeImages:
    """Some images of a source: `items` are files or Pillow images, or normalised floats [n, 3, H, W] taken as they are."""

    source: str
    index: list[int]  # place of each image in its source
    items: list[Path | Image.Image] | Tensor
    sha256: str
    passed_over: dict[str, int] = field(default_factory=dict)  # files of a folder that are no images, by suffix

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, subject: Subject, batch_size: int) -> Iterator[Tensor]:
        """Float [b, 3, H, W] as `subject` takes them."""
        for start in range(0, len(self), batch_size):
            part = self.items[start : start + batch_size]
            if not isinstance(part, Tensor):  # photographs are large: only a batch of them is open
                opened = (data.open_image(item) if isinstance(item, Path) else item for item in part)
                part = torch.stack([subject.preprocess(image) for image in opened])
            yield part

    def describe(self) -> dict[str, object]:
        """What measurement.json keeps."""
        description: dict[str, object] = {
            "source": self.source,
            "n": len(self),
            "index": self.index,
            "sha256": self.sha256,
        }
        return description | ({"passed_over": self.passed_over} if self.passed_over else {})

    def remarks(self) -> list[str]:
        """What a user should know of the images: a sentence where files were passed over."""
        if not self.passed_over:
            return []
        suffixes = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in self.passed_over.items())
        total = sum(self.passed_over.values())
        return [f"{total} of the files in {self.source} {'are' if total > 1 else 'is'} passed over ({suffixes})"]


def load_images(
    source: str, n: int | None, seed: int = 0, data_dir: str | Path = "data", classes: list[int] | None = None
) -> ProbeImages:
    """n images of `source`, drawn without replacement by `seed` and kept in the source's order; None: 256, or all if fewer.

    source: a folder of image files, a .npy or .npz file with floats [n, 3, H, W] that are already normalised, or the test
    images of digits, cifar100, imagenet100, folder:PATH, or `photos`: the two of scikit-learn.
    classes: of a data set, only these (original class numbers).
    Raises Typed for an unknown source and n beyond its size, and ValueError for files that are not right.
    """
    items, name, eligible = _open(source, data_dir, classes)
    if not len(eligible):
        raise ValueError(f"no images in {source}")
    n = min(DEFAULT_N, len(eligible)) if n is None else n
    if not 1 <= n <= len(eligible):
        raise Typed(f"n={n} is not between 1 and the {len(eligible)} images of {source}")
    generator = torch.Generator().manual_seed(seed)
    index = eligible[torch.randperm(len(eligible), generator=generator)[:n]].sort().values.tolist()
    chosen = items[torch.tensor(index)] if isinstance(items, Tensor) else [items[i] for i in index]
    digest = hashlib.sha256()
    for item in chosen:
        digest.update(regular(item).read_bytes() if isinstance(item, Path) else np.asarray(item).tobytes())
    others = data.passed_over(Path(source)) if Path(source).is_dir() and name == source else {}
    return ProbeImages(name, index, chosen, digest.hexdigest(), others)


def _open(source: str, data_dir: str | Path, classes: list[int] | None) -> tuple[Tensor | list, str, Tensor]:
    """Images or their files, the name of their source, and the places [m] of those that may be drawn."""
    path = Path(source)
    kind, _, place = source.partition(":")
    if kind in data.DATASETS and not path.is_dir():
        if (kind == "folder") != bool(place):
            raise Typed(f"no data set {source!r}; there are: {data.names()}")
        loaded = data.load(source, data_dir)
        test = loaded.test
        if classes and max(classes) >= len(loaded.classes):
            raise ValueError(f"class {max(classes)} of the run is none of the {len(loaded.classes)} of {source}")
        wanted = (
            torch.ones(len(test), dtype=torch.bool)
            if classes is None
            else torch.isin(test.labels, torch.tensor(classes))
        )
        return test.pictures(), f"{source}, test", wanted.nonzero().squeeze(1)
    images: Tensor | list
    if path.suffix in (".npy", ".npz"):
        images = _array(path)
    elif source == "photos":
        from sklearn.datasets import load_sample_images

        images = [Image.fromarray(photo) for photo in load_sample_images().images]
    elif path.is_dir():
        images = data.image_files(path)
    else:
        is_place = path.exists() or len(path.parts) > 1
        raise (ValueError if is_place else Typed)(
            f"no images {source!r}: give a folder, a .npy or .npz file, {data.names()} or photos"
        )
    return images, source, torch.arange(len(images))


MOST_BYTES = 2 * 2**30  # of an array, unpacked


def _array(path: Path) -> Tensor:
    """Float [n, 3, H, W] of a .npy file, or of the only array (or the one called images) of a .npz file."""
    if not path.exists():
        raise ValueError(f"no images file {path}")
    try:
        if path.suffix == ".npz":
            with np.load(regular(path), allow_pickle=False) as arrays:
                if "images" not in arrays.files and len(arrays.files) != 1:
                    raise ValueError(f"it holds {', '.join(arrays.files) or 'nothing'}, and none is called images")
                name = "images" if "images" in arrays.files else arrays.files[0]
                unpacked = max(
                    (info.file_size for info in arrays.zip.infolist() if info.filename == f"{name}.npy"), default=0
                )
                if unpacked > MOST_BYTES:
                    raise ValueError(
                        f"{name} takes {unpacked / 2**30:.1f} GiB, and at most {MOST_BYTES / 2**30:.0f} are read"
                    )
                loaded = arrays[name]
        else:
            loaded = np.load(
                regular(path), allow_pickle=False, mmap_mode="r"
            )  # a header that lies is told by the file's size
        if not isinstance(loaded, np.ndarray):
            raise ValueError("what it holds is no array")
    except ValueError as error:
        reason = "it holds Python objects, or is none of NumPy's files" if "pickle" in str(error) else reason_of(error)
        raise ValueError(f"{path} is no array of images ({reason})") from None
    except (
        OSError, EOFError, MemoryError, OverflowError, NotImplementedError, RuntimeError, KeyError, SyntaxError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} is truncated or no array of images ({reason_of(error)})") from None
    if loaded.ndim != 4 or loaded.shape[1] != 3 or loaded.dtype.kind != "f":
        raise ValueError(f"{path} holds {loaded.dtype} {loaded.shape}, not normalised floats [n, 3, H, W]")
    with np.errstate(over="ignore"):
        loaded = loaded.astype(np.float32)
    bad = ~np.isfinite(loaded).all(axis=(1, 2, 3))
    if bad.any():
        raise ValueError(f"{path} holds NaN or infinite values in image {int(bad.argmax())}")
    return torch.from_numpy(loaded)
