"""The two doors of this package: `record` runs a model once; a Recorder runs it batch by batch."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from locality_probe.geometry import Geometry
from locality_probe.record import maps
from locality_probe.record.asked import asked_maps, offers_map
from locality_probe.record.layer import AttentionLayer, Layer, Recorded
from locality_probe.record.maps import Maps, Measure, Reader, slices
from locality_probe.record.observer import Grids, Observer, image_of, tensors_of
from locality_probe.record.packs import pack_of
from locality_probe.record.sighting import Run, Sighting
from locality_probe.record.watch import Watch, looks_like_attention


class _NotPlaced(Exception):
    """An attention was seen before it was observed where its tokens are."""


class Recorder:
    """Runs a model and reads what each of its attention layers attends to: read(layer, maps) -> values [B, ...].

    Nothing is put on the model but while it runs; compiled and parallel wrappers around it are left aside. grid: of patches,
    or of each tower by the prefix of its modules' names; num_prefix_tokens: tokens without a place. Both are checked against
    what is observed.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Reader,
        grid: tuple[int, ...] | Grids | None = None,
        num_prefix_tokens: int | None = None,
    ):
        self.model, self.read = plain(model), read
        model = self.model
        self.observer = Observer(model, grid, num_prefix_tokens)
        self.some_asked = any(offers_map(module) for module in model.modules())
        self.observed = not self.some_asked

    @torch.no_grad()
    def forward(self, *inputs: object, **named: object) -> object:
        """The model's output; `result()` then has each layer with what was read off it.

        Raises ValueError for inputs without a tensor, and for packed patches that are not of the grids beside them.
        """
        tensors = [x for x in tensors_of(inputs, named) if x.ndim]
        if not tensors:
            raise ValueError("give the model's input as tensors, [B, ...]")
        pack = pack_of(self.model, inputs, named)
        image = image_of(inputs, named) if pack is None else pack.patches
        first = tensors[0] if image is None else image
        self.batch = 1 if pack is not None and pack.flat else len(first)  # such a model attends image by image
        self.device, self.image = first.device.type, image if pack is None else None
        with as_written(self.model):
            if self.observed:
                self.observer.observe(inputs, named, Watch)
            try:
                return self._pass(inputs, named)
            except _NotPlaced:  # a model in which only some layers say where they are
                self.observed = True
                self.observer.observe(inputs, named, Watch)
                return self._pass(inputs, named)

    def _pass(self, inputs: tuple, named: dict) -> object:
        self.seen: dict[str, Recorded] = {}
        self.instead: dict[str, str] = {}  # reasons that count only where nothing better is known of a module
        self.watch = Watch(self.model, self._consume, self._ask)
        with self.watch.watching():
            return self.model(*inputs, **named)

    def _ask(self, module: nn.Module, inputs: tuple) -> None:
        layer, name = cast(AttentionLayer, module), self.watch.names[module]
        found = asked_maps(layer, inputs)
        _, heads, queries, keys = found.shape
        size = None if self.image is None else tuple(self.image.shape[-2:])
        pixels = (
            None
            if size is None or len(layer.grid) != 2
            else tuple(s / g for s, g in zip(size, layer.grid, strict=True))
        )
        geometry = Geometry.of_grid(layer.grid, layer.num_prefix_tokens, queries, pixels, size if pixels else None)
        times = sum(seen.partition("#")[0] == name for seen in self.seen)
        name = f"{name}#{times + 1}" if times else name
        about = Layer(-1, name, type(module).__name__, heads, geometry, how="asked", places="declared")
        if keys != about.keys:
            self._skip(
                name,
                f"its {keys} keys are not {layer.num_prefix_tokens} prefix tokens + {' x '.join(map(str, layer.grid))} patches",
            )
        else:
            self._read(about, found)

    def _consume(self, name: str, sighting: Sighting, run: Run) -> object:
        if sighting.by_name:
            self.instead.setdefault(name, sighting.reason)
            return run()
        if not self.observed:
            raise _NotPlaced
        if sighting.reason:
            self._skip(name, sighting.reason)
            return run()
        placed = self.observer.of(name, sighting, self.batch)
        if isinstance(placed, str):
            self._skip(name, placed)
            return run()
        geometry, rows = placed.geometry, sighting.shape[0] * sighting.shape[1]
        if (
            rows != self.batch * placed.windows * placed.heads
            or (geometry.queries.shape[1], geometry.keys.shape[1]) != sighting.shape[2:]
        ):
            self._skip(name, f"its maps {list(sighting.shape)} are others than those whose places were observed")
            return run()
        assert sighting.maps is not None
        layer = Layer(-1, name, self.watch.kind(name), placed.heads, geometry, how=sighting.how, places=placed.places)
        layer = replace(layer, causal=sighting.shape[2] == sighting.shape[3] and sighting.causal())
        found = sighting.maps(placed.sorting(self.batch))
        self._read(layer, found)
        out = getattr(found, "out", None)
        return run() if out is None else sighting.output(out)

    def _read(self, layer: Layer, found: Maps) -> None:
        if layer.between_patches and math.prod(layer.grid) == 1:
            return self._skip(layer.name, "its grid is one patch: there are no distances")
        with torch.autocast(self.device, enabled=False):  # float32, also where the model computes in less
            self.seen[layer.name] = Recorded(layer, self.read(layer, found))

    def _skip(self, name: str, reason: str) -> None:
        self.seen[name] = Recorded(Layer(-1, name, self.watch.kind(name)).skipped(reason))

    def result(self) -> list[Recorded]:
        """Every attention layer of the model in its order: those that were seen, and those that should have been.

        Raises ValueError for a model without any.
        """
        modules = {item.layer.module for item in self.seen.values()}
        for name, reason in self.instead.items():
            if name not in modules:
                self._skip(name, reason)
        names = self.watch.names
        rows = {item.layer.module for item in self.seen.values()}
        for module, name in names.items():
            inside = [names[other] for other in module.modules() if other is not module]
            if (
                looks_like_attention(module)
                and name not in rows
                and not any(other in rows or looks_like_attention(self.model.get_submodule(other)) for other in inside)
            ):
                self._skip(name, "neither scaled_dot_product_attention nor softmax is seen in it")
        order = {name or type(module).__name__: place for place, (module, name) in enumerate(names.items())}
        recorded = sorted(
            self.seen.values(), key=lambda item: order[item.layer.module]
        )  # calls of one module stay in turn
        if not recorded:
            raise ValueError(f"{type(self.model).__name__} has no attention layer that can be seen")
        for index, item in enumerate(recorded):
            item.layer = replace(item.layer, index=index)
        return recorded


def record(
    model: nn.Module,
    images: Tensor,
    measure: Measure,
    grid: tuple[int, ...] | Grids | None = None,
    num_prefix_tokens: int | None = None,
) -> list[Recorded]:
    """Forward `images` [B, 3, H, W] in eval mode and apply `measure` to the attention [b, H, Q, K] of every layer.

    The measure gets a few images (or windows) at a time in float32 and returns tensors [b, ...]; no more than one chunk of one
    layer's attention is alive. The model comes back as it was: training mode of each module, buffers, random numbers.

    Raises ValueError for a model without attention.
    """

    def read(layer: Layer, attention: Maps) -> dict[str, Tensor]:
        batch, *per_image = attention.shape
        chunks = [
            measure(attention.part(rows), layer)
            for rows in slices(batch, max(1, maps.CHUNK_BYTES // (4 * math.prod(per_image))))
        ]
        return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}

    recorder = Recorder(model, read, grid, num_prefix_tokens)
    recorder.forward(images)
    return recorder.result()


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without compiled parts and shortcuts that hide its attention; afterwards all is as it was."""
    fast = torch.backends.mha.get_fastpath_enabled()
    uncompiled = getattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", None)
    with evaluating(model), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile")  # of hooks that compiled parts would not see
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            if uncompiled is not None:
                flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            if uncompiled is not None:
                flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = uncompiled


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module has its own training mode again, for frozen parts differ from the rest.

    The flag is set by itself: `train` and `eval` of some modules change weights (LoRA that is merged on eval).
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def plain(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        wrapped = getattr(model, "_orig_mod", None)
        if wrapped is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrapped = model.module
        if wrapped is None:
            return model
        model = wrapped
