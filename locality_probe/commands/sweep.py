"""The command line's: train many recipes and seeds."""

from __future__ import annotations

from pathlib import Path

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, resumable, say
from locality_probe.typed import typed


@command("sweep")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--seeds", metavar="N,N,...", help="Train each recipe with each seed.  [default: the recipe's own]")
@options.settings
@options.out("Folder of the runs.", Path("runs"))
@options.data("the recipe's data_dir")
@options.placement
@click.option("--status", is_flag=True, help="Print the table of these runs; train nothing.")
@click.option("--dry-run", is_flag=True, help="The same, and where and with how many threads they would run.")
@options.device()
def sweep_command(
    recipes, seeds, settings, out, data_dir, executor, workers, threads, slurm, status, dry_run, device
) -> None:
    """Train each RECIPE with each seed, as many at once as there is room for; the table of all is OUT/sweep.csv.

    Runs lie in OUT/RECIPE, with --seeds in OUT/NAME-sSEED, their joint twins in OUT/NAME-sSEED-joint. Those that are
    finished are not repeated, those that were interrupted go on. One that fails does not stop the others: exit code 1.
    """
    from cil import sweep

    seeds = None if seeds is None else typed(sweep.parse_seeds, seeds)
    jobs = typed(sweep.expand, list(recipes), seeds, options.with_data(settings, data_dir), out)
    for job in jobs:
        options.check_settings(job.run)
    device = device if executor == "slurm" else options.compute_on(device)  # the cluster's nodes have their own
    place = typed(sweep.choose_place, executor, len(jobs), out, device, workers, threads, list(slurm))
    if not (status or dry_run):
        options.check_folder(out)
    jobs = sweep.planned(jobs)
    if status or dry_run:
        say(sweep.format_table(sweep.status(jobs, out)) + f"\n{place}" * dry_run)
        return
    with resumable():
        table = sweep.sweep(jobs, place, out)
    say(sweep.format_table(table))
    if (table["state"] == "failed").any():
        raise SystemExit(1)
