"""python -m figures RESULTS: draw every table that there is a figure for, without training or measuring anything."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: beside each table]")
def main(results: Path, out: Path | None) -> None:
    """Draw each nonlocality.csv under RESULTS as nonlocality_over_tasks.png and .pdf.

    A table that cannot be drawn is named, the others are drawn all the same, and the exit code is 1.
    """
    from figures import nonlocality_over_tasks, style
    from locality_probe.tables import NONLOCALITY

    figures = {"nonlocality.csv": (NONLOCALITY, nonlocality_over_tasks)}  # a new figure of a table is a line here
    tables = sorted(path for name in figures for path in results.rglob(name))
    if not tables:
        raise click.ClickException(f"no table to draw in {results}; looked for {', '.join(figures)}")
    failed = False
    for path in tables:
        table, module = figures[path.name]
        folder = out / path.parent.relative_to(results) if out else path.parent
        try:
            figure = module.draw(table.read(path))
            for suffix in (".png", ".pdf"):
                name = module.__name__.rpartition(".")[2] + suffix
                click.echo(f"wrote {style.save(figure, folder / name)}")
        except (ValueError, OSError) as error:
            failed = True
            reason = str(error)
            click.echo("Error: " + (reason if str(path) in reason else f"{path}: {reason}"), err=True)
    sys.exit(failed)


if __name__ == "__main__":
    main(prog_name="python -m figures")
