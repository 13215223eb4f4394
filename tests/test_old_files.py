"""Files of the previous release open: run directories and tables of commit 2507e4c, trained and measured by it."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from cil.checkpoint import open_run
from cil.run import ADDED, FORMAT, Run
from cil.tables import AFTER
from cil.train import train
from locality_probe.plan import make_plan
from locality_probe.survey import survey
from locality_probe.tables import LAYERS, NONLOCALITY, NONLOCALITY_IMAGES

OLD = Path(__file__).parent / "of_2507e4c"


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(OLD, tmp_path / "old")


def test_a_run_opens_with_what_its_trainer_did():
    directory = open_run(OLD / "old")
    assert (directory.trainer, directory.device, directory.tasks) == (1, "", [0, 1])
    for format, added in ADDED.items():
        assert format > 1 and {name: getattr(directory.run, name) for name in added} == added
    assert open_run(OLD / "old-joint").run.is_twin_of(directory.run)


def test_it_is_measured_as_it_was_then(old):
    plan = make_plan([str(old / "old")], n=4)
    found = survey((make() for make in plan.subjects), plan.images)
    for file, table, frame in (
        ("nonlocality.csv", NONLOCALITY, found.nonlocality),
        ("layers.csv", LAYERS, found.layers),
    ):
        before = table.read(OLD / "measured" / file)
        assert set(before["at_step"]) == {AFTER}
        new = [*before.columns[before.isna().all()], "places", "grid"]  # columns that there were not then
        assert set(new) & set(before) <= set(table.added) | {"gate", "content_scale"}
        kept = [name for name in before if name not in new]
        pd.testing.assert_frame_equal(before[kept], table.check(frame)[kept], rtol=1e-5, atol=1e-6)  # CPUs round apart
    images = NONLOCALITY_IMAGES.read(OLD / "measured/nonlocality_images.parquet")
    kept = [name for name in images if images[name].notna().any()]
    pd.testing.assert_frame_equal(images[kept], NONLOCALITY_IMAGES.check(found.per_image)[kept], rtol=1e-5, atol=1e-6)


def test_words_of_an_earlier_version_are_translated(tmp_path):
    """How a layer is seen was `fused` or `written out`; timm's words are `sdpa` and `eager`."""
    layers = LAYERS.read(OLD / "measured/layers.csv")
    old_words = ["fused", "written out", "asked"]
    layers = pd.concat([layers[:1].assign(layer=layer, how=how) for layer, how in enumerate(old_words)])
    layers.to_csv(tmp_path / "layers.csv", index=False)
    assert LAYERS.read(tmp_path / "layers.csv")["how"].tolist() == ["sdpa", "eager", "asked"]
    assert LAYERS.check(layers)["how"].tolist() == ["sdpa", "eager", "asked"]
    assert layers["how"].tolist() == old_words  # the frame that was given stays as it is


def test_a_finished_run_is_left_alone_and_an_unfinished_one_is_not_mixed(old):
    before = {path: path.read_bytes() for path in (old / "old").glob("*.*")}
    train(open_run(old / "old").run, old / "old", report=lambda p: pytest.fail("it trained again"))
    assert before == {path: path.read_bytes() for path in before}
    words = r"unfinished was begun by an earlier version \(trainer 1\).*finish it with that version \(2507e4c\w*\), or choose"
    with pytest.raises(ValueError, match=words):
        train(open_run(old / "unfinished").run, old / "unfinished")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda content: content | {"format": FORMAT + 1},
            f"format {FORMAT + 1}; this version reads formats 1 to {FORMAT}",
        ),
        (lambda content: content | {"format": FORMAT, "trainer": 2, "device": ""}, "lacks .*'gate_init'"),
        (lambda content: content | {"format": FORMAT}, "lacks trainer, device"),
    ],
)
def test_nothing_else_is_silently_defaulted(change, words, old):
    path = old / "old/run.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=words):
        open_run(old / "old")


def test_a_setting_is_added_once():
    added = [name for names in ADDED.values() for name in names]
    assert len(added) == len(set(added)) and max(ADDED) == FORMAT and set(added) <= set(Run().to_dict())
