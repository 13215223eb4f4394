"""The layouts of CIFAR-100, image folders, digits: the same pixels and labels from each."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from cil import data


@pytest.fixture
def pixels():
    """100 classes, 2 training images and 1 test image each."""
    random = np.random.default_rng(0)
    return {s: random.integers(0, 256, (100 * n, 32, 32, 3), dtype=np.uint8) for s, n in (("train", 2), ("test", 1))}


def labels(split):
    return np.repeat(np.arange(100), 2 if split == "train" else 1)


CLASSES = [f"class_{i:02d}" for i in range(100)]


def as_npz(root, pixels):
    arrays = {f"x_{s}": x for s, x in pixels.items()} | {f"y_{s}": labels(s) for s in pixels}
    np.savez(root / "cifar100.npz", classes=np.array(CLASSES), **arrays)


def as_folders(root, pixels):
    for split, x in pixels.items():
        for n, (image, label) in enumerate(zip(x, labels(split), strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{n:04d}.png")


def as_published(root, pixels, monkeypatch):
    """Files of the published form; torchvision opens them because the test gives it their MD5 sums."""
    from torchvision.datasets import CIFAR100

    base = root / "cifar-100-python"
    base.mkdir()
    for split, x in pixels.items():
        content = {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "fine_labels": labels(split).tolist()}
        (base / split).write_bytes(pickle.dumps(content))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": CLASSES}))
    sums = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})


@pytest.mark.parametrize("layout", ["npz", "folders", "published"])
def test_cifar100_is_the_same_from_every_layout(layout, pixels, tmp_path, monkeypatch):
    if layout == "published":
        as_published(tmp_path, pixels, monkeypatch)
    else:
        {"npz": as_npz, "folders": as_folders}[layout](tmp_path, pixels)
    found = data.load("cifar100", tmp_path)
    for split in ("train", "test"):
        images = getattr(found, split)
        assert images.images.dtype == torch.uint8 and images.images.is_contiguous()
        np.testing.assert_array_equal(images.images.permute(0, 2, 3, 1).numpy(), pixels[split])
        np.testing.assert_array_equal(images.labels.numpy(), labels(split))
    assert found.classes == CLASSES and found.mean == data.CIFAR100_MEAN and found.image_size == (32, 32)


def test_published_files_that_were_changed_are_not_unpickled(pixels, tmp_path, monkeypatch):
    as_published(tmp_path, pixels, monkeypatch)
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="MD5"):
        data.load("cifar100", tmp_path)
    assert not trap.exists()


def test_digits():
    found = data.load("digits")
    assert len(found.train) + len(found.test) == 1797 and found.image_size == (8, 8)
    assert found.train.images.max() == 255 and (found.train.images[:, 0] == found.train.images[:, 2]).all()
    assert found.test.labels.bincount().min() >= 43  # stratified
    again = data.load("digits")
    assert (again.train.images == found.train.images).all()


def test_folder_of_odd_sizes(tmp_path):
    for split in ("train", "test"):
        for name, size in (("b", (40, 20)), ("a", (31, 64))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", size, (200, 100, 50)).save(folder / "x.jpg", quality=100)
            (folder / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="set image_size"):
        data.load(f"folder:{tmp_path}")
    found = data.load(f"folder:{tmp_path}", image_size=16)
    assert found.classes == ["a", "b"] and found.train.labels.tolist() == [0, 1]
    assert found.train.images.shape == (2, 3, 16, 16)
    assert found.mean == pytest.approx([200 / 255, 100 / 255, 50 / 255], abs=0.02)


@pytest.mark.parametrize("name", ["mnist", "folder", "folder:", "digits:x", "cifar100:x"])
def test_unknown_data_set(name, tmp_path):
    with pytest.raises(ValueError, match="there are: digits, cifar100, imagenet100, folder:PATH"):
        data.load(name, tmp_path)


def test_cover_cuts_the_centre():
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    assert (np.asarray(data.cover(image, (10, 10))) == (0, 0, 255)).all()
    assert data.cover(image, (5, 20)).size == (20, 5)
