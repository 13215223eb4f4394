"""The command line's: list the recipes."""

from __future__ import annotations

import click

from locality_probe.commands.base import command
from locality_probe.typed import Typed


@command("recipes")
@click.argument("text", default="")
def recipes_command(text) -> None:
    """List the recipes whose names hold TEXT; each also has -joint, -joint-terminal and -joint-as-long."""
    import textwrap

    from cil.recipes import RECIPES
    from cil.text import columns

    found = {name: function for name, function in RECIPES.items() if text in name}
    if not found:
        raise Typed(f"no recipe holds {text!r}; `locality-probe recipes` lists them")
    for name, function in found.items():
        about = " ".join((function.__doc__ or "").split())
        lines = textwrap.wrap(about, columns() - 4, break_long_words=False, break_on_hyphens=False)
        click.echo("\n    ".join([name, *lines]))
