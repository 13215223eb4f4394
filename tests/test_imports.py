"""The house: who may import whom. Change this table, the README's map and the code together."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("cil", "locality_probe", "figures")
TABLES = ("cil.tables", "cil.files", "locality_probe.tables")
# What orchestrates: demo and reproduce train and measure, paper and report gather tables; the other figures only draw.
EVERYTHING = ("figures/demo.py", "figures/paper.py", "figures/report.py", "figures/reproduce.py")
JUDGES = {"figures/claims.py": ("cil.evaluate", "locality_probe.intervals")}  # pure functions over tables


def allowed(file: str) -> tuple[str, ...]:
    package = file.split("/")[0]
    if file in EVERYTHING:
        return OURS
    if package == "figures":
        return ("figures", *TABLES, *JUDGES.get(file, ()))
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
    # The command line draws, inside its command bodies.
    found = imports(ROOT / file, inside_functions=file != "locality_probe/cli.py")
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
        "dataclasses",
        "pathlib",
    }
    assert third_party <= {"pandas", "cil"}


def test_measures_know_no_model_file_or_device():
    names = {name.split(".")[0] for name in imports(ROOT / "locality_probe/measures.py")}
    assert names <= {"__future__", "dataclasses", "functools", "math", "torch"}


def test_top_level_of_the_command_line_is_light():
    names = {name.split(".")[0] for name in imports(ROOT / "locality_probe/cli.py", inside_functions=False)}
    assert names <= {"__future__", "contextlib", "errno", "collections", "pathlib", "click", "locality_probe"}
