"""The public names of cil and locality_probe: what a notebook imports, without waiting for what it does not use."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import cil
import locality_probe

ROOT = Path(__file__).parents[1]
PACKAGES = [cil, locality_probe]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there_and_is_that_of_its_module(package):
    for name, module in package.PUBLIC.items():
        assert getattr(package, name) is getattr(importlib.import_module(f"{package.__name__}.{module}"), name)
    assert package.__all__ == list(package.PUBLIC) and set(package.PUBLIC) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_that_of_a_module(package):
    assert not set(package.PUBLIC) & {module.name for module in pkgutil.iter_modules(package.__path__)}


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_same_names(package):
    """The imports under TYPE_CHECKING are those that __getattr__ makes."""
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"{package.__name__}.{module}" for name, module in package.PUBLIC.items()}


def test_importing_them_loads_nothing_heavy():
    code = """
import sys
import cil, locality_probe
loaded = {"torch", "timm", "numpy", "pandas", "matplotlib", "PIL", "sklearn", "figures"} & set(sys.modules)
assert not loaded, loaded
from locality_probe import Probe
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_each_package_is_typed_and_installed_with_its_marker():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("cil", "locality_probe", "figures"):
        assert (ROOT / package / "py.typed").exists() and "py.typed" in settings["package-data"][package]
