"""ImageNet-100: its layout, its crops, and the workers that decode it."""

import itertools
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import WNIDS, imagenet_like, picture
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from cil import data, recipes
from cil.data import decoded
from cil.run import randomness
from cil.scenario import class_order
from cil.train import train
from locality_probe.images import load_images
from locality_probe.plan import make_plan
from locality_probe.survey import survey

BICUBIC = transforms.InterpolationMode.BICUBIC


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """6 classes, 7 training images and 2 test images each. Tests read it."""
    root = tmp_path_factory.mktemp("imagenet")
    imagenet_like(root, {"train": 7, "val": 2})
    (root / "train" / WNIDS[0] / "notes.txt").write_text("no image")
    (root / "train" / "a_folder_of_mine").mkdir()
    return root


@pytest.fixture(scope="module")
def found(root):
    return data.load("imagenet100", root, image_size=32)


def joined(batches):
    return torch.cat(list(batches))


def test_layout(root, found):
    assert found.classes == WNIDS and found.image_size == (32, 32)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert found.train.labels.tolist() == [c for c in range(6) for _ in range(7)]
    assert found.test.labels.tolist() == [c for c in range(6) for _ in range(2)]
    assert [f.relative_to(root).as_posix() for f in found.test.files[:3]] == [
        f"val/{WNIDS[0]}/{WNIDS[0]}_0.JPEG", f"val/{WNIDS[0]}/{WNIDS[0]}_1.JPEG", f"val/{WNIDS[1]}/{WNIDS[1]}_0.JPEG"
    ]  # fmt: skip
    assert len(found.train) == 42 and data.load("imagenet100", root).image_size == (224, 224)


def test_the_first_hundred_of_more(tmp_path):
    picture(tmp_path / "one.JPEG", np.random.default_rng(0))
    wnids = [f"n{10**7 + 17 * i:08d}" for i in range(103)]
    for split, folders in (("train", wnids), ("val", wnids[:100])):
        for wnid in folders:
            (tmp_path / split / wnid).mkdir(parents=True)
            os.link(tmp_path / "one.JPEG", tmp_path / split / wnid / "one.JPEG")
    found = data.load("imagenet100", tmp_path)
    assert found.classes == wnids[:100] and found.train.labels.tolist() == list(range(100))
    assert len(class_order("imagenet100", len(found.classes))) == 100


def test_fewer_classes_have_no_published_order(found):
    with pytest.raises(ValueError, match=r"imagenet100 is for 100 classes, not 6; use alphabetical"):
        class_order("imagenet100", len(found.classes))


def test_the_test_transform_is_torchvisions(found):
    by_hand = transforms.Compose([transforms.Resize(37, BICUBIC), transforms.CenterCrop(32), transforms.PILToTensor()])
    expected = [by_hand(Image.open(f).convert("RGB")) for f in found.test.files]
    (batch,) = found.test.batches([torch.arange(12)])
    assert batch.dtype == torch.uint8 and batch.is_contiguous() and torch.equal(batch, torch.stack(expected))


def test_the_training_crop_is_torchvisions(found):
    crop = transforms.RandomResizedCrop(32, (0.08, 1), (3 / 4, 4 / 3), BICUBIC)
    indices, seeds, expected = torch.tensor([5, 0, 41]), torch.tensor([7, 0, 2**62 + 1]), []
    for place, seed in zip(indices, seeds, strict=True):
        torch.manual_seed(int(seed))
        expected.append(transforms.functional.pil_to_tensor(crop(Image.open(found.train.files[place]))))
    assert torch.equal(joined(found.train.batches([indices], [seeds])), torch.stack(expected))


def test_pixels_depend_neither_on_workers_nor_on_batches(found):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(42, generator=generator).repeat(2)
    seeds = torch.randint(2**62, (84,), generator=generator)
    expected = joined(found.train.batches([order], [seeds]))
    assert not torch.equal(expected[:42], expected[42:])  # the same images, with other seeds
    for workers, size in itertools.product((0, 1, 2), (5, 20, 84)):
        files = replace(found.train, workers=workers)
        batches = list(files.batches(order.split(size), seeds.split(size)))
        assert [len(b) for b in batches] == [len(o) for o in order.split(size)]
        assert torch.equal(torch.cat(batches), expected)
        assert torch.equal(joined(files.batches(order.split(size)))[:42], joined(files.batches([order[:42]])))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_draws_are_left_alone(found, workers):
    seeds = torch.arange(42)
    with randomness(0, "here") as generator:
        expected = torch.rand(3, generator=generator)
    with randomness(0, "here") as generator:
        joined(replace(found.train, workers=workers).batches([seeds], [seeds]))
        assert torch.equal(torch.rand(3, generator=generator), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_decode(found, workers):
    files, none = replace(found.train, workers=workers), torch.arange(0)
    assert list(files.batches([])) == [] and list(files.batches([], [])) == []
    assert joined(files.batches([none, none], [none, none])).shape == (0, 3, 32, 32)


def test_each_image_needs_its_seed(found):
    with pytest.raises(ValueError, match="3 images need that many seeds"):
        next(found.train.batches([torch.arange(3)], [torch.arange(2)]))
    with pytest.raises(ValueError, match="argument"):
        next(found.train.batches([torch.arange(3)], []))


def test_stopping_early_ends_the_workers(found):
    files = replace(found.train, workers=2)
    batches = files.batches([torch.arange(42)] * 50)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    batches.close()
    assert not multiprocessing.active_children() and not any(w.is_alive() for w in workers)
    for _ in files.batches([torch.arange(20)] * 50):
        break
    assert not multiprocessing.active_children()


def test_workers_leave_ctrl_c_to_the_parent(found):
    batches = replace(found.train, workers=2).batches([torch.arange(42)] * 6)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 5 and not multiprocessing.active_children()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_killed_worker_is_an_error(found, monkeypatch):
    def open_image(path, opened=data.open_image):
        if path == found.train.files[30]:
            time.sleep(0.3)  # until the parent waits for it
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(path)

    monkeypatch.setattr(decoded, "open_image", open_image)
    with pytest.raises(ChildProcessError, match=r"decoding images failed \(.*(killed|exited)"):
        list(replace(found.train, workers=2).batches([torch.arange(42)]))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torn_file_is_named(found, tmp_path, workers):
    torn = tmp_path / "torn.JPEG"
    torn.write_bytes(found.train.files[3].read_bytes()[:200])
    files = [*found.train.files[:20], torn, *found.train.files[20:]]
    files = replace(found.train, files=files, labels=torch.zeros(43).long(), workers=workers)
    with pytest.raises(ValueError) as caught:
        list(files.batches(torch.arange(43).split(10)))
    assert str(caught.value) == f"{torn} is not an image that Pillow can read"
    assert not multiprocessing.active_children()  # while the traceback is still held


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda root: (root / "train").rename(root / "training"), "there is no train/<wnid>/; name its place with"),
        (lambda root: (root / "val").rename(root / "test"), "there is no val/<wnid>/"),
        (lambda root: (root / "val" / WNIDS[2]).rename(root / "gone"), f"val/{WNIDS[2]}"),
        (lambda root: [f.unlink() for f in (root / "val" / WNIDS[1]).iterdir()], f"val/{WNIDS[1]}"),
        (
            lambda root: [f.rename(root / f.name) for f in (root / "train").glob("n*") if f.name != WNIDS[0]],
            "1 folders",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path, spoil, names):
    imagenet_like(tmp_path, {"train": 1, "val": 1})
    spoil(tmp_path)
    with pytest.raises(ValueError, match=names) as caught:
        data.load("imagenet100", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_other_labels(found):
    labels = torch.full((42,), -1)
    assert (
        found.train.with_labels(labels).labels is labels and found.train.with_labels(labels).files == found.train.files
    )
    digits = data.load("digits").test
    assert digits.with_labels(digits.labels + 1).images is digits.images


def test_resident_images_come_in_batches_too():
    digits = data.load("digits").test
    order = torch.tensor([3, 1, 4, 1, 5])
    batches = list(digits.batches(order.split(2), order.split(2)))
    assert [len(b) for b in batches] == [2, 2, 1] and torch.equal(torch.cat(batches), digits.images[order])


def test_the_instrument_takes_the_files(root, found):
    images = load_images("imagenet100", 3, data_dir=root, classes=[1, 4])
    assert images.source == "imagenet100, test" and set(images.index) <= {2, 3, 8, 9}
    assert images.items == [found.test.files[i] for i in images.index]


def test_a_network_sees_pictures_as_it_saw_its_test_images(found):
    crop = data.crop_for("imagenet100")
    seen = [data.to_tensor(crop(data.open_image(f), found.image_size)) for f in found.test.pictures()]
    assert torch.equal(torch.stack(seen), joined(found.test.batches([torch.arange(12)])))
    assert data.crop_for("cifar100") is data.crop_for("folder:x") is data.cover


def test_training_goes_on_and_is_measured(root, toy, tmp_path, monkeypatch):
    """Three tasks of the recipe's path, decoded by workers, broken off inside an epoch and gone on with; two memories."""
    run = replace(
        recipes.on_imagenet(toy), data_dir=str(root), class_order="alphabetical", image_size=32, patch_size=8,
        num_classes=0, images_per_class=0, herding_crop=True, memory_mode="per-process:2", memory=12, batch_size=4,
        epochs=1, epochs_first=1, finetune_epochs=1,
    )  # fmt: skip
    whole = train(run, tmp_path / "whole")
    monkeypatch.setattr("cil.fit.SAVE_EVERY", 0)
    steps = []

    def stop(progress):
        steps.append(progress)
        if len(steps) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "again", report=stop)
    assert steps[-1].epoch == 0 and steps[-1].task == 1
    again = train(run, tmp_path / "again")
    assert again.tasks == [0, 1, 2] and (again.table("accuracy")["images"] == 4).all()
    for task in range(3):
        first, second = (load_file(directory.weights_path(task)) for directory in (whole, again))
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert again.memory(task).equals(whole.memory(task))
    plan = make_plan([str(again.path)], n=3)
    assert (survey((make() for make in plan.subjects), plan.images).nonlocality["d_loc"] > 0).all()
