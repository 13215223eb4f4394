"""The paper with one command: train what is missing, measure it, draw, judge, report. Interrupted, it goes on.

What is there is told by the study's tables alone (figures.paper.study): a run that is measured need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cil import sweep
from cil.progress import counter
from cil.sweep import Job
from figures.paper import page, report
from figures.paper.artifacts import ARTIFACTS, build
from figures.paper.claims import judge
from figures.paper.cost import describe, lacking
from figures.paper.plan import Work, check, is_finished, plan_work
from figures.paper.scales import SCALES
from figures.paper.study import Measuring, load, measure_all


def reproduce(
    scale: str, only: Iterable[str], out: Path, data_dir: str, device: str, place: sweep.Place, dry_run: bool = False,
    echo: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Everything that is missing of a scale, or of the figures and tables in `only`, into `out`.

    place: where runs are trained; device: of this machine, which measures them. out/runs: run directories; out/tables: the
    study; out/figures, out/report.html. Raises ValueError as `check` does, for data that are not there, and at the end for
    runs and measurements that failed.
    """
    check(scale, only)
    work = plan_work(scale, list(only), out, data_dir)
    missing, to_train = work.missing(), work.to_train()
    if not missing and not dry_run and work.stamp() == read_stamp(out):
        echo(f"nothing to do: {out / 'report.html' if 'report' in work.names else out / 'figures'} is up to date")
        return
    echo(describe(work, missing, to_train, place, device))
    absent = lacking(to_train)
    if dry_run:
        for words in absent:
            echo(f"data: {words}")
        return
    failed = measure_trained(work, place, device, echo)
    if absent:
        raise ValueError("\n".join(absent))
    failed += train_and_measure(work, to_train, place, device)
    draw_and_judge(work, echo)
    if failed:
        raise ValueError("\n".join(["not everything could be made; the same command tries again:", *failed]))
    (out / ".drawn").write_text(work.stamp())


def read_stamp(out: Path) -> str:
    """The stamp of the last drawing in `out`; empty where there is none."""
    return (out / ".drawn").read_text() if (out / ".drawn").is_file() else ""


def measure_trained(work: Work, place: sweep.Place, device: str, echo: Callable[[str], None]) -> list[str]:
    """Measure the finished runs, on this machine; returns a sentence for each measurement that failed."""
    wanted = [(kind, path) for kind, path in work.missing() if is_finished(path)]
    if not wanted:
        return []
    echo(f"measuring: {len(wanted)} measurements of {len({path for _, path in wanted})} runs")
    # A cluster trains all runs at once; this machine measures as many as it has room for.
    here = sweep.choose_place("local", len(wanted), work.out, device, None, None, [])
    workers = min(place.workers, here.workers)
    with counter(len(wanted), "measurements") as shown:
        return measure_all(work.study, wanted, SCALES[work.scale].sizes, work.data_dir, device, workers, shown)


def train_and_measure(work: Work, to_train: list[Job], place: sweep.Place, device: str) -> list[str]:
    """Train runs, and measure each as it finishes; returns a sentence for each run and measurement that failed."""
    if not to_train:
        return []
    with Measuring(work.study, SCALES[work.scale].sizes, work.data_dir, device, 1) as measuring:

        def watch(finished: list[Job]) -> None:
            paths = {job.path for job in finished}
            for kind, path in work.missing() if finished else []:
                if path in paths:
                    measuring.ask(kind, path)
            measuring.collect()

        table = sweep.sweep(sweep.planned(to_train), place, work.out, watch)
    return measuring.failed + [f"{row.run}: {row.reason}" for row in table.itertuples() if row.state == "failed"]


def draw_and_judge(work: Work, echo: Callable[[str], None]) -> None:
    """Write what was asked for, as far as the study has it."""
    if not (work.out / "tables/runs.csv").is_file():
        return
    tables = load(work.out / "tables")
    built = build(tables, None if "report" in work.names else [name for name in work.names if name in ARTIFACTS])
    page.write({name: built[name] for name in work.names if name in built}, tables, work.out / "figures", echo)
    if "claims" in work.names or "report" in work.names:
        judged = judge(tables)
    if "claims" in work.names:
        page.write_claims(judged, work.out / "figures", echo)
    if "report" in work.names:
        echo(f"wrote {report.write(tables, built, judged, work.out / 'report.html')}")
