"""The two doors of this package: `record` runs a model once; `watching` puts a Watch on a model and takes it off again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from locality_probe.record import maps
from locality_probe.record.layer import Layer, Recorded
from locality_probe.record.maps import Maps, Measure, Reader, slices
from locality_probe.record.watch import Watch


def record(
    model: nn.Module,
    images: Tensor,
    measure: Measure,
    grid: tuple[int, ...] | None = None,
    num_prefix_tokens: int | None = None,
) -> list[Recorded]:
    """Forward `images` [B, 3, H, W] in eval mode and apply `measure` to the attention [b, H, Q, K] of every layer.

    The measure gets a few images at a time in float32 and returns tensors [b, ...]; no more than one chunk of one layer's
    attention is alive. Grid and prefix tokens are told from the model's parts and feature maps where they are not given.
    The model comes back as it was: hooks, training mode of each module, gradient mode.

    Raises ValueError for a model without attention, and for one with compiled parts.
    """

    def read(layer: Layer, attention: Maps) -> dict[str, Tensor]:
        batch, *per_image = attention.shape
        chunks = [
            measure(attention.part(rows), layer)
            for rows in slices(batch, max(1, maps.CHUNK_BYTES // (4 * math.prod(per_image))))
        ]
        return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}

    with watching(model, read, grid, num_prefix_tokens) as watch:
        watch.forward(images)
    return watch.result()


@contextlib.contextmanager
def watching(model: nn.Module, read: Reader, grid=None, num_prefix_tokens=None) -> Iterator[Watch]:
    """A Watch on `model`, which is in eval mode meanwhile; it comes back as it was, also after an exception."""
    model = plain(model)
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    watch = Watch(model, read, grid, num_prefix_tokens)
    try:
        for module in compiled:  # model.compile(): the same module, run as it is written
            module._compiled_call_impl = None
        with evaluating(model), watch.hooked():
            yield watch
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module has its own training mode again, for frozen parts differ from the rest."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def plain(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper. Raises ValueError naming a part that hides its attention."""
    model = getattr(model, "_orig_mod", model)
    for name, part in model.named_modules():
        what = "torch.compile'd" if hasattr(part, "_orig_mod") else "TorchScript"
        if hasattr(part, "_orig_mod") or isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'} is {what} and hides its attention; give the model as it was before"
            )
    return model
