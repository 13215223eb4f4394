"""The instrument on a GPU, simulated and, where there is one, real: the numbers of the CPU, from tensors on one device."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from simulated_cuda import simulated

from cil.checkpoint import open_run
from locality_probe import LocalityLog, Probe
from locality_probe.doctor import examine_subject
from locality_probe.heatmap import heat_maps
from locality_probe.images import load_images
from locality_probe.spectra import spectra
from locality_probe.subject import from_run, from_timm
from locality_probe.survey import survey
from locality_probe.transfer import transfer


@pytest.fixture
def cuda():
    """In the test there is a device cuda:0, simulated where there is no GPU."""
    with contextlib.nullcontext() if torch.cuda.is_available() else simulated() as device:
        yield device


def assert_alike(here: pd.DataFrame, there: pd.DataFrame, rtol: float = 2e-5) -> None:
    """The same rows, and numbers as near as float32 sums in another order are."""
    assert len(here) == len(there) > 0 and list(here.columns) == list(there.columns)
    for name in here.columns:
        if here[name].dtype.kind == "f":
            np.testing.assert_allclose(there[name], here[name], rtol=rtol, atol=1e-5, err_msg=name)
        else:
            assert here[name].tolist() == there[name].tolist(), name


def on_both(cuda, measured):
    """What a function of a device's name gives for the CPU, and for the device."""
    return measured("cpu"), measured("cuda")


def subjects(folder):
    """Networks of every kind of attention that a run has, and models of others: made anew, for a device keeps its model."""
    runs = [from_run(open_run(folder / name), 1) for name in ("toy", "toy-joint")]
    return [*runs, from_timm("test_vit"), from_timm("swin_tiny_patch4_window7_224", image_size=112)]


def test_measurements(cuda, toy_runs):
    images = load_images("digits", 6)
    here, there = on_both(cuda, lambda device: survey(subjects(toy_runs), images, device))
    assert_alike(here.nonlocality, there.nonlocality)
    assert_alike(here.per_image, there.per_image)
    assert_alike(here.layers, there.layers)
    assert_alike(here.intervals, there.intervals)


@pytest.mark.parametrize("given", [True, False], ids=["images on the device", "images on the CPU"])
def test_log(cuda, tmp_path, given):
    """A training loop hands over its model, wherever that is, and the images once."""
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=4), torch.randn(5, 3, 32, 32)
    here = LocalityLog(tmp_path / "here.csv", x, batch_size=2)(model, 0)
    log = LocalityLog(tmp_path / "there.csv", x.to("cuda") if given else x, batch_size=2)
    there = log(model.to("cuda"), 0)
    assert_alike(here, there)


@pytest.mark.parametrize("amp", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_probe_in_autocast(cuda, amp):
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=4), torch.randn(5, 3, 32, 32)

    def measured(device):
        with Probe(model.to(device)) as probe, torch.autocast(device, amp, enabled=amp != torch.float32):
            probe.update(x.to(device))
        return probe.result().table()

    assert_alike(*on_both(cuda, measured), rtol=2e-5 if amp == torch.float32 else 0.01)


@pytest.mark.parametrize(
    "options",
    [{}, {"query": "cls"}, {"query": "1,2", "head": "all"}, {"query": "pixel:9,20"}, {"rollout": True}],
    ids=lambda options: " ".join(f"{key} {value}" for key, value in options.items()) or "mean",
)
def test_heat_maps(cuda, toy_runs, options):
    picture = Image.fromarray((np.arange(40 * 60 * 3) % 251).reshape(40, 60, 3).astype(np.uint8))

    def drawn(device):
        return heat_maps(
            [from_run(open_run(toy_runs / "toy"), task) for task in (0, 2)], picture, device=device, **options
        )

    here, there = on_both(cuda, drawn)
    assert (here.row_labels, here.column_labels, here.query) == (there.row_labels, there.column_labels, there.query)
    np.testing.assert_allclose(there.maps, here.maps, atol=1e-6)


def test_spectra(cuda, toy_runs):
    directories = [open_run(toy_runs / name) for name in ("toy", "toy-joint")]
    here, there = on_both(cuda, lambda device: spectra(directories, n=60, device=device))
    assert_alike(here.summary, there.summary, rtol=1e-3)


def test_transfer(cuda, toy_runs):
    directories = [open_run(toy_runs / name) for name in ("toy", "toy-joint")]
    here, there = on_both(
        cuda, lambda device: transfer(directories, [1], per_class=12, test_per_class=10, device=device)
    )
    assert_alike(here.transfer, there.transfer, rtol=0.05)  # a test image may change sides
    assert_alike(here.cka, there.cka, rtol=1e-3)
    assert_alike(here.nonlocality, there.nonlocality)


def test_layers(cuda, toy_runs):
    here, there = on_both(cuda, lambda device: [examine_subject(s, device=device) for s in subjects(toy_runs)])
    assert here == there
