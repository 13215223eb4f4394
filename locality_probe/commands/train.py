"""The command line's: train one recipe."""

from __future__ import annotations

from pathlib import Path

import click

from locality_probe.commands import options
from locality_probe.commands.base import command, resumable, say, warn
from locality_probe.typed import Typed, typed


@command("train")
@click.argument("recipe")
@options.settings
@options.out("Run directory.  [default: runs/RECIPE]")
@options.data("the recipe's data_dir")
@click.option("--download", is_flag=True, help="Fetch CIFAR-100 into --data first.")
@click.option("--dry-run", is_flag=True, help="Print tasks, steps, memory, estimated time and disk; train nothing.")
@options.threads
@options.device()
def train_command(recipe, settings, out, data_dir, download, dry_run, threads, device) -> None:
    """Train RECIPE class after class, or go on with it where it was.

    NAME-joint is the joint counterpart of recipe NAME: a fresh model for each task on all classes seen by then;
    NAME-joint-terminal is one model on all classes, NAME-joint-as-long the same for as many steps as NAME takes in all.
    `locality-probe recipes` lists the names. The same run on several processes: torchrun --nproc-per-node N -m
    locality_probe train RECIPE.
    """
    from cil import data, recipes

    run = typed(lambda: recipes.find(recipe).change(options.with_data(settings, data_dir)))
    options.check_settings(run)
    if download and run.dataset != "cifar100":
        raise Typed(f"--download is for cifar100, and {recipe} trains on {run.dataset}")
    from cil import parallel
    from cil.device import slow_bf16
    from cil.dry_run import describe_plan
    from cil.evaluate import format_scores
    from cil.progress import training
    from cil.train import train

    out, device = out or Path("runs") / recipe, options.compute_on(device, threads)
    if not dry_run:
        options.check_folder(out)
    if download:
        data.download_cifar100(run.data_dir)
    if slow := slow_bf16(run.amp, device):
        warn(slow)
    if dry_run:
        describe_plan(run, device, click.echo)
        return
    with resumable(), parallel.processes(device) as here, training(out.name, parallel.rank() == 0) as report:
        first = parallel.rank() == 0
        directory = train(run, out, here, report, warn if first else lambda sentence: None)
    if first:
        done = f"tasks {directory.tasks[0]} to {directory.tasks[-1]} finished"
        say(f"{directory.path}: {done}; {format_scores(directory.written('accuracy'), directory.run.training)}")
