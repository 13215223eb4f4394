"""What a timm backbone starts from: a weights file of the user's, timm's own, or a run that is trained first."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import timm

from cil import checkpoint, recipes
from cil.checkpoint import RunDir
from cil.run import Run

RECIPE = "recipe:"
WAIT = 2.0  # seconds between two looks at a run that another process trains

Train = Callable[[Run, Path], RunDir]


def settle(run: Run, out: Path, train: Train) -> tuple[Run, Path | None]:
    """The run with the SHA-256 of the weights that it starts from, and their file; None where `out` holds a begun run, which
    keeps its weights, and the file is not there any more.

    train: trains the run that `weights` names as recipe:NAME, if it has to be. Raises ValueError for weights that are not
    there, cannot be fetched, or are not those that `weights_sha256` asks for, and for a recipe that leads to itself.
    """
    if not run.weights:
        return run, None
    if (out / "run.json").is_file():
        begun = checkpoint.open_run(out).run
        alike = begun.weights == run.weights and run.weights_sha256 in ("", begun.weights_sha256)
        if alike and not Path(run.weights).is_file():  # a file that is there may have changed
            return replace(run, weights_sha256=begun.weights_sha256), None
    path = file_of(run, out, train)
    digest = sha256(path)
    if run.weights_sha256 not in ("", digest):
        raise ValueError(f"{path} has the SHA-256 {digest}, not weights_sha256={run.weights_sha256}")
    return replace(run, weights_sha256=digest), path


def file_of(run: Run, out: Path, train: Train) -> Path:
    """The weights file that the run's setting names. Raises ValueError as `settle` does."""
    if run.weights == "hub":
        return fetched(run.model.removeprefix("timm/"))
    if run.weights.startswith(RECIPE):
        directory = trained(first(run), out.absolute().parent, train)
        return directory.weights_path(directory.planned_tasks[-1])
    if not Path(run.weights).is_file():
        raise ValueError(
            f"weights={run.weights} is no file, nor hub (timm's weights of {run.model}), nor {RECIPE}NAME of a recipe"
        )
    return Path(run.weights)


def first(run: Run) -> Run:
    """The run of `weights`, recipe:NAME, which is trained before this one. Raises ValueError for no recipe, and for one that
    starts so itself."""
    needed = replace(recipes.find(run.weights.removeprefix(RECIPE)), data_dir=run.data_dir)
    if needed.weights.startswith(RECIPE):
        raise ValueError(f"weights={run.weights}: {needed.recipe} itself starts from {needed.weights}")
    return needed


def trained(run: Run, folder: Path, train: Train) -> RunDir:
    """The run of a recipe beside another one, trained here, or by whoever trains in its directory already."""
    path = folder / run.recipe
    while True:
        try:
            return train(run, path)
        except ValueError:
            if not checkpoint.is_locked(path):
                raise
            time.sleep(WAIT)


def fetched(name: str) -> Path:
    """timm's weights of a model, in the cache of the HuggingFace hub. Raises ValueError where there are none, or no network."""
    from huggingface_hub import hf_hub_download

    config = timm.get_pretrained_cfg(name)
    place = getattr(config, "hf_hub_id", None)
    if not place:
        raise ValueError(f"timm has no weights of {name} on the hub: give --set weights=FILE")
    try:
        return Path(hf_hub_download(place, "model.safetensors"))
    except Exception as error:  # the hub's, requests' and the system's errors have nothing in common
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{place} cannot be fetched from the hub ({reason}): give --set weights=FILE with that model's weights"
        ) from None


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            digest.update(part)
    return digest.hexdigest()
