"""The command line's: each option that commands share, declared once, and what is checked before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from locality_probe.commands.base import warn
from locality_probe.typed import Typed, check_place, parse_grid, split_model, typed

Option = Callable[[Callable], Callable]  # decorates a command's function


class Filled(click.ParamType):
    """Text, or a path, that is not empty: an empty one is a variable that was not set, and means the current folder to some."""

    name = "text"

    def __init__(self, kind: type = str):
        self.kind, self.name = kind, "path" if kind is Path else "text"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> object:
        if not str(value).strip(", "):
            self.fail(f"{value!r} is empty: leave the option away, or give it a value", param, context)
        return self.kind(value)


def device(default: str = "auto") -> Option:
    return click.option(
        "--device", default=default, show_default=True, help="cpu, cuda, ...; auto: cuda where it is."
    )  # fmt: skip


MOST_THREADS = 1024
threads = click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads.  [default: torch's]")
settings = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable."
)
seed = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Draws the images."
)  # fmt: skip
tasks = click.option("--task", "tasks", type=int, multiple=True, help="Only this task of runs; repeatable.")
weights = click.option(
    "--weights", type=Filled(Path), help="Weights of the model (.safetensors or .pth)."
)  # fmt: skip
pretrained = click.option("--pretrained", is_flag=True, help="Fetch the weights of the model from its hub.")
image_size = click.option(
    "--image-size",
    type=click.IntRange(1, 10_000),
    help="Pixels of the square that the model takes.  [default: its own]",
)
prefix = click.option(
    "--prefix", type=click.IntRange(0), help="Class and register tokens of the model, where it does not tell."
)
grid = click.option(
    "--grid",
    metavar="[FRAMES,]ROWS,COLUMNS",
    callback=lambda context, option, text: None if text is None else parse_grid(text),
    help="Grid of patches of the model, where it does not tell.",
)


def _check_model(context: click.Context, option: click.Option, text: str | None) -> str | None:
    if text:
        split_model(text)
    return text


model = click.option(
    "--model",
    metavar="LIBRARY/NAME",
    callback=_check_model,
    help="Instead, timm/NAME, torchvision/NAME, hf/FOLDER or open_clip/NAME.",
)


def data(default: str) -> Option:
    return click.option(
        "--data", "data_dir", type=Filled(), help=f"Where cifar100 or imagenet100 lies.  [default: {default}]"
    )


def images(default: str) -> Option:
    return click.option(
        "--images",
        type=Filled(),
        help="Folder, .npy or .npz of normalised floats [n, 3, H, W], digits, cifar100, imagenet100, folder:PATH, or photos "
        f"(two).  [default: {default}]",
    )


def n(default: str, least: int = 1) -> Option:
    return click.option("--n", type=click.IntRange(least), help=f"Number of images.  [default: {default}]")


def out(what: str, default: Path | None = None) -> Option:
    """`what`: the help, with its default where that depends on other options."""
    return click.option("--out", type=Filled(Path), default=default, show_default=default is not None, help=what)


def as_json(what: str, more: str = "print nothing else") -> Option:
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what} as one JSON list, and {more}.")


def placement(command: Callable) -> Callable:
    """Where trainings run: --executor, --workers, --threads, --slurm."""
    for option in (
        click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="For sbatch, like partition=gpu; repeatable."),
        click.option("--threads", type=click.IntRange(1, MOST_THREADS),
                     help="CPU threads of each.  [default: 1; on GPUs the cores, shared out]"),
        click.option("--workers", type=int, help="Trainings at once.  [default: one per GPU, else per core; all on Slurm]"),
        click.option("--executor", default="local", show_default=True, help="local: this machine; slurm: a cluster."),
    ):  # fmt: skip
        command = option(command)
    return command


# What commands do with them.


def compute_on(device: str, threads: int | None = None) -> str:
    """The device by its name, and torch set to so many CPU threads. Raises Typed for a device that is not here."""
    import torch

    from cil.device import cores, resolve

    if threads:
        if threads > (there := cores()):
            warn(
                f"--threads {threads}: this machine has {there} cores, and more threads make it slower; {there} are used"
            )
        torch.set_num_threads(min(threads, there))
    return typed(resolve, device)


def check_places(places: Iterable[str]) -> None:
    """Raises ValueError for what is neither a file nor a run directory."""
    for place in places:
        check_place(place)


def check_runs(paths: Iterable[str]) -> None:
    """Raises ValueError for what is no run directory."""
    from cil.files import check_run

    for path in paths:
        check_run(path)


def check_folder(path: Path) -> None:
    """Raises Typed where no folder `path` can be: ask before long work."""
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    except OSError as error:
        raise Typed(
            f"{path} is no folder that can be made: {(error.strerror or 'it cannot be looked at').lower()}"
        ) from None
    if there.is_symlink() and not there.exists():
        raise Typed(f"{there} is a link that leads nowhere, where --out needs a folder")
    if not there.is_dir():
        raise Typed(f"{there} is a file, where --out needs a folder")
    if not os.access(there, os.W_OK):
        raise Typed(f"{there} cannot be written to; choose another --out")


def open_runs(
    paths: Iterable[str], tasks: Iterable[int], out: Path | None, device: str, threads: int | None
) -> tuple[list, Path, str]:
    """What a command that measures runs begins with: their directories, joint twins beside them; the folder for what it
    writes, by default the first of them; the device.

    Raises ValueError for what is no run directory, and Typed for a folder or a device that cannot be.
    """
    check_runs(paths)
    if out:
        check_folder(out)
    from locality_probe.plan import runs_of

    directories = runs_of(list(paths), list(tasks), warn)
    out, device = out or directories[0].path, compute_on(device, threads)
    check_folder(out)
    return directories, out, device


def with_data(settings: Iterable[str], data_dir: str | None) -> list[str]:
    """The settings of --set, and that of --data."""
    return [*settings, *([f"data_dir={data_dir}"] if data_dir else [])]


MANY = 10_000  # classes, more than any data set here has


def check_settings(run) -> None:
    """Raises Typed where a cil.run.Run names a data set, a scenario or a model of timm that there is none of."""
    from cil import data, models
    from cil.scenario import Scenario

    kind, _, path = run.dataset.partition(":")
    if kind not in data.DATASETS or (kind == "folder") != bool(path):
        raise Typed(f"no data set {run.dataset!r}; there are: {data.names()}")
    typed(Scenario, run.scenario, run.num_classes or MANY)
    if run.model.startswith("timm/"):
        typed(models.check_timm, run.model.removeprefix("timm/"))
