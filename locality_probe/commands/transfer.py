"""The command line's: which layers serve classes yet to come."""

from __future__ import annotations

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, say, warn


@command("transfer")
@click.argument("runs", nargs=-1, required=True, metavar="RUN_DIR...")
@click.option("--per-class", type=click.IntRange(2), default=50, show_default=True, help="Training images of a class.")
@click.option("--test-per-class", type=click.IntRange(2), default=20, show_default=True, help="Test images of a class.")
@options.seed
@options.tasks
@options.data("where the run found it")
@options.out("Folder for tables and figure.  [default: the first RUN_DIR]")
@options.threads
@options.device()
def transfer_command(runs, per_class, test_per_class, seed, tasks, data_dir, out, threads, device) -> None:
    """How well each layer serves seen and future classes: kNN and a linear probe after each task; CKA; and locality.

    Joint twins are measured beside their runs. Controls: the network as initialised, shuffled labels. Writes transfer.csv,
    cka.csv (to the twin and to task 0), transfer_locality.csv (rank correlation with D_loc over layers), transfer.png.
    """
    directories, out, device = options.open_runs(runs, tasks, out, device, threads)
    import figures.transfer
    from cil.progress import counter
    from figures import style
    from locality_probe import transfer

    with counter(sum(1 + len(tasks or d.tasks) for d in directories), "networks measured") as report:
        found = transfer.transfer(
            directories, list(tasks), per_class, test_per_class, seed, data_dir, device, report, warn
        )
    paths = found.write(out)
    if (found.transfer["group"] == "future").any():
        figure = figures.transfer.draw(found.transfer, found.nonlocality)
        paths.append(style.save(figure, out / "transfer.png"))
    say(transfer.format_tables(found))
    say(f"wrote {', '.join(map(str, paths))}")
