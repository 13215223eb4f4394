"""heatmap beyond single maps: several layers and heads, pixels, rollout, differences, scales, layers that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import flat, invoke, run_ok
from matplotlib.colors import Normalize
from networks import vit
from PIL import Image

from cil.checkpoint import open_run
from figures import attention_maps
from locality_probe import heatmap
from locality_probe.heatmap import heat_maps
from locality_probe.record import record
from locality_probe.subject import Subject, from_run
from locality_probe.typed import Typed


def subject_of(model, size=32, crop=None, name="model") -> Subject:
    def resize(image: Image.Image) -> Image.Image:
        return image.resize((size, size))

    return Subject(name, name, "model", 0, model, crop or resize, (0.5,) * 3, (0.25,) * 3)


def photo(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def maps_of(subject: Subject, image: Image.Image) -> list[torch.Tensor]:
    """Attention [H, Q, K] of each layer."""
    found = record(subject.model, subject.preprocess(image)[None], lambda a, layer: {"map": a})
    return [item.values["map"][0] for item in found]


def test_some_layers_and_heads_on_either_axis():
    subject, image = subject_of(vit(depth=3)), photo()
    attention = maps_of(subject, image)
    found = heat_maps([subject], image, layer="0,2", head="1,0", query="1,3")
    assert (found.row_labels, found.column_labels) == (["layer 0", "layer 2"], ["head 1", "head 0"])
    turned = heat_maps([subject], image, layer="0,2", head="1,0", query="1,3", columns="layer")
    assert (turned.row_labels, turned.column_labels) == (["head 1", "head 0"], ["layer 0", "layer 2"])
    np.testing.assert_array_equal(turned.maps, found.maps.swapaxes(0, 1))
    for row, layer in enumerate((0, 2)):
        for column, head in enumerate((1, 0)):
            expected = attention[layer][head, 1 + 7, 1:].view(4, 4)
            np.testing.assert_allclose(found.maps[row, column], expected, atol=1e-6)
    for arguments, sentence in (
        ({"layer": "0,9"}, "no layer 9 in model; there: 0, 1, 2"), ({"layer": "a"}, "layer='a' is neither all nor numbers"),
        ({"head": "0,5"}, "no head 0,5 in model; there: 0 to 1"), ({"head": "1,x"}, "no head 1,x"),
        ({"query": "pixel:3"}, "nor pixel:ROW,COLUMN"), ({"rollout": True, "head": "0"}, "rollout, which averages heads"),
        ({"difference": True}, "a difference is of two checkpoints, and there are 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            heat_maps([subject], image, **arguments)


def test_a_pixel_is_the_patch_that_shows_it():
    subject = subject_of(vit())
    for pixel, patch in (((0, 0), (0, 0)), ((39, 59), (3, 3)), ((12, 50), (1, 3)), ((21, 14), (2, 0))):
        found = heat_maps([subject], photo(), query=f"pixel:{pixel[0]},{pixel[1]}")
        assert found.query == patch and f"patch {patch[0]},{patch[1]}" in found.title
        same = heat_maps([subject], photo(), query=f"{patch[0]},{patch[1]}")
        np.testing.assert_array_equal(found.maps, same.maps)
    middle = subject_of(vit(), crop=lambda image: image.crop((10, 0, 50, 40)).resize((32, 32)))
    assert heat_maps([middle], photo(), query="pixel:20,10").query == (2, 0)
    assert heat_maps([middle], photo(), query="pixel:20,49").query == (2, 3)
    with pytest.raises(ValueError, match="pixel 20,2 is cropped away before model sees it"):
        heat_maps([middle], photo(), query="pixel:20,2")
    with pytest.raises(ValueError, match="pixel 40,2 is outside the picture of 40 rows and 60 columns"):
        heat_maps([middle], photo(), query="pixel:40,2")


@pytest.mark.parametrize("columns", ["run", "layer"])
def test_networks_that_crop_otherwise_have_each_their_own_patch_and_picture(columns):
    """In numbers, labels, the file and the drawing, whichever comes last."""
    whole = subject_of(vit(), name="whole")
    middle = subject_of(vit(), crop=lambda image: image.crop((10, 0, 50, 40)).resize((32, 32)), name="middle")
    for subjects in ([whole, middle], [middle, whole]):
        same = heat_maps(subjects, photo(), query="pixel:20,48", columns=columns)
        assert same.query == (2, 3) and "query: patch 2,3" in same.title
        found = heat_maps(subjects, photo(), query="pixel:20,40", columns=columns)
        patches = {"whole": (2, 2), "middle": (2, 3)}
        labels = found.column_labels if columns == "run" else found.row_labels
        assert labels == [f"{s.run}, patch {patches[s.run][0]},{patches[s.run][1]}" for s in subjects]
        assert found.query is None and "query: pixel 20,40" in found.title and "patch" not in found.title
        panels = found.panels[0] if columns == "run" else [row[0] for row in found.panels]
        for panel, subject in zip(panels, subjects, strict=True):
            row, column = patches[subject.run]
            alone = heat_maps([subject], photo(), query=f"{row},{column}").panels[0][0]
            assert panel.query == (row, column)
            np.testing.assert_array_equal(panel.attention, alone.attention)
            np.testing.assert_array_equal(panel.seen, np.asarray(subject.crop(photo())))
        drawn = attention_maps.draw(**found.drawing())
        boxes = [axes.patches[0].get_xy() for axes in drawn.axes if axes.get_label().startswith("map")]
        expected = [(8 * patches[s.run][1], 8 * patches[s.run][0]) for s in subjects]
        assert boxes[:: 1 if columns == "run" else len(found.column_labels)][:2] == expected
        (shown,) = [axes for axes in drawn.axes if axes.get_label().startswith("image")]
        assert shown.patches[0].get_xy() == expected[0]
        under = [axes.images[0].get_array() for axes in drawn.axes if axes.get_label().startswith("map")]
        assert not np.array_equal(under[0], under[-1])
    with pytest.raises(Typed, match=r"the pixel is in patch \(2, 2\) of whole and in \(2, 3\) of middle"):
        heat_maps([whole, middle], photo(), query="pixel:20,40", difference=True)


def test_queries_are_in_the_file(tmp_path):
    whole = subject_of(vit(), name="whole")
    middle = subject_of(vit(), crop=lambda image: image.crop((10, 0, 50, 40)).resize((32, 32)), name="middle")
    for subjects, query, one, all_ in (
        ([whole], "1,2", [1, 2], [[[1, 2]]]),
        ([whole], "mean", [], [[[-1, -1]]]),
        ([whole, middle], "pixel:20,40", [], [[[2, 2], [2, 3]]]),
    ):
        found = heat_maps(subjects, photo(), layer="0", query=query)
        with np.load(found.save(tmp_path / "maps.npz")) as arrays:
            assert arrays["query"].tolist() == one and arrays["queries"].tolist() == all_


def test_networks_and_images_go_to_the_device(monkeypatch):
    """As `record` is given them; the maps come back to the CPU. `meta` is a device that every machine has."""
    seen = []

    def watched(model, x, *rest):
        seen.append({x.device.type, *(p.device.type for p in model.parameters())})
        raise ValueError("seen")

    monkeypatch.setattr(heatmap, "record", watched)
    for query in ("mean", "pixel:3,3"):
        with pytest.raises(ValueError, match="seen"):
            heat_maps([subject_of(vit())], photo(), query=query, device="meta")
    assert seen == [{"meta"}, {"meta"}]


def test_rollout():
    """Abnar & Zuidema 2020: the product of (A + I) / 2 over the layers."""
    subject, image = subject_of(vit(depth=3)), photo()
    found = heat_maps([subject], image, query="cls", rollout=True)
    so_far = torch.eye(17)
    for layer, attention in enumerate(maps_of(subject, image)):
        so_far = (attention.mean(0) + torch.eye(17)) / 2 @ so_far
        np.testing.assert_allclose(found.maps[0, layer], so_far[0, 1:].view(4, 4), atol=1e-6)
    assert "rollout" in found.title


def test_rollout_through_task_attention(toy_runs):
    directory = open_run(toy_runs / "toy")
    subject, image = from_run(directory, 2), photo()
    found = heat_maps([subject], image, query="cls", rollout=True)
    first, second, task = (a.mean(0) for a in maps_of(subject, image))
    eye = torch.eye(64)
    so_far = (second + eye) / 2 @ ((first + eye) / 2)
    assert found.maps.shape[:2] == (1, 1)  # patches are no class token: the last layer alone has one
    np.testing.assert_allclose(found.maps[0, 0], (task[-1, 1:] @ so_far).view(8, 8), atol=1e-6)
    assert found.maps.sum() == pytest.approx(1 - task[-1, 0].item(), abs=1e-5)


def test_rollout_needs_every_layer():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 1), num_heads=(2, 2))
    with pytest.raises(
        ValueError, match=r"no rollout of model: layer 0 \(layers.0.blocks.0.attn\) is not seen as a whole"
    ):
        heat_maps([subject_of(swin.eval(), 56)], photo(), rollout=True)
    pit = timm.create_model("pit_ti_224", img_size=64, depth=(1, 1, 1)).eval()
    with pytest.raises(ValueError, match="no rollout of model: the tokens of layer 1 are not those of layer 0"):
        heat_maps([subject_of(pit, 64)], photo(), rollout=True)


def test_layers_that_do_not_fit_are_named_or_refused():
    pit = subject_of(timm.create_model("pit_ti_224", img_size=64, depth=(1, 1, 1)).eval(), 64)
    found = heat_maps([pit], photo())
    assert found.maps.shape == (1, 1, 7, 7)
    assert (
        found.left_out[0] == "left out: layer 1 of model has a grid of (4, 4), others (7, 7)"
        and len(found.left_out) == 2
    )
    with pytest.raises(ValueError, match=r"has a grid of \(4, 4\), others \(7, 7\); draw them one by one"):
        heat_maps([pit], photo(), layer="0,1")
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 1), num_heads=(2, 2))
    swin = subject_of(swin.eval(), 56)
    assert heat_maps([swin], photo()).title.startswith("layer 2")  # the last stage is one window
    with pytest.raises(
        ValueError, match=r"it attends within windows, which are not drawn over an image.*layers with it: 2"
    ):
        heat_maps([swin], photo(), layer="0")


def test_difference(toy_runs):
    image, directory = photo(), open_run(toy_runs / "toy")
    early, late = from_run(directory, 0), from_run(directory, 2)
    found = heat_maps([early, late], image, head="all", query="2,2", difference=True)
    a, b = maps_of(early, image), maps_of(late, image)
    for layer in (0, 1):
        expected = (b[layer] - a[layer])[:, 2 * 8 + 2].view(4, 8, 8)
        np.testing.assert_allclose(found.maps[layer], expected, atol=1e-6)
    assert found.maps.min() < 0 < found.maps.max() and found.title.startswith("toy:2 minus toy:0")
    back = heat_maps([late, early], image, head="all", query="2,2", difference=True)
    np.testing.assert_array_equal(back.maps, -found.maps)
    twin = from_run(open_run(toy_runs / "toy-joint"), 2)
    with pytest.raises(ValueError, match="head='0': heads of toy and toy-joint do not pair; their mean does"):
        heat_maps([late, twin], image, head="0", difference=True)
    assert heat_maps([late, twin], image, difference=True).title.startswith("toy-joint:2 minus toy:2")


def test_times_uniform_and_differences_have_a_middle():
    maps = np.stack([np.full((4, 4), 1 / 16), np.full((4, 4), 0.5 / 16)])[None].astype(np.float32)
    maps[0, 0, 0, 0] = 4 / 16
    image = np.zeros((8, 8, 3), np.uint8)
    figure = attention_maps.draw(image, maps, [""], ["a", "b"], scale="uniform")
    drawn = [axes.images[-1] for axes in figure.axes if axes.get_label().startswith("map")]
    np.testing.assert_allclose(drawn[0].get_array()[0, :2], [2, 0], atol=1e-6)  # four times uniform, uniform
    np.testing.assert_allclose(drawn[1].get_array(), -1)
    assert all((d.norm.vmin, d.norm.vmax) == (-2, 2) and isinstance(d.norm, Normalize) for d in drawn)
    (bar,) = [axes for axes in figure.axes if axes.get_label().startswith("bar")]
    assert bar.get_ylabel() == "times uniform"
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0.25", "0.5", "1", "2", "4"]
    figure = attention_maps.draw(image, maps - 0.1, [""], ["a", "b"], scale="difference")
    drawn = [axes.images[-1] for axes in figure.axes if axes.get_label().startswith("map")]
    assert drawn[0].norm.vmin == -drawn[0].norm.vmax == pytest.approx(-0.15)
    with pytest.raises(ValueError, match="none below 0"):
        attention_maps.draw(image, maps - 0.1, [""], ["a", "b"])


def test_empty_panels_say_so():
    maps = np.full((1, 2, 4, 4), np.nan, np.float32)
    maps[0, 0] = 0.1
    figure = attention_maps.draw(np.zeros((8, 8, 3), np.uint8), maps, [""], ["a", "b"])
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes if axes.get_label().startswith("map")]
    assert texts == [[], ["none"]]


def test_command(runs, picture):
    run_ok("heatmap", picture, "--ckpt", "runs/toy:all", "--columns", "layer", "--query", "pixel:3,40", "--scale", "uniform",
           "-o", "a.svg")  # fmt: skip
    with np.load("a.npz") as arrays:
        assert arrays["maps"].shape[:2] == (3, 2) and str(arrays["scale"]) == "uniform" and len(arrays["query"]) == 2
        assert arrays["columns"].tolist() == ["layer 0", "layer 1"] and arrays["rows"].tolist()[2] == "task 2"
    run_ok("heatmap", picture, "--ckpt", "runs/toy:0", "--ckpt", "runs/toy:2", "--difference", "-o", "b.pdf")
    run_ok("heatmap", picture, "--ckpt", "runs/toy", "--rollout", "--query", "cls", "-o", "c.png")
    assert all(Path(name).stat().st_size for name in ("a.svg", "b.pdf", "c.png"))
    result = run_ok("heatmap", picture, "--model", "timm/pit_ti_224", "-o", "d.png")
    assert "left out: layer 2 of pit_ti_224 has a grid of (14, 14), others (27, 27)" in result.stdout


def test_a_file_of_the_users_is_not_taken_for_the_raw_array(runs, picture):
    for content in (b"no zip", None):
        np.savez("data.npz", mine=np.arange(3)) if content is None else Path("data.npz").write_bytes(content)
        before = Path("data.npz").read_bytes()
        result = invoke("heatmap", picture, "--ckpt", "runs/toy", "-o", "data.png")
        assert result.exit_code == 1 and "data.npz is there, holds no heat map" in flat(result.output)
        assert Path("data.npz").read_bytes() == before and not Path("data.png").exists()
    Path("data.npz").unlink()
    for _ in range(2):
        run_ok("heatmap", picture, "--ckpt", "runs/toy", "-o", "data.png")
