"""The README is true: its commands exist, its Python runs, its files are there."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from figures.paper.artifacts import ARTIFACTS, build
from figures.paper.claims import judge
from figures.paper.study import load
from locality_probe.cli import main
from locality_probe.tables import CLAIMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
AS = re.compile(r"^(torchrun .*-m locality_probe|\.venv/bin/locality-probe|locality-probe) ")
COMMANDS = [
    AS.sub("locality-probe ", line.split("   #")[0].split(" > ")[0]).strip()
    for kind, block in BLOCKS if kind == "bash"
    for line in block.splitlines() if AS.match(line)
]  # fmt: skip


def test_every_command_is_in_the_readme_and_has_help():
    named = {command.split()[1] for command in COMMANDS}
    assert named == set(main.commands)
    assert all(command.help for command in main.commands.values())


@pytest.mark.parametrize("line", COMMANDS)
def test_readme_command_parses(line):
    name, *words = shlex.split(line)[1:]
    assert main.commands[name].make_context(name, words).info_name == name


def test_readme_recipes_exist():
    from cil import recipes

    for line in COMMANDS:
        words = shlex.split(line)
        if words[1] in ("train", "sweep"):
            settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            names = list(itertools.takewhile(lambda word: not word.startswith("-"), words[2:]))
            assert names and all(recipes.find(name).change(settings) for name in names)


def test_switches_of_the_released_code_are_as_the_readme_says():
    from cil import recipes

    ours, released = (
        recipes.find(f"{scale}-b10-10-baseline-lpa").to_dict() for scale in ("paper", "paper-as-released")
    )
    differ = {name: str(value).lower() for name, value in released.items() if value != ours[name] and name != "recipe"}
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)`.* \| `(\w+)`", README.split("### As released")[1], flags=re.M)
    assert {name: value for name, value, _ in rows} == differ
    assert {name: value for name, _, value in rows} == {name: str(ours[name]).lower() for name in differ}


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_readme_python_runs(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "blocks.0.attn" in capsys.readouterr().out


@pytest.mark.slow
def test_python_of_the_page_on_extending_runs():
    """All blocks in one script: each goes on with what the ones above have entered."""
    page = (ROOT / "docs/extending.md").read_text()
    script = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S))
    script += """
from locality_probe.doctor import examine_subject, find as find_model
assert [layer.how for layer in examine_subject(find_model("mine/tiny"))] == ["sdpa", "sdpa"]
"""
    told = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert "blocks.1.attn ok torch.Size([2, 3])" in told and told.endswith("joint\n")


def test_python_of_the_page_on_lpa_runs(capsys):
    page = (ROOT / "docs/lpa-in-your-model.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    space: dict = {}
    exec(compile(code, "lpa-in-your-model.md", "exec"), space)
    scales = space["probe"].result().table().groupby("layer")["content_scale"].mean()
    assert scales.tolist() == pytest.approx([1.0] * 6 + [0.02] * 6) and "content_scale" in capsys.readouterr().out


def test_files_named_on_the_page_on_extending_are_there():
    page = (ROOT / "docs/extending.md").read_text()
    names = re.findall(r"`((?:cil|locality_probe|docs|tests)/[\w./]+)`", page)
    names += [f"docs/{name}" for name in re.findall(r"\]\(((?!http|#)[^)]+)\)", page)]
    assert names and not [name for name in names if not (ROOT / name).exists()]


def test_the_readmes_table_of_figures_is_that_of_the_registry():
    rows = re.findall(r"^\| (\w[^|]*) \| `([\w,]+)` \|", README.split("`--only`")[1], flags=re.M)
    named = [name for _, names in rows for name in names.split(",")]
    pictured = re.findall(r"docs/small/(\w+)\.(?:png|md)", README)
    assert len(named) == len(set(named)) and {*named} <= {*ARTIFACTS} <= {*named, *pictured}
    for title, names in rows:
        for name in names.split(","):
            assert ARTIFACTS[name].title.startswith(title.replace("Figures 2, 3", f"Figure {name[-1]}"))


def test_files_named_in_the_readme_are_there():
    names = re.findall(r"`((?:cil|locality_probe|figures|data|benchmarks)/[\w./]*)`", README)
    names += re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert names and not [name for name in names if not (ROOT / name).exists()]


def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`?make (demo|test|check|figures)\b", README)) <= targets


def test_no_text_is_left_to_fill_in():
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "data/README.md"]:
        assert not re.findall(r"^[A-Z]+_[A-Z]+$", path.read_text(), flags=re.M)


def test_the_readme_says_what_the_committed_study_says():
    tables = load(ROOT / "data/results/small")
    judged = judge(tables)
    pd.testing.assert_frame_equal(CLAIMS.read(ROOT / "docs/small/claims.csv"), judged, check_dtype=False)
    whole = judged[judged["part"] == ""].set_index("claim")["verdict"].str.removesuffix(" at this scale")
    said = re.findall(r"^\| (C\d(?:\\\*)?) [^|]*\| \**([a-z ]+?)\** \|", README, flags=re.M)
    assert {claim.replace("\\", ""): verdict for claim, verdict in said} == whole.to_dict()

    frame = build(tables, ["table1"])["table1"][0].dropna(subset="ours")
    cells = re.findall(
        r"^\| \S* ?\| .* \| ([\d.]+ / [\d.]+ / [\d.]+) \| ([\d.]+ / [\d.]+ / [\d.]+) \| (\d) \|$", README, flags=re.M
    )
    expected = []
    for _, of in frame.groupby(["scenario", "system"], sort=False):
        published, ours = (" / ".join(f"{x:.2f}" for x in of[who]) for who in ("published", "ours"))
        expected.append((published, ours, str(of["seeds"].iloc[0])))
    assert cells == expected
    assert f"{tables['runs.csv']['steps'].sum():,}".replace(",", " ") in README
