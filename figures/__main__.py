"""python -m figures RESULTS: draw every table that there is a figure for, without training or measuring anything."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("results", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: beside each table]")
def main(results: Path, out: Path | None) -> None:
    """Draw what lies under RESULTS: all figures, tables, claims and the report of each study (a folder with runs.csv), and
    nonlocality_over_tasks.png and .pdf of each nonlocality.csv.

    What cannot be drawn is named, the rest is drawn all the same, and the exit code is 1.
    """
    found = sorted(path for name in DRAWN for path in results.rglob(name))
    if not found:
        raise click.ClickException(f"no table to draw in {results}; looked for {', '.join(DRAWN)}")
    failed = False
    for path in found:
        folder = out / path.parent.relative_to(results) if out else path.parent
        try:
            DRAWN[path.name](path, folder)
        except (ValueError, OSError) as error:
            failed = True
            reason = str(error)
            click.echo("Error: " + (reason if str(path) in reason else f"{path}: {reason}"), err=True)
    sys.exit(failed)


def draw_study(path: Path, folder: Path) -> None:
    from figures.paper import page, report
    from figures.paper.artifacts import build
    from figures.paper.claims import judge
    from figures.paper.study import load

    tables = load(path.parent)
    built, judged = build(tables), judge(tables)
    page.write(built, tables, folder, click.echo)
    page.write_claims(judged, folder, click.echo)
    click.echo(f"wrote {report.write(tables, built, judged, folder / 'report.html')}")


def draw_measurement(path: Path, folder: Path) -> None:
    from figures import nonlocality_over_tasks, style
    from locality_probe.tables import INTERVALS, NONLOCALITY

    beside = path.with_name("intervals.csv")
    sure = INTERVALS.read(beside) if beside.is_file() else None
    figure = nonlocality_over_tasks.draw(NONLOCALITY.read(path), sure)
    for suffix in (".png", ".pdf"):
        click.echo(f"wrote {style.save(figure, folder / f'nonlocality_over_tasks{suffix}')}")


DRAWN = {"runs.csv": draw_study, "nonlocality.csv": draw_measurement}  # what lies there -> how it is drawn


if __name__ == "__main__":
    main(prog_name="python -m figures")
