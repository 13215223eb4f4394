"""The command line's: all commands under one name."""

from __future__ import annotations

import click

from locality_probe import __version__
from locality_probe.commands.base import open_streams
from locality_probe.commands.compare import compare_command
from locality_probe.commands.demo import demo_command
from locality_probe.commands.doctor import doctor_command
from locality_probe.commands.heatmap import heatmap_command
from locality_probe.commands.measure import measure_command
from locality_probe.commands.recipes import recipes_command
from locality_probe.commands.reproduce import reproduce_command
from locality_probe.commands.spectrum import spectrum_command
from locality_probe.commands.sweep import sweep_command
from locality_probe.commands.train import train_command
from locality_probe.commands.transfer import transfer_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Does a vision transformer keep looking locally while it learns class after class, and does it pay?"""
    open_streams()


for command in (
    train_command,
    sweep_command,
    recipes_command,
    measure_command,
    doctor_command,
    compare_command,
    spectrum_command,
    transfer_command,
    heatmap_command,
    demo_command,
    reproduce_command,
):
    main.add_command(command)
