"""What can be measured of a model: every attention layer, how it is seen, and why one is skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from cil import checkpoint, text
from cil.files import reason_of
from locality_probe.probe import NO_PATCHES
from locality_probe.record import Grids, Layer, Recorder
from locality_probe.subject import Subject, from_file, from_model_option, from_run
from locality_probe.typed import Typed, check_model

BATCH = 2  # with one image alone, windows could not be told from images


def examine(
    model: nn.Module,
    *inputs: object,
    grid: tuple[int, ...] | Grids | None = None,
    num_prefix_tokens: int | None = None,
    **named: object,
) -> list[Layer]:
    """Every attention layer of `model` as it runs on `inputs` ([2, ...] at least), measured or skipped with its reason.

    Raises ValueError for a model without attention.
    """
    recorder = Recorder(model, lambda layer, maps: {}, grid, num_prefix_tokens)
    recorder.forward(*inputs, **named)
    layers = [item.layer for item in recorder.result()]
    return [x if x.status != "ok" or x.between_patches else x.skipped(NO_PATCHES) for x in layers]


def find(
    model: str,
    weights: Path | None = None,
    pretrained: bool = False,
    warn: Callable[[str], None] = lambda sentence: None,
    image_size: int | None = None,
) -> Subject:
    """A run directory (its last task), a weights file, or LIBRARY/NAME. Raises ValueError for anything else."""
    path = Path(model)
    if path.is_file() or path.is_dir():
        if weights or pretrained or image_size:
            raise Typed(f"{model} has its own weights and size: leave --weights, --pretrained and --image-size away")
        if path.is_file():
            return from_file(path)
        directory = checkpoint.open_run(path)
        directory.require()
        return from_run(directory, directory.tasks[-1])
    check_model(model)
    return from_model_option(model, weights, pretrained, warn, image_size)


def examine_subject(
    subject: Subject, grid: tuple[int, ...] | None = None, num_prefix_tokens: int | None = None, device: str = "cpu"
) -> list[Layer]:
    """`examine` on two images of noise, of the size that the subject's network takes."""
    noise = torch.randint(256, (300, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = subject.preprocess(Image.fromarray(noise.numpy()))
    model, pair = subject.model.to(device), torch.stack([x, x.flip(-1)]).to(device)
    try:
        return examine(model, pair, grid=grid, num_prefix_tokens=num_prefix_tokens)
    except (RuntimeError, TypeError, NotImplementedError, IndexError, AttributeError) as error:
        size = " x ".join(map(str, pair.shape[-2:]))
        raise ValueError(f"{subject.run} fails on images of {size} pixels: {reason_of(error)}") from None


def format_layers(layers: list[Layer]) -> str:
    """One line per layer, then how many of them can be measured."""
    rows = []
    for x in layers:
        seen = x.status == "ok" or x.reason == NO_PATCHES
        grid = "x".join(map(str, x.grid)) + (" window" if x.extent == "window" else "") if seen else ""
        status = x.status if x.status == "ok" else f"skipped: {x.reason}"
        rows.append([str(x.index), x.name, x.kind, x.how, str(x.num_heads) if seen else "", grid,
                     str(x.num_prefix_tokens) if seen else "", status])  # fmt: skip
    header = ["layer", "name", "kind", "how", "heads", "grid", "prefix", "status"]
    return "\n".join([text.table(header, rows, left=len(header), fixed=2), text.prose(summary(layers))])


def summary(layers: list[Layer]) -> str:
    """How many layers can be measured, in a sentence."""
    ok = [x for x in layers if x.status == "ok"]
    windows = sum(x.extent == "window" for x in ok)
    inside = f" ({windows} of them inside their windows)" if windows else ""
    return f"{len(ok)} of {len(layers)} attention layers can be measured{inside}"
