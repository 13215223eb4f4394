"""The command line's: measure runs, weights files and models."""

from __future__ import annotations

from pathlib import Path

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, say, warn
from locality_probe.typed import Typed


@command("measure")
@click.argument("ckpts", nargs=-1, metavar="[CKPT_DIR|WEIGHTS]...")
@options.model
@options.weights
@options.pretrained
@options.image_size
@options.grid
@options.prefix
@options.images("dataset, the run's own test images; photos for --model")
@options.n("256, or all of a smaller set")
@options.seed
@options.tasks
@options.data("where the run found it")
@options.out("Folder for the tables.  [default: the first CKPT_DIR, or .]")
@click.option("--force", is_flag=True, help="Replace another measurement in that folder.")
@options.as_json("the rows of nonlocality.csv", "write no tables unless there is --out")
@options.threads
@options.device()
def measure_command(
    ckpts, model, weights, pretrained, image_size, grid, prefix, images, n, seed, tasks, data_dir, out, force, as_json,
    threads, device,
) -> None:  # fmt: skip
    """Nonlocality D_loc of every task, layer and head of runs, with the joint twin beside each if it is there.

    Writes nonlocality.csv, 95 % intervals over images and, for several runs, over seeds (intervals.csv), per-image values
    (nonlocality_images.parquet), layers.csv (what was measured and what was skipped, and why) and measurement.json. The
    same again replaces them; a measurement of others, or on other images, is not replaced without --force.
    """
    if bool(ckpts) == bool(model):
        raise Typed("give run directories or weights files, or --model timm/NAME")
    if (weights or pretrained or image_size or grid or prefix is not None) and not model:
        raise Typed("--weights, --pretrained, --image-size, --grid and --prefix go with --model")
    if tasks and all(Path(c).is_file() for c in ckpts):
        raise Typed("--task goes with run directories")
    options.check_places(ckpts)
    if out:
        options.check_folder(out)
    from cil.progress import counter
    from locality_probe import survey
    from locality_probe.plan import make_plan

    device = options.compute_on(device, threads)
    plan = make_plan(
        list(ckpts), model, weights, pretrained, images, n, seed, list(tasks), data_dir,
        warn=warn, grid=grid, num_prefix_tokens=prefix, image_size=image_size,
    )  # fmt: skip
    for sentence in plan.images.remarks():
        warn(sentence)
    written = out or (None if as_json else plan.out)
    if written is not None:
        options.check_folder(written)
        if not force:
            plan.check_replaces(written)
    with counter(len(plan.subjects), "models measured") as report:
        result = survey.survey((make() for make in plan.subjects), plan.images, device, report)
    paths = result.write(written, plan.asked) if written is not None else []
    if as_json:
        click.echo(result.nonlocality.to_json(orient="records", double_precision=15))
        return
    say(survey.format_table(result.nonlocality, result.intervals))
    for row in result.layers[result.layers["status"] != "ok"].drop_duplicates(["name", "reason"]).itertuples():
        say(f"skipped layer {row.layer} ({row.name}, {row.kind}): {row.reason}")
    say(f"wrote {', '.join(map(str, paths))}")
