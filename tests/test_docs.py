"""The README is true: its commands exist, its Python runs, its files are there."""

import re
import shlex
from pathlib import Path

import pytest

from locality_probe.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split("   #")[0].split(" > ")[0].removeprefix(".venv/bin/").strip()
    for kind, block in BLOCKS if kind == "bash"
    for line in block.splitlines() if "locality-probe " in line
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
        if words[1] == "train":
            settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            recipes.find(words[2]).change(settings)


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_readme_python_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "blocks.0.attn" in capsys.readouterr().out


def test_files_named_in_the_readme_are_there():
    names = re.findall(r"`((?:cil|locality_probe|figures|data|benchmarks)/[\w./]*)`", README)
    names += re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert names and not [name for name in names if not (ROOT / name).exists()]


def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`?make (demo|test|check|figures)\b", README)) <= targets


def test_no_text_is_left_to_fill_in():
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "data/README.md"]:
        assert not re.findall(r"^[A-Z]+_[A-Z]+$", path.read_text(), flags=re.M)
