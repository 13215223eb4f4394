"""What the figures say: lines, labels, colours and references in the drawing, never pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from matplotlib import pyplot as plt

from cil.tables import AFTER
from figures import attention_maps, nonlocality_over_tasks, style
from figures.__main__ import main
from locality_probe.tables import INITIAL, NONLOCALITY

UNIFORM = 4.136483
HEADS = 3
BOTH = {"pair": "GPSA", "pair-lpa": "LPA"}


def value(pair: str, training: str, layer: int, task: int, head: int) -> float:
    """A made-up D_loc in patches that differs wherever it may."""
    growth = 0.01 * task * (1 + layer) * (2 if training == "incremental" else 1)
    return (1.3 if "lpa" in pair else 1.7) + growth + 0.03 * head + 0.1 * layer + (0.05 if training == "joint" else 0)


def mean(pair: str, training: str, layer: int, task: int) -> float:
    return float(np.mean([value(pair, training, layer, task, head) for head in range(HEADS)]))


def table(pairs=BOTH, layers=range(3), tasks=4, trainings=("incremental", "joint")) -> pd.DataFrame:
    rows = []
    for pair, kind in pairs.items():
        for training in trainings:
            for task in [INITIAL, *([tasks - 1] if training == "joint-terminal" else range(tasks))]:
                for layer in layers:
                    for head in range(HEADS):
                        d = value(pair, training, layer, task, head)
                        run = pair if training == "incremental" else f"{pair}-{training}"
                        row = (
                            run,
                            task,
                            layer,
                            head,
                            AFTER,
                            pair,
                            training,
                            kind,
                            "grid",
                            8,
                            d,
                            0.2,
                            UNIFORM,
                            d / UNIFORM,
                        )
                        rows.append(row)
    columns = list(NONLOCALITY.columns)
    return pd.DataFrame(rows, columns=columns[: len(rows[0])]).reindex(columns=columns)


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> x and y of every line in `axes`."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def legend(figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


@pytest.mark.parametrize("first", [0, 1])
def test_lines_are_head_means_over_tasks(first):
    frame = table().sample(frac=1, random_state=0)  # the order of the rows says nothing
    figure = nonlocality_over_tasks.draw(frame, first=first)
    assert len(figure.axes) == 6
    for block, pair in zip(figure.subfigs, frame["pair"].unique(), strict=True):
        assert block.get_suptitle() == f"{BOTH[pair]}  ({pair})"
        for layer, axes in enumerate(block.axes):
            assert axes.get_title() == f"layer {layer + first}"
            drawn = lines(axes)
            for training, label in (("incremental", "CIL"), ("joint", "joint")):
                assert drawn[label][0] == [first + task for task in range(4)]
                assert drawn[label][1] == pytest.approx([mean(pair, training, layer, t) for t in range(4)])


def test_checkpoints_inside_tasks_are_no_points_of_the_lines():
    frame = table()
    inside = frame[frame["task"] == 1].assign(at_step=10, d_loc=0.0)
    figures = [
        nonlocality_over_tasks.draw(f) for f in (frame, pd.concat([frame, inside]), frame.drop(columns="at_step"))
    ]
    drawn = [[lines(axes) for axes in figure.axes] for figure in figures]
    assert drawn[0] == drawn[1] == drawn[2]


def test_references_are_labelled_once_and_visible_everywhere():
    figure = nonlocality_over_tasks.draw(table())
    assert legend(figure) == ["CIL", "joint", "CIL at initialisation", "uniform attention"]
    assert [len({axes.get_ylim() for axes in block.axes}) for block in figure.subfigs] == [1, 1]
    for block, pair in zip(figure.subfigs, BOTH, strict=True):
        for layer, axes in enumerate(block.axes):
            drawn, (low, high) = lines(axes), axes.get_ylim()
            assert drawn["uniform attention"][1] == [UNIFORM] * 2
            assert drawn["CIL at initialisation"][1] == pytest.approx([mean(pair, "incremental", layer, INITIAL)] * 2)
            assert all(low < y < high for _, ys in drawn.values() for y in ys)
            styles = {line.get_label(): line.get_linestyle() for line in axes.lines}
            assert (styles["uniform attention"], styles["CIL at initialisation"]) == (":", "--")


def test_axes_name_their_units():
    block = nonlocality_over_tasks.draw(table()).subfigs[0]
    assert "patches" in block.axes[0].get_ylabel() and block.get_supxlabel() == "task"


def test_terminal_twin_is_a_mark_at_the_last_task():
    figure = nonlocality_over_tasks.draw(table(trainings=("incremental", "joint-terminal")))
    (mark,) = [line for line in figure.axes[0].lines if line.get_label() == "joint, last task only"]
    assert list(mark.get_xdata()) == [3] and mark.get_linestyle() == "None" and mark.get_marker() != "None"


def test_one_run_with_one_task_and_no_twin():
    figure = nonlocality_over_tasks.draw(table({"pair": "GPSA"}, tasks=1, trainings=("incremental",)))
    assert legend(figure) == ["CIL", "CIL at initialisation", "uniform attention"]
    assert lines(figure.axes[0])["CIL"] == ([0], pytest.approx([mean("pair", "incremental", 0, 0)]))


def test_without_initial_rows_there_is_no_such_line():
    frame = table()
    assert "CIL at initialisation" not in legend(nonlocality_over_tasks.draw(frame[frame["task"] != INITIAL]))


@pytest.mark.parametrize(("layers", "rows", "columns"), [(5, 1, 5), (6, 1, 6), (7, 2, 4), (12, 2, 6)])
def test_many_layers_wrap(layers, rows, columns):
    figure = nonlocality_over_tasks.draw(table({"pair": "GPSA"}, range(layers), trainings=("incremental",)))
    assert [axes.get_title() for axes in figure.axes] == [f"layer {n}" for n in range(layers)]
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns)


def test_mixed_attention_is_named_per_layer():
    frame = table({"pair": "GPSA"})
    frame.loc[frame["layer"] == 0, "kind"] = "LPA"
    figure = nonlocality_over_tasks.draw(frame)
    assert figure.subfigs[0].get_suptitle() == "LPA + GPSA  (pair)"
    assert [axes.get_title() for axes in figure.axes] == ["layer 0, LPA", "layer 1, GPSA", "layer 2, GPSA"]


def test_missing_values_are_gaps_and_layers_without_any_are_left_out():
    frame = table({"pair": "GPSA"})
    frame.loc[frame["layer"] == 1, "d_loc"] = np.nan
    frame.loc[(frame["layer"] == 2) & (frame["task"] == 1) & (frame["head"] == 0), "d_loc"] = np.nan
    figure = nonlocality_over_tasks.draw(frame)
    assert [axes.get_title() for axes in figure.axes] == ["layer 0", "layer 2"]
    assert np.isnan(lines(figure.axes[1])["CIL"][1]).tolist() == [False, True, False, False]


def test_all_but_uniform_attention_looks_all_but_uniform():
    frame = table({"pair": "GPSA"})
    frame["d_loc"] = UNIFORM + 0.001 * frame["head"]
    low, high = nonlocality_over_tasks.draw(frame).axes[0].get_ylim()
    assert high - low >= nonlocality_over_tasks.LEAST_SPAN > 20 * (frame["d_loc"].max() - frame["d_loc"].min())


def test_only_what_lies_below_uniform_attention_is_folded():
    frame = table({"pair": "GPSA"})
    axes = nonlocality_over_tasks.draw(frame).axes[0]
    low, high = frame["d_loc"].min(), frame["d_loc"].max()

    def height(y):  # of the panel, 0 to 1
        return axes.transAxes.inverted().transform(axes.transData.transform((1, y)))[1]

    middle = (low + high) / 2
    assert height(high) - height(middle) == pytest.approx(height(middle) - height(low))  # even where there are values
    assert height(high) - height(low) > 0.5  # and most of the panel
    assert height(high) < height(UNIFORM) < 1
    assert f"{UNIFORM:.2f}" in [label.get_text() for label in axes.get_yticklabels()]
    near = frame.assign(d_loc=frame["d_loc"] - frame["d_loc"].max() + UNIFORM)
    assert nonlocality_over_tasks.draw(near).axes[0].get_yscale() == "linear"  # nothing to fold
    for spread in (0.3, 0.45, 0.6, 1.1):  # steps of 0.1, 0.15, 0.2, 0.25: each tick says where it is
        wide = table({"lpa": "LPA"}).assign(d_loc=lambda rows, spread=spread: 1.05 + spread * rows["task"] / 3)
        axes = nonlocality_over_tasks.draw(wide[wide["task"] >= 0]).axes[0]
        labels = [float(label.get_text()) for label in axes.get_yticklabels()]
        np.testing.assert_allclose(labels[:-1], axes.get_yticks()[:-1], atol=1e-9)


def test_tables_that_cannot_be_drawn_are_refused():
    frame = table()
    for bad, message in [
        (frame.drop(columns="pair"), r"lacks \['pair'\]"),
        (pd.concat([frame, frame[:1]]), "repeats the key"),
        (frame.assign(training="jiont"), "'jiont'; there: incremental, joint, joint-terminal, joint-as-long, model"),
        (frame[:0], "no value"),
        (frame.assign(d_loc=np.nan), "no value"),
    ]:
        with pytest.raises(ValueError, match=message):
            nonlocality_over_tasks.draw(bad)


IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)  # H, W: patches of 8 x 8 pixels
MAPS = np.random.default_rng(1).random((2, 3, 4, 6)).astype(np.float32)
LABELS = (["layer 1", "layer 2"], ["head 1", "head 2", "head 3"])


def panels(figure, name: str) -> list:
    return [axes for axes in figure.axes if axes.get_label().startswith(name)]


def test_maps_lie_over_the_grey_image():
    figure = attention_maps.draw(IMAGE, MAPS, *LABELS, title="which")
    (picture,) = panels(figure, "image")
    np.testing.assert_array_equal(picture.images[0].get_array(), IMAGE)
    for axes, expected in zip(panels(figure, "map"), MAPS.reshape(6, 4, 6), strict=True):
        under, over = axes.images
        assert under.get_array().shape == (32, 48) and under.get_cmap().name == "gray"
        np.testing.assert_array_equal(over.get_array(), expected)
        assert over.get_extent() == under.get_extent() and 0 < over.get_alpha() < 1
        assert over.get_interpolation() == "nearest"  # patches stay visible
    maps = panels(figure, "map")
    assert [axes.get_title() for axes in maps] == LABELS[1] + [""] * 3
    assert [axes.get_ylabel() for axes in maps] == ["layer 1", "", "", "layer 2", "", ""]
    assert "which" in [text.get_text() for text in figure.texts]


def test_shared_scale_is_one_range_and_one_bar():
    figure = attention_maps.draw(IMAGE, MAPS, *LABELS, unit="attention of the query")
    norms = {(axes.images[1].norm.vmin, axes.images[1].norm.vmax) for axes in panels(figure, "map")}
    assert norms == {(0, MAPS.max())}
    (bar,) = panels(figure, "bar")
    assert bar.get_ylabel() == "attention of the query" and bar.get_ylim() == (0, pytest.approx(MAPS.max()))


def test_each_panel_on_its_own_scale_says_so():
    figure = attention_maps.draw(IMAGE, MAPS, *LABELS, scale="each")
    bars = panels(figure, "bar")
    assert [axes.images[1].norm.vmax for axes in panels(figure, "map")] == list(MAPS.max((2, 3)).ravel())
    assert [bar.get_xlim()[1] for bar in bars] == pytest.approx(list(MAPS.max((2, 3)).ravel()))
    assert "attention, each panel on its own scale" in [text.get_text() for text in figure.texts]


def test_query_is_outlined_everywhere():
    figure = attention_maps.draw(IMAGE, MAPS, *LABELS, query=(1, 4))
    for axes in panels(figure, "image") + panels(figure, "map"):
        (box,) = axes.patches
        assert (box.get_xy(), box.get_width(), box.get_height(), box.get_fill()) == ((32, 8), 8, 8, False)
    assert not any(axes.patches for axes in panels(attention_maps.draw(IMAGE, MAPS, *LABELS), "map"))


def test_a_missing_panel_is_blank_and_keeps_its_labels():
    maps = MAPS.copy()
    maps[0, 0] = np.nan
    figure = attention_maps.draw(IMAGE, maps, *LABELS, query=(1, 4))
    first, *others = panels(figure, "map")
    assert not first.images and not first.patches
    assert (first.get_title(), first.get_ylabel()) == ("head 1", "layer 1")
    assert all(axes.images for axes in others)
    assert others[0].images[1].norm.vmax == np.nanmax(maps)


@pytest.mark.parametrize("scale", attention_maps.SCALES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (3, 4)])
@pytest.mark.parametrize("size", [(24, 64), (64, 24)])
def test_nothing_overlaps_or_leaves_the_page(shape, size, scale):
    image, maps = np.zeros((*size, 3), np.uint8), np.ones((*shape, size[0] // 8, size[1] // 8))
    labels = [f"demo-baseline-lpa, layer {n}" for n in range(shape[0])], [f"task number {n}" for n in range(shape[1])]
    figure = attention_maps.draw(image, maps, *labels, scale=scale, query=(0, 0), title="a title " * 12)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [text.get_window_extent() for text in figure.texts]
    boxes = [box for box in boxes if box.width > 1]
    for n, a in enumerate(boxes):
        assert a.x0 >= 0 and a.y0 >= 0 and a.x1 <= figure.bbox.x1 and a.y1 <= figure.bbox.y1
        for b in boxes[:n]:  # a pixel at 100 dpi is no overlap
            assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1.5 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1.5
    (picture,) = panels(figure, "image")
    assert picture.bbox.width / picture.bbox.height == pytest.approx(size[1] / size[0])
    assert picture.bbox.width >= panels(figure, "map")[0].bbox.width * 0.999


def test_maps_that_do_not_fit_are_refused():
    for change, message in [
        ({"scale": "row"}, "no scale 'row'; there: shared, each"),
        ({"image": IMAGE / 255}, "uint8"),
        ({"maps": MAPS[0]}, r"\[2, 3, g_h, g_w\], not \[3, 4, 6\]"),
        ({"maps": MAPS[:, :2]}, r"not \[2, 2, 4, 6\]"),
        ({"maps": -MAPS}, "below 0"),
        ({"maps": MAPS * np.nan}, "need a value"),
        ({"query": (4, 0)}, r"\(4, 0\) in a grid of 4 rows and 6 columns"),
    ]:
        arguments = {"image": IMAGE, "maps": MAPS, "row_labels": LABELS[0], "column_labels": LABELS[1], **change}
        with pytest.raises(ValueError, match=message):
            attention_maps.draw(**arguments)


DRAW_BOTH = """
import sys, numpy, pandas
from pathlib import Path
from figures import attention_maps, nonlocality_over_tasks, style
frame, out = pandas.read_csv(sys.argv[1]), Path(sys.argv[2])
maps = numpy.arange(24.0).reshape(1, 1, 4, 6)
for suffix in style.METADATA:
    style.save(nonlocality_over_tasks.draw(frame), out / f"tasks{suffix}")
    style.save(attention_maps.draw(numpy.zeros((8, 12, 3), "uint8"), maps, ["a"], ["b"]), out / f"maps{suffix}")
"""


def test_same_table_same_bytes_in_two_processes(tmp_path):
    table(layers=range(1), tasks=2).to_csv(tmp_path / "table.csv", index=False)
    drawing = []
    for seed, epoch in (("1", "0"), ("2", "1000000000")):  # neither the hash seed nor the date is in a file
        arguments = [sys.executable, "-c", DRAW_BOTH, str(tmp_path / "table.csv"), str(tmp_path / seed)]
        env = {**os.environ, "PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": epoch}
        drawing.append(subprocess.Popen(arguments, env=env, cwd=Path(__file__).parents[1]))
    assert [process.wait() for process in drawing] == [0, 0]
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert sorted(first) == sorted(f"{name}{suffix}" for name in ("tasks", "maps") for suffix in style.METADATA)
    assert first == second
    assert first["tasks.png"].startswith(b"\x89PNG") and first["tasks.pdf"].startswith(b"%PDF")


def test_save_leaves_the_old_file_and_no_part_when_it_fails(tmp_path):
    figure, path = nonlocality_over_tasks.draw(table()), tmp_path / "a.png"
    path.write_text("old")

    def fail(*args, **kwargs):
        Path(args[0]).write_text("half")
        raise OSError("disk full")

    figure.savefig = fail
    with pytest.raises(OSError, match="disk full"):
        style.save(figure, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_save_knows_three_suffixes_and_closes_what_pyplot_holds(tmp_path):
    figure = plt.figure()
    with pytest.raises(ValueError, match=r"'a.jpg'.*\.png, \.svg, \.pdf"):
        style.save(figure, tmp_path / "a.jpg")
    assert style.save(figure, tmp_path / "new" / "a.PNG").read_bytes().startswith(b"\x89PNG")
    assert figure.number not in plt.get_fignums()


def test_the_users_settings_stay_theirs_and_out_of_our_figures():
    settings = {"lines.linewidth": 9, "axes.titlelocation": "left"}  # one that our style sets, one that it does not
    with matplotlib.rc_context(settings):
        figure = nonlocality_over_tasks.draw(table())
        assert {name: matplotlib.rcParams[name] for name in settings} == settings
    assert figure.axes[0].get_title(loc="center") == "layer 0"
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "CIL"]
    assert line.get_linewidth() == style.STYLE["lines.linewidth"]


def run(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_command_draws_every_table_and_names_the_bad_one(tmp_path):
    results, out = tmp_path / "results", tmp_path / "drawn"
    for folder in ("good/deep", "bad"):
        (results / folder).mkdir(parents=True)
    NONLOCALITY.write(table(layers=range(1), tasks=2), results / "good/deep/nonlocality.csv")
    code, said, _ = run(results, "--out", out)
    drawn = [out / "good/deep" / f"nonlocality_over_tasks{suffix}" for suffix in (".png", ".pdf")]
    assert code == 0 and [line.removeprefix("wrote ") for line in said.splitlines()] == [str(path) for path in drawn]
    assert all(path.stat().st_size > 1000 for path in drawn)

    bad = results / "bad/nonlocality.csv"
    table().drop(columns="pair").to_csv(bad, index=False)
    code, said, complaint = run(results)
    assert code == 1 and complaint.startswith(f"Error: {bad}: table nonlocality lacks ['pair']")
    assert len(complaint.splitlines()) == 1 and complaint.count(str(bad)) == 1
    assert (results / "good/deep/nonlocality_over_tasks.pdf").is_file()


def test_command_without_folder_or_table(tmp_path):
    code, _, complaint = run(tmp_path / "nowhere")
    assert code == 2 and "nowhere' does not exist" in complaint
    code, _, complaint = run(tmp_path)
    assert code == 1 and complaint == f"Error: no table to draw in {tmp_path}; looked for runs.csv, nonlocality.csv\n"
