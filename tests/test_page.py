"""What is written of a study: drawings with their tables and provenance, byte by byte the same."""

import hashlib

import made_up
import pytest
from click.testing import CliRunner

from figures.__main__ import main
from figures.paper import page
from figures.paper.artifacts import ARTIFACTS, NotRun, build
from figures.paper.study import load
from locality_probe.tables import STUDY


@pytest.fixture(scope="module")
def tables():
    return made_up.make()


@pytest.fixture(scope="module")
def folder(tables, tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    for file, table in STUDY.items():
        table.write(tables[file], path / file)
    return path


@pytest.mark.slow
def test_command_writes_each_figure_with_its_table_and_provenance_byte_by_byte_the_same(folder, tmp_path):
    digests = []
    for place in ("a", "b"):
        result = CliRunner().invoke(main, [str(folder), "--out", str(tmp_path / place)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / place).iterdir()}
        digests.append(files)
    assert digests[0] == digests[1]
    kinds = {name: {"csv", "txt"} | ({"md"} if name.startswith("table") else {"png", "pdf"}) for name in ARTIFACTS}
    expected = {f"{name}.{suffix}" for name, suffixes in kinds.items() for suffix in suffixes}
    assert set(digests[0]) == expected | {"claims.csv", "claims.md", "report.html"}
    line = (tmp_path / "a/fig4.txt").read_text()
    assert (
        "6 runs, seeds 0, 1, 2" in line and "trained at abc" in line and "nonlocality: 8 images of digits, test" in line
    )
    assert "transfer" not in line and "transfer: " in (tmp_path / "a/fig5.txt").read_text()


def test_a_drawing_of_what_is_no_longer_there_goes(tables, tmp_path):
    page.write(build(tables, ["fig8"]), tables, tmp_path, echo=lambda line: None)
    assert (tmp_path / "fig8.png").is_file()
    said = []
    page.write({"fig8": NotRun("no run")}, tables, tmp_path, said.append)
    assert not list(tmp_path.iterdir()) and said == ["fig8: not run (no run)"]


def test_no_study_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"holds no runs.csv"):
        load(tmp_path)
