"""What comes in from outside is read with care: kinds of files, names, options and streams that once broke a command."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import made_up
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import flat, invoke, refused, run_ok
from matplotlib.figure import Figure
from PIL import Image

from cil.data import image_files, open_image, trimmed
from cil.files import regular
from figures import style
from figures.paper.study import load
from locality_probe.tables import COMPARISON, STUDY

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("name", ["=1+1", "-toy", "+x", "@sum(1)", "'quoted", "'=1", "plain", ""])
def test_no_cell_is_a_formula_and_names_come_back(name):
    row = {c: name if kind == "str" else 0 for c, (kind, _) in COMPARISON.columns.items()}
    COMPARISON.write(pd.DataFrame([row]), "table.csv")
    assert not any(
        cell[:1] in ("=", "+", "-", "@") for cell in Path("table.csv").read_text().splitlines()[1].split(",")
    )
    back = COMPARISON.read("table.csv").iloc[0]
    assert all(back[c] == name for c, (kind, _) in COMPARISON.columns.items() if kind == "str")


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    figure = Figure()
    axes = figure.subplots()
    axes.set(title="$\\frac", ylabel=f"{style.D_LOC} by {style.LAMBDA}", xlabel="cost$5", xscale="log")
    style.save(figure, tmp_path / "x.png")
    style.save(figure, tmp_path / "x.svg")  # a second time, when ticks have their labels
    assert [text.get_parse_math() for text in (axes.title, axes.yaxis.label, axes.xaxis.label)] == [False, True, False]
    ticks = [text for text in axes.get_xticklabels() if "$" in text.get_text()]
    assert ticks and all(text.get_parse_math() for text in ticks)


@pytest.mark.parametrize(
    ("make", "words"), [(os.mkfifo, "a pipe"), (os.mkdir, "a folder"), (lambda p: None, "not there")]
)
def test_only_files_that_end_are_opened(make, words):
    make("odd")
    with pytest.raises(ValueError, match=words):
        regular("odd")


def test_pictures_by_content_and_never_by_another_program():
    Path("image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(ValueError, match=r"image\.png is not an image that Pillow can read"):
        open_image(Path("image.png"))
    Image.new("RGB", (5, 4)).save("other.png", format="JPEG")
    assert open_image(Path("other.png")).size == (5, 4)
    os.mkfifo("pipe.png")
    with pytest.raises(ValueError):
        open_image(Path("pipe.png"))


def test_a_strip_is_cut_to_its_middle():
    pixels = np.zeros((1, 30_000, 3), np.uint8)
    pixels[:, 14_950:15_050] = 255
    cut = trimmed(Image.fromarray(pixels))
    assert cut.size == (100, 1) and np.asarray(cut).min() == 255
    assert trimmed(Image.new("RGB", (300, 200))).size == (300, 200)


def test_hidden_files_are_no_images_and_tif_and_gif_are():
    for name in ("a.png", "b.tif", "c.gif", "._a.png", ".hidden.png"):
        Image.new("RGB", (4, 4)).save(name)
    assert [path.name for path in image_files(Path("."))] == ["a.png", "b.tif", "c.gif"]


@pytest.mark.parametrize("option", ["--out", "--images", "--data"])
def test_an_option_without_a_value_is_refused(runs, option):
    refused("measure", "runs/toy", option, "", names=[option, "'' is empty"], code=2)


@pytest.mark.parametrize(
    "line",
    ["--layer {}", "--head {}", "--query {},1", "--layer 0,0"],
)
def test_numbers_that_nobody_means(runs, picture, line):
    words = line.format("9" * 5000).split()
    refused("heatmap", picture, "--ckpt", "runs/toy", *words, names=words[0].strip("-"), code=2)


def test_one_run_by_two_spellings_is_one_run(runs):
    refused("compare", "runs/toy", "runs/../runs/toy", names=["runs/toy", "is given twice"], code=2)


def test_a_heat_map_does_not_overwrite_its_picture(runs, picture):
    refused("heatmap", picture, "--ckpt", "runs/toy", "-o", picture, names="would overwrite", code=2)


def test_a_run_whose_name_has_a_colon(runs, picture):
    shutil.copytree("runs/toy", "runs/a:1")
    run_ok("heatmap", picture, "--ckpt", "runs/a:1", "-o", "h.png")


def test_arrays_that_unpack_to_gigabytes(runs):
    described = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 3, 8, 8), }"
    header = b"\x93NUMPY\x01\x00v\x00" + described.ljust(117) + b"\n"
    archive = zipfile.ZipFile("x.npz", "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("images.npy", "w", force_zip64=True) as file:
        file.write(header)
        for _ in range(33):
            file.write(bytes(2**26))
    refused("measure", "runs/toy", "--images", "x.npz", names=["x.npz", "GiB"])
    Path("y.npy").write_bytes(header + bytes(100))
    refused("measure", "runs/toy", "--images", "y.npy", names="y.npy")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.to(torch.float8_e4m3fn), "as float8_e4m3fn"),
        (lambda w: w.to_sparse(), "as sparse_coo"),
        (lambda w: w.to(torch.complex64), "as complex64"),
        (lambda w: w.to("meta"), "as meta"),
        (lambda w: w[:1].expand(10**9, *w.shape[1:]), "tensors claim"),
        (lambda w: w.double() + 1e300, "NaN or infinite"),
    ],
)
def test_weights_of_kinds_that_no_network_computes_with(runs, change, words):
    from safetensors.torch import load_file

    state = load_file("runs/toy/task_00.safetensors")
    name = "blocks.0.attn.qk.weight"
    torch.save(state | {name: change(state[name])}, "w.pth")
    np.save("x.npy", np.zeros((2, 3, 8, 8), np.float32))
    result = invoke("measure", "w.pth", "--images", "x.npy")
    assert result.exit_code == 1 and words in flat(result.stderr) and "w.pth" in result.stderr


def test_a_checkpoint_that_holds_itself():
    content: dict = {}
    content["model"] = content
    torch.save(content, "w.pth")
    refused("measure", "w.pth", "--images", "digits", names="w.pth holds no state dict")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("runs.csv", lambda f: f.iloc[:0], "which study/runs.csv lacks"),
        ("runs.csv", lambda f: f.assign(settings="[]"), "are no JSON object"),
        ("nonlocality.parquet", lambda f: f.assign(task=f["task"] * 10**15), "nonlocality.parquet holds task"),
        ("attention.parquet", lambda f: f.assign(weights=[b"1"] * len(f)), "attention.parquet: the map of"),
        ("examples.parquet", lambda f: f.assign(rgb=[b"1"] * len(f)), "examples.parquet"),
    ],
)
def test_a_study_whose_tables_do_not_belong_together(file, change, words):
    for name, frame in made_up.make(seeds=1, lambdas=(0.02,), layers=False).items():
        Path("study").mkdir(exist_ok=True)
        STUDY[name].write(change(frame) if name == file else frame, Path("study", name))
    with pytest.raises(ValueError, match=words):
        load("study")


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(runs, streams):
    command = f'"{sys.executable}" -m locality_probe measure runs/toy --n 2 --task 0 --out out {streams}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          cwd=".")  # fmt: skip
    assert "Traceback" not in done.stderr and Path("out/nonlocality.csv").is_file()
    assert not list(Path().rglob("*.part"))
