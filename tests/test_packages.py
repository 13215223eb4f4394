"""What a build ships: every folder of ours that holds Python files, and the files that are not Python."""

from pathlib import Path

from setuptools import find_packages
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).parents[1]
OURS = ("cil", "locality_probe", "figures")


def test_every_folder_with_python_files_is_shipped():
    shipped = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["packages"]["find"]
    assert shipped["namespaces"] is False  # a folder without __init__.py is none: the next line tells
    packages = set(find_packages(ROOT, include=shipped["include"]))
    folders = {path.parent.relative_to(ROOT) for name in OURS for path in (ROOT / name).rglob("*.py")}
    assert packages == {".".join(folder.parts) for folder in folders}


def test_files_that_are_not_python_are_shipped():
    named = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["package-data"]
    shipped = {path for package, patterns in named.items() for pattern in patterns
               for path in ROOT.joinpath(*package.split(".")).glob(pattern)}  # fmt: skip
    there = {path for name in OURS for path in (ROOT / name).rglob("*") if path.is_file()}
    assert shipped == {path for path in there if path.suffix not in (".py", ".pyc")}
