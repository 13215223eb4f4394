"""The command line's: who looks farther."""

from __future__ import annotations

import os

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, say, warn
from locality_probe.typed import Typed


@command("compare")
@click.argument("first", metavar="CIL_DIR")
@click.argument("second", metavar="JOINT_DIR")
@click.option("--and", "more", nargs=2, multiple=True, metavar="CIL_DIR JOINT_DIR", help="The same pair with another seed: "
              "intervals are then over seeds; repeatable.")  # fmt: skip
@options.images("the first run's own test images")
@options.n("256, or all of a smaller set", least=2)
@options.seed
@options.tasks
@options.data("where the run found it")
@options.out("Folder for table and figure.  [default: CIL_DIR, or .]")
@options.as_json("the rows of comparison.csv")
@options.threads
@options.device()
def compare_command(first, second, more, images, n, seed, tasks, data_dir, out, as_json, threads, device) -> None:
    """Does CIL_DIR look farther than JOINT_DIR? Per task and layer, the paired difference, its interval and a verdict.

    Both may be any two runs or weights files of networks whose layers and grids pair. Writes comparison.csv and
    comparison.png.
    """
    pairs = [(first, second), *more]
    paths = [path for pair in pairs for path in pair]
    real = [os.path.realpath(path) for path in paths]
    if len(set(real)) < len(real):
        raise Typed(f"{paths[real.index(max(real, key=real.count))]} is given twice: compare different runs")
    options.check_places(paths)
    if out:
        options.check_folder(out)
    from cil.progress import counter
    from figures import comparison, style
    from locality_probe import compare
    from locality_probe.plan import make_plan
    from locality_probe.tables import COMPARISON

    device = options.compute_on(device, threads)
    plan = make_plan(paths, images=images, n=n, seed=seed, tasks=list(tasks), data_dir=data_dir, warn=warn, twins=False)
    out = out or plan.out
    options.check_folder(out)
    for sentence in compare.confounders(pairs):
        warn(sentence)
    with counter(len(plan.subjects), "models measured") as report:
        frame = compare.measure(plan, pairs, device, report)
    out.mkdir(parents=True, exist_ok=True)
    written = [
        COMPARISON.write(frame, out / "comparison.csv"),
        style.save(comparison.draw(frame), out / "comparison.png"),
    ]
    if as_json:
        click.echo(frame.to_json(orient="records", double_precision=15))
        return
    say(compare.format_table(frame))
    say(f"wrote {', '.join(map(str, written))}")
