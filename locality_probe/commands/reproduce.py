"""The command line's: the paper with one command."""

from __future__ import annotations

from pathlib import Path

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, resumable, say
from locality_probe.typed import typed


@command("reproduce")
@click.option("--scale", default="demo", show_default=True, help="demo: digits, minutes | learned: ten classes of "
              "CIFAR-100, hours on 2 cores | small: CIFAR-100 cut to hours | paper: the protocol, for GPUs")  # fmt: skip
@click.option(
    "--only",
    type=options.Filled(),
    metavar="NAME,...",
    help="Only these: fig1 to fig9, gap, steps, curves, table1, table2, claims, report.",
)
@options.out("Folder.  [default: runs/reproduce-SCALE]")
@options.data("data")
@options.placement
@click.option("--dry-run", is_flag=True, help="Print the plan and what it costs; train, measure and draw nothing.")
@options.device()
def reproduce_command(scale, only, out, data_dir, executor, workers, threads, slurm, dry_run, device) -> None:
    """The paper with one command: train what is missing, measure, draw every figure and table, judge every claim, report.

    Prints its plan and the estimated time first. Interrupted, it goes on; repeated, it does nothing. Writes
    OUT/report.html, OUT/figures (PNG, PDF, CSV; claims.csv), OUT/tables (what was measured) and OUT/runs (weights).
    """
    from cil import sweep
    from figures.paper import plan, reproduce

    out, data_dir = out or Path("runs") / f"reproduce-{scale}", data_dir or "data"
    options.check_folder(out)
    names = list(dict.fromkeys(filter(None, (only or "").split(","))))
    typed(plan.check, scale, names)
    trained_on = device if executor == "slurm" else options.compute_on(device)  # the cluster's nodes have their own
    runs = len(plan.all_jobs(scale, out, data_dir))
    place = typed(sweep.choose_place, executor, runs, out, trained_on, workers, threads, list(slurm))
    device = options.compute_on("auto" if executor == "slurm" else device)
    with resumable():
        reproduce.reproduce(scale, names, out, data_dir, device, place, dry_run, say)
