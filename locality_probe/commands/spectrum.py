"""The command line's: eigenvalues of features."""

from __future__ import annotations

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, say, warn


@command("spectrum")
@click.argument("runs", nargs=-1, required=True, metavar="RUN_DIR...")
@options.n("all test images")
@options.seed
@options.tasks
@options.data("where the run found it")
@options.out("Folder for tables and figure.  [default: the first RUN_DIR]")
@options.threads
@options.device()
def spectrum_command(runs, n, seed, tasks, data_dir, out, threads, device) -> None:
    """Eigenvalues of the covariance of features, of seen, new and future classes, at each task; joint twins beside them.

    Features are the mean patch token after each block and the token that the newest head is fed. Writes spectrum.parquet,
    spectrum_summary.csv (effective rank, participation ratio, RankMe, slope, ...), spectrum_measurement.json, spectrum.png.
    """
    directories, out, device = options.open_runs(runs, tasks, out, device, threads)
    import figures.spectra
    from cil.progress import counter
    from figures import style
    from locality_probe import spectra

    with counter(sum(1 + len(d.tasks) for d in directories), "networks measured") as report:
        found = spectra.spectra(directories, list(tasks), n, seed, data_dir, device, report, warn)
    paths = [*found.write(out), style.save(figures.spectra.draw(found.spectrum), out / "spectrum.png")]
    say(spectra.format_table(found.summary))
    say(f"wrote {', '.join(map(str, paths))}")
