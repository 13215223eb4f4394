"""The command line as a whole: help without torch, and the list of recipes."""

import subprocess
import sys
from pathlib import Path

from conftest import flat, invoke, run_ok

from cil import recipes
from locality_probe.cli import main


def test_help_is_there_for_every_command_and_loads_nothing_heavy():
    code = """
import sys
from click.testing import CliRunner
from locality_probe.cli import main
for name in [None, *main.commands]:
    result = CliRunner().invoke(main, [name, "--help"] if name else ["-h"])
    assert result.exit_code == 0 and "Usage:" in result.stdout, result.output
assert CliRunner().invoke(main, ["--version"]).exit_code == 0
heavy = {"torch", "timm", "numpy", "pandas", "matplotlib", "PIL", "sklearn", "figures"} & set(sys.modules)
heavy |= {name for name in sys.modules if name.startswith("cil.")} - {"cil.lazy"}
assert not heavy, heavy
"""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    helped = subprocess.run([sys.executable, "-m", "locality_probe", "-h"], check=True, cwd=root, capture_output=True)
    assert all(name in helped.stdout.decode() for name in main.commands)
    for command in main.commands.values():
        assert command.help
        assert all(option.help for option in command.params if option.param_type_name == "option")


def test_recipes_are_listed_with_their_cost():
    text = run_ok("recipes").stdout
    assert all(name in text for name in recipes.RECIPES) and "63.11 / 74.74 / 12.52" in flat(text)
    few = [line for line in run_ok("recipes", "b50-5-dytox").stdout.splitlines() if not line.startswith(" ")]
    assert few and all("b50-5-dytox" in name for name in few)
    wrong = invoke("recipes", "b51")
    assert wrong.exit_code == 2 and "no recipe holds 'b51'" in wrong.stderr
