"""The house: who may import whom. Change this table, the README's map and the code together."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("cil", "locality_probe", "figures")
TABLES = (
    "cil.tables",
    "cil.files",
    "cil.text",
    "locality_probe.tables",
)  # what a drawing module may know of the other floors


def allowed(file: str) -> tuple[str, ...]:
    """Prefixes of the modules of ours that a file may import."""
    package = file.split("/")[0]
    if file.startswith("figures/paper/"):
        return OURS
    if package == "figures":
        drawing = tuple(f"figures.{path.stem}" for path in sorted((ROOT / "figures").glob("*.py")))
        return (*drawing, *TABLES, *["figures.paper"] * (file == "figures/__main__.py"))
    return {"cil": ("cil",), "locality_probe": ("cil", "locality_probe")}[package]


def imports(path: Path, inside_functions: bool = True):
    """Modules of ours that a file imports, as dotted names with the imported name: `from cil import x` is cil.x."""
    tree = ast.parse(path.read_text())
    skip = set()
    if not inside_functions:
        skip = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if node in skip:
            continue
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def files():
    return [str(p.relative_to(ROOT)) for package in OURS for p in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("file", files())
def test_arrows_go_up(file):
    # Commands draw, inside their bodies.
    found = imports(ROOT / file, inside_functions=not file.startswith("locality_probe/commands/"))
    wrong = [
        name for name in found
        if name.split(".")[0] in OURS and not any(f"{name}.".startswith(f"{a}.") for a in allowed(file))
    ]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("file", ["cil/tables.py", "locality_probe/tables.py"])
def test_tables_need_pandas_alone(file):
    third_party = {name.split(".")[0] for name in imports(ROOT / file)} - {
        "__future__",
        "os",
        "math",
        "re",
        "dataclasses",
        "pathlib",
    }
    assert third_party <= {"pandas", "cil"}


def test_measures_know_no_model_file_or_device():
    names = {*imports(ROOT / "locality_probe/measures.py"), *imports(ROOT / "locality_probe/geometry.py")}
    assert all(name.startswith("locality_probe.geometry") for name in names if name.startswith("locality_probe"))
    others = {name.split(".")[0] for name in names} - {"locality_probe"}
    assert others <= {"__future__", "collections", "contextlib", "functools", "math", "torch"}


LIGHT = {
    "importlib",
    "typing",
    "__future__",
    "contextlib",
    "errno",
    "functools",
    "os",
    "re",
    "signal",
    "threading",
    "sys",
    "collections",
    "dataclasses",
    "pathlib",
    "click",
}
COMMAND_LINE = [f for f in files() if f.startswith("locality_probe/commands/")]


@pytest.mark.parametrize("file", ["locality_probe/cli.py", "locality_probe/typed.py", *COMMAND_LINE])
def test_top_level_of_the_command_line_is_light(file):
    names = set(imports(ROOT / file, inside_functions=False))
    ours = {name for name in names if name.startswith("locality_probe.")}
    assert {name.split(".")[0] for name in names - ours} <= LIGHT
    allowed = ("locality_probe.commands.", "locality_probe.typed.", "locality_probe.__version__")
    assert all(name.startswith(allowed) for name in ours)
