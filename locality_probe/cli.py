"""The command line: parse, one call, echo. Nothing heavy is imported before a command runs, so that --help is instant."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from locality_probe import __version__


class OneSentence(click.Group):
    """A group whose commands fail with one clear sentence: exit 1 for what failed, 2 for what was typed wrongly."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}") from None


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C in work that goes on when its command is given again."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; the same command goes on where it was") from None


def typed(call: Callable, *args: object) -> object:
    """call(*args), where a ValueError is about what the user typed."""
    try:
        return call(*args)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def parse_grid(text: str) -> tuple[int, int]:
    """ROWS,COLUMNS. Raises ValueError for anything else."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--grid {text!r} is not ROWS,COLUMNS in patches, like 14,14")
    return int(parts[0]), int(parts[1])


def check_folder(path: Path) -> None:
    """Raises ValueError where no folder `path` can be: ask before long work."""
    import os

    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file, where --out needs a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} cannot be written to; choose another --out")


def device_option(command: Callable) -> Callable:
    return click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto: cuda where it is.")(
        command
    )


def resolve_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"no device {name!r} here ({str(error).splitlines()[0]})") from None
    return name


@click.group(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Does a vision transformer keep looking locally while it learns class after class, and does it pay?"""


@main.command()
@click.argument("recipe")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/RECIPE]")
@click.option("--data", "data_dir", help="Where cifar100 or imagenet100 lies: short for --set data_dir=...")
@click.option("--download", is_flag=True, help="Fetch CIFAR-100 into --data first.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's]")
@click.option("--dry-run", is_flag=True, help="Print tasks, steps, memory, estimated time and disk; train nothing.")
@device_option
def train(recipe, settings, out, data_dir, download, threads, dry_run, device) -> None:
    """Train RECIPE class after class, or go on with it where it was.

    NAME-joint is the joint counterpart of recipe NAME: a fresh model for each task on all classes seen by then;
    NAME-joint-terminal is one model on all classes, NAME-joint-as-long the same for as many steps as NAME takes in all.
    `locality-probe recipes` lists the names. The same run on several processes: torchrun --nproc-per-node N -m
    locality_probe train RECIPE.
    """
    from cil import data, recipes

    settings = [*settings, *([f"data_dir={data_dir}"] if data_dir else [])]
    run = typed(lambda: recipes.find(recipe).change(settings))
    import torch

    from cil import parallel
    from cil.device import slow_bf16
    from cil.dry_run import describe_plan
    from cil.evaluate import format_scores
    from cil.progress import training
    from cil.train import train as train_run

    if threads:
        torch.set_num_threads(threads)
    if download and run.dataset != "cifar100":
        raise click.UsageError(f"--download is for cifar100, and {recipe} trains on {run.dataset}")
    if download:
        data.download_cifar100(run.data_dir)
    out, device = out or Path("runs") / recipe, resolve_device(device)
    if slow := slow_bf16(run.amp, device):
        click.echo(slow, err=True)
    if dry_run:
        describe_plan(run, device, click.echo)
        return
    typed(check_folder, out)
    with resumable(), parallel.processes(device) as here, training(out.name, parallel.rank() == 0) as report:
        directory, first = train_run(run, out, here, report), parallel.rank() == 0
    if first:
        done = f"tasks {directory.tasks[0]} to {directory.tasks[-1]} finished"
        click.echo(f"{directory.path}: {done}; {format_scores(directory.table('accuracy'), directory.run.training)}")


@main.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--seeds", metavar="N,N,...", help="Train each recipe with each seed.  [default: the recipe's own]")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting of all recipes; repeatable."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of the runs."
)
@click.option("--data", "data_dir", help="Where the data set lies: short for --set data_dir=...")
@click.option("--executor", default="local", show_default=True, help="local: this machine; slurm: a cluster.")
@click.option("--workers", type=int, help="Runs at once.  [default: one a GPU, or else one a core; all on Slurm]")
@click.option("--threads", type=int, help="CPU threads of each.  [default: 1; on GPUs the cores, shared out]")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="For sbatch, like partition=gpu; repeatable.")
@click.option("--status", is_flag=True, help="Print the table of these runs; train nothing.")
@click.option("--dry-run", is_flag=True, help="The same, and where and with how many threads they would run.")
@device_option
def sweep(recipes, seeds, settings, out, data_dir, executor, workers, threads, slurm, status, dry_run, device) -> None:
    """Train each RECIPE with each seed, as many at once as there is room for; the table of all is OUT/sweep.csv.

    Runs lie in OUT/RECIPE, with --seeds in OUT/NAME-sSEED, their joint twins in OUT/NAME-sSEED-joint. Those that are
    finished are not repeated, those that were interrupted go on. One that fails does not stop the others: exit code 1.
    """
    from locality_probe import sweep as sweeps

    settings = [*settings, *([f"data_dir={data_dir}"] if data_dir else [])]
    seeds = None if seeds is None else typed(sweeps.parse_seeds, seeds)
    jobs = typed(sweeps.expand, list(recipes), seeds, settings, out)
    device = device if executor == "slurm" else resolve_device(device)  # the cluster's nodes have their own
    place = typed(sweeps.choose_place, executor, len(jobs), out, device, workers, threads, list(slurm))
    jobs = sweeps.planned(jobs)
    if status or dry_run:
        click.echo(sweeps.format_table(sweeps.status(jobs, out)) + f"\n{place}" * dry_run)
        return
    typed(check_folder, out)
    with resumable():
        table = sweeps.sweep(jobs, place, out)
    click.echo(sweeps.format_table(table))
    if (table["state"] == "failed").any():
        raise SystemExit(1)


@main.command()
@click.argument("text", default="")
def recipes(text) -> None:
    """List the recipes whose names hold TEXT; each also has -joint, -joint-terminal and -joint-as-long."""
    from cil.recipes import RECIPES

    found = {name: function for name, function in RECIPES.items() if text in name}
    if not found:
        raise click.UsageError(f"no recipe holds {text!r}; `locality-probe recipes` lists them")
    for name, function in found.items():
        click.echo(f"{name}\n    {' '.join(function.__doc__.split())}")


@main.command()
@click.argument("ckpts", nargs=-1, metavar="[CKPT_DIR|WEIGHTS]...")
@click.option("--model", metavar="LIBRARY/NAME", help="Measure timm/NAME, torchvision/NAME or hf/FOLDER instead.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of --model (.safetensors or .pth).")
@click.option("--pretrained", is_flag=True, help="Fetch the weights of --model from its hub.")
@click.option("--grid", metavar="ROWS,COLUMNS", help="Grid of patches of --model, where it does not tell.")
@click.option("--prefix", type=click.IntRange(0), help="Class and register tokens of --model, where it does not tell.")
@click.option("--images", help="Folder, .npy or .npz of normalised floats [n, 3, H, W], digits, cifar100, imagenet100, "
              "folder:PATH, or photos (two).  [default: dataset, the run's own test images; photos for --model]")  # fmt: skip
@click.option("--n", type=click.IntRange(1), help="Number of images.  [default: 256, or all of a smaller set]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Draws the images.")
@click.option("--task", "tasks", type=int, multiple=True, help="Only this task of runs; repeatable.")
@click.option("--data", "data_dir", help="Where cifar100 or imagenet100 lies.  [default: where the run found it]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the tables.  [default: the first CKPT_DIR, or .]"
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the rows of nonlocality.csv as one JSON list, nothing else."
)
@device_option
def measure(
    ckpts, model, weights, pretrained, grid, prefix, images, n, seed, tasks, data_dir, out, as_json, device
) -> None:
    """Nonlocality D_loc of every task, layer and head of runs, with the joint twin beside each if it is there.

    Writes nonlocality.csv, 95 % intervals over images and, for several runs, over seeds (intervals.csv), per-image values
    (nonlocality_images.parquet), layers.csv (what was measured and what was skipped, and why) and measurement.json.
    """
    if bool(ckpts) == bool(model):
        raise click.UsageError("give run directories or weights files, or --model timm/NAME")
    if (weights or pretrained or grid or prefix is not None) and not model:
        raise click.UsageError("--weights, --pretrained, --grid and --prefix go with --model")
    grid = None if grid is None else typed(parse_grid, grid)
    if tasks and all(Path(c).is_file() for c in ckpts):
        raise click.UsageError("--task goes with run directories")
    from cil.progress import counter
    from locality_probe import survey
    from locality_probe.plan import make_plan

    plan = make_plan(
        list(ckpts), model, weights, pretrained, images, n, seed, list(tasks), data_dir,
        warn=lambda s: click.echo(s, err=True), grid=grid, num_prefix_tokens=prefix,
    )  # fmt: skip
    out, device = out or plan.out, resolve_device(device)
    typed(check_folder, out)
    with counter(len(plan.subjects), "models measured") as report:
        result = survey.survey((make() for make in plan.subjects), plan.images, device, report)
    paths = result.write(out)
    if as_json:
        click.echo(result.nonlocality.to_json(orient="records", double_precision=15))
        return
    click.echo(survey.format_table(result.nonlocality, result.intervals))
    for row in result.layers[result.layers["status"] != "ok"].drop_duplicates(["name", "reason"]).itertuples():
        click.echo(f"skipped layer {row.layer} ({row.name}, {row.kind}): {row.reason}")
    click.echo(f"wrote {', '.join(map(str, paths))}")


@main.command()
@click.argument("model", required=False)
@click.option("--grid", metavar="ROWS,COLUMNS", help="Its grid of patches, where the model does not tell.")
@click.option("--prefix", type=click.IntRange(0), help="Its class and register tokens, where the model does not tell.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of MODEL (.safetensors or .pth).")
@click.option("--pretrained", is_flag=True, help="Fetch the weights of MODEL from its hub.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of layers, nothing else.")
@click.option(
    "--families", is_flag=True, help="Instead, the table of docs/support.md: a member of each family; 2 minutes."
)
def doctor(model, grid, prefix, weights, pretrained, as_json, families) -> None:
    """What can be measured of MODEL: each attention layer, its grid and tokens, how it is seen, or why it is skipped.

    MODEL: a run directory, a weights file, timm/NAME, torchvision/NAME or hf/FOLDER. Exit code 1 where no layer can be.
    """
    if bool(model) == families:
        raise click.UsageError("give a MODEL, like runs/demo/demo-baseline or timm/vit_tiny_patch16_224, or --families")
    grid = None if grid is None else typed(parse_grid, grid)
    import dataclasses
    import json

    from cil.progress import counter
    from locality_probe import doctor as doctors

    if families:
        with counter(doctors.FAMILIES, "families") as report:
            click.echo(doctors.support_matrix(report), nl=False)
        return
    subject = doctors.find(model, weights, pretrained)
    layers = doctors.examine_subject(subject, grid, prefix)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(layer) for layer in layers], indent=1))
    else:
        click.echo(f"{subject.run}\n{doctors.format_layers(layers)}")
    if all(layer.status != "ok" for layer in layers):
        raise SystemExit(1)


@main.command()
@click.argument("first", metavar="CIL_DIR")
@click.argument("second", metavar="JOINT_DIR")
@click.option("--and", "more", nargs=2, multiple=True, metavar="CIL_DIR JOINT_DIR", help="The same pair with another seed: "
              "intervals are then over seeds; repeatable.")  # fmt: skip
@click.option("--images", help="As for `measure`.  [default: the first run's own test images]")
@click.option("--n", type=click.IntRange(2), help="Number of images.  [default: 256, or all of a smaller set]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Draws the images.")
@click.option("--task", "tasks", type=int, multiple=True, help="Only this task of runs; repeatable.")
@click.option("--data", "data_dir", help="Where cifar100 or imagenet100 lies.  [default: where the run found it]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for table and figure.  [default: CIL_DIR, or .]")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the rows of comparison.csv as one JSON list, nothing else."
)
@device_option
def compare(first, second, more, images, n, seed, tasks, data_dir, out, as_json, device) -> None:
    """Does CIL_DIR look farther than JOINT_DIR? Per task and layer, the paired difference, its interval and a verdict.

    Both may be any two runs or weights files of networks whose layers and grids pair. Writes comparison.csv and
    comparison.png.
    """
    from cil.progress import counter
    from figures import comparison, style
    from locality_probe import compare as comparing
    from locality_probe import survey
    from locality_probe.plan import make_plan
    from locality_probe.tables import COMPARISON

    pairs = [(first, second), *more]
    paths = [path for pair in pairs for path in pair]
    if len(set(paths)) < len(paths):
        raise click.UsageError(f"{max(paths, key=paths.count)} is given twice: compare different runs")

    def warn(sentence: str) -> None:
        click.echo(sentence, err=True)

    plan = make_plan(paths, images=images, n=n, seed=seed, tasks=list(tasks), data_dir=data_dir, warn=warn, twins=False)
    out, device = out or plan.out, resolve_device(device)
    typed(check_folder, out)
    for sentence in comparing.confounders(pairs):
        warn(sentence)
    with counter(len(plan.subjects), "models measured") as report:
        result = survey.survey((make() for make in plan.subjects), plan.images, device, report)
    sides = [tuple(comparing.side_of(path) for path in pair) for pair in pairs]
    frame = comparing.compare(result.per_image, result.nonlocality, sides)
    out.mkdir(parents=True, exist_ok=True)
    written = [
        COMPARISON.write(frame, out / "comparison.csv"),
        style.save(comparison.draw(frame), out / "comparison.png"),
    ]
    if as_json:
        click.echo(frame.to_json(orient="records", double_precision=15))
        return
    click.echo(comparing.format_table(frame))
    click.echo(f"wrote {', '.join(map(str, written))}")


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN_DIR...")
@click.option("--n", type=click.IntRange(1), help="Number of test images.  [default: all]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Draws the images.")
@click.option("--task", "tasks", type=int, multiple=True, help="Only this task; repeatable.")
@click.option("--data", "data_dir", help="Where cifar100 or imagenet100 lies.  [default: where the run found it]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for tables and figure.  [default: the first RUN_DIR]"
)
@device_option
def spectrum(runs, n, seed, tasks, data_dir, out, device) -> None:
    """Eigenvalues of the covariance of features, of seen, new and future classes, at each task; joint twins beside them.

    Features are the mean patch token after each block and the token that the newest head is fed. Writes spectrum.parquet,
    spectrum_summary.csv (effective rank, participation ratio, RankMe, slope, ...), spectrum_measurement.json, spectrum.png.
    """
    from cil.progress import counter
    from figures import spectra as figure
    from figures import style
    from locality_probe import spectra
    from locality_probe.plan import runs_of

    directories = runs_of(list(runs), list(tasks), warn=lambda s: click.echo(s, err=True))
    out, device = out or directories[0].path, resolve_device(device)
    typed(check_folder, out)
    with counter(sum(1 + len(d.tasks) for d in directories), "networks measured") as report:
        found = spectra.spectra(
            directories, list(tasks), n, seed, data_dir, device, report, warn=lambda s: click.echo(s, err=True)
        )
    paths = [*found.write(out), style.save(figure.draw(found.spectrum), out / "spectrum.png")]
    click.echo(spectra.format_table(found.summary))
    click.echo(f"wrote {', '.join(map(str, paths))}")


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN_DIR...")
@click.option("--per-class", type=click.IntRange(2), default=50, show_default=True, help="Training images of a class.")
@click.option("--test-per-class", type=click.IntRange(2), default=20, show_default=True, help="Test images of a class.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Draws the images.")
@click.option("--task", "tasks", type=int, multiple=True, help="Only this task; repeatable.")
@click.option("--data", "data_dir", help="Where cifar100 or imagenet100 lies.  [default: where the run found it]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for tables and figure.  [default: the first RUN_DIR]"
)
@device_option
def transfer(runs, per_class, test_per_class, seed, tasks, data_dir, out, device) -> None:
    """How well each layer serves seen and future classes: kNN and a linear probe after each task; CKA; and locality.

    Joint twins are measured beside their runs. Controls: the network as initialised, shuffled labels. Writes transfer.csv,
    cka.csv (to the twin and to task 0), transfer_locality.csv (rank correlation with D_loc over layers), transfer.png.
    """
    from cil.progress import counter
    from figures import style
    from figures import transfer as figure
    from locality_probe import transfer as transfers
    from locality_probe.plan import runs_of

    directories = runs_of(list(runs), list(tasks), warn=lambda s: click.echo(s, err=True))
    out, device = out or directories[0].path, resolve_device(device)
    typed(check_folder, out)
    with counter(sum(1 + len(tasks or d.tasks) for d in directories), "networks measured") as report:
        found = transfers.transfer(directories, list(tasks), per_class, test_per_class, seed, data_dir, device, report)
    paths = found.write(out)
    if (found.transfer["group"] == "future").any():
        paths.append(style.save(figure.draw(found.transfer, found.nonlocality), out / "transfer.png"))
    click.echo(transfers.format_tables(found))
    click.echo(f"wrote {', '.join(map(str, paths))}")


@main.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--ckpt", "ckpts", multiple=True, metavar="RUN_DIR[:TASK]", help="TASK: a number, init or all; repeatable.  "
              "[default: the newest run under runs/]")  # fmt: skip
@click.option("--model", metavar="LIBRARY/NAME", help="Look through timm/NAME, torchvision/NAME or hf/FOLDER instead.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of --model (.safetensors or .pth).")
@click.option("--pretrained", is_flag=True, help="Fetch the weights of --model from its hub.")
@click.option("--layer", default="all", show_default=True, help="Numbers from 0, like 0,2, or all.")
@click.option("--head", default="mean", show_default=True, help="Numbers from 0, mean or all.")
@click.option("--query", default="mean", show_default=True, help="mean, cls, a patch as ROW,COLUMN from 0, or the patch "
              "under a pixel of IMAGE as pixel:ROW,COLUMN.")  # fmt: skip
@click.option("--rollout", is_flag=True, help="Attention as it adds up over the layers (heads averaged).")
@click.option("--difference", is_flag=True, help="Of two checkpoints: the second minus the first.")
@click.option("--columns", type=click.Choice(["run", "task", "layer", "head"]), help="What columns are; rows are the rest.  "
              "[default: the first of task, run, head, layer that varies]")  # fmt: skip
@click.option("--scale", type=click.Choice(["shared", "each", "uniform"]), default="shared", show_default=True,
              help="Colour range: of all panels, of each, or times uniform attention.")  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help=".png, .svg or .pdf.  [default: IMAGE_heatmap.png here]"
)
def heatmap(
    image, ckpts, model, weights, pretrained, layer, head, query, rollout, difference, columns, scale, out
) -> None:
    """Attention over IMAGE from a query; several checkpoints side by side. The raw array lies beside the picture."""
    if ckpts and model:
        raise click.UsageError("give --ckpt or --model, not both")
    if (weights or pretrained) and not model:
        raise click.UsageError("--weights and --pretrained go with --model")
    from cil.data import open_image
    from figures import attention_maps, style
    from locality_probe import heatmap as maps
    from locality_probe.subject import from_model_option

    out = out or Path(f"{image.stem}_heatmap.png")
    typed(style.check_suffix, out)
    typed(check_folder, out.parent)
    opened = open_image(image)
    if model:
        subjects = [from_model_option(model, weights, pretrained, warn=lambda s: click.echo(s, err=True))]
    else:
        specs = list(ckpts) or [str(newest) for newest in [maps.newest_run()] if newest]
        if not specs:
            raise click.UsageError(
                "no model: give --ckpt RUN_DIR or --model timm/NAME, or make a run with `locality-probe demo`"
            )
        subjects = [make() for spec in specs for make in maps.parse_checkpoint(spec)]
    if difference and scale != "shared":
        raise click.UsageError(f"--scale {scale} does not go with --difference, whose scale is around 0")
    found = maps.heat_maps(subjects, opened, layer, head, query, rollout, difference, columns)
    scale = "difference" if difference else scale
    figure = attention_maps.draw(
        found.image,
        found.maps,
        found.row_labels,
        found.column_labels,
        scale=scale,
        query=found.query,
        title=found.title,
    )
    style.save(figure, out)
    raw = found.save(out.with_suffix(".npz"), scale)
    for sentence in found.left_out:
        click.echo(sentence)
    click.echo(f"wrote {out} and {raw}")


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder of its runs, tables and figures.",
)
def demo(out) -> None:
    """Train, measure and draw on embedded digits: baseline and baseline + LPA with their joint twins; a few minutes.

    Interrupted and started again, it goes on where it was.
    """
    typed(check_folder, out)
    from figures.demo import run_demo

    with resumable():
        run_demo(out, click.echo)


@main.command()
@click.option("--scale", default="demo", show_default=True, help="demo: digits, minutes | small: CIFAR-100 cut to hours on "
              "2 cores | paper: the protocol, for GPUs")  # fmt: skip
@click.option(
    "--only", metavar="NAME,...", help="Only these: fig1 to fig9, gap, steps, curves, table1, table2, claims, report."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: runs/reproduce-SCALE]")
@click.option("--data", "data_dir", default="data", show_default=True, help="Where cifar100 or imagenet100 lies.")
@click.option("--executor", default="local", show_default=True, help="local: processes of this machine | slurm")
@click.option("--workers", type=int, help="Trainings at once.  [default: one a GPU, or one a core]")
@click.option("--threads", type=int, help="CPU threads of each.  [default: 1; on GPUs the cores, shared out]")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="For sbatch, like partition=gpu; repeatable.")
@click.option("--dry-run", is_flag=True, help="Print the plan and what it costs; train, measure and draw nothing.")
@device_option
def reproduce(scale, only, out, data_dir, executor, workers, threads, slurm, dry_run, device) -> None:
    """The paper with one command: train what is missing, measure, draw every figure and table, judge every claim, report.

    Prints its plan and the estimated time first. Interrupted, it goes on; repeated, it does nothing. Writes
    OUT/report.html, OUT/figures (PNG, PDF, CSV; claims.csv), OUT/tables (what was measured) and OUT/runs (weights).
    """
    from figures import reproduce as making
    from locality_probe import sweep as sweeps

    out = out or Path("runs") / f"reproduce-{scale}"
    typed(check_folder, out)
    names = list(dict.fromkeys(filter(None, (only or "").split(","))))
    typed(making.check, scale, names)
    trained_on = device if executor == "slurm" else resolve_device(device)  # the cluster's nodes have their own
    runs = len(making.all_jobs(scale, out, data_dir))
    place = typed(sweeps.choose_place, executor, runs, out, trained_on, workers, threads, list(slurm))
    device = resolve_device("auto" if executor == "slurm" else device)
    with resumable():
        making.reproduce(scale, names, out, data_dir, device, place, dry_run, click.echo)
