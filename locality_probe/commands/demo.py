"""The command line's: the demonstration."""

from __future__ import annotations

from pathlib import Path

from locality_probe.commands import options
from locality_probe.commands.base import command, resumable, say


@command("demo")
@options.out("Folder of its runs, tables and figures.", Path("runs/demo"))
@options.threads
@options.device("cpu")
def demo_command(out, threads, device) -> None:
    """Train, measure and draw on embedded digits: baseline and baseline + LPA with their joint twins; a few minutes.

    Two trainings run at once, with one thread each or --threads. Interrupted and started again, it goes on where it was.
    """
    options.check_folder(out)
    from figures.paper.demo import run_demo

    device = options.compute_on(device, threads)
    with resumable():
        run_demo(out, say, device, threads or 1)
