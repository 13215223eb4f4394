"""Probe: an instrument that is put on any vision transformer and taken off again."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from cil.tables import AFTER
from locality_probe.measures import MEASURES, Sums, check_measures
from locality_probe.record import Grids, Layer, Maps, Recorded, Recorder, plain
from locality_probe.tables import LAYERS, NONLOCALITY, NONLOCALITY_IMAGES

NO_PATCHES = "only class or task tokens are queries: there is no attention between patches"


@dataclass(frozen=True)
class Measurement:
    """What a Probe has measured: `layers` in their order, `values` [images, H] float64 by measure, `parameters` [H] by name."""

    layers: list[Layer]
    values: list[dict[str, Tensor]]
    parameters: list[dict[str, Tensor]]

    def table(
        self, run: str = "model", task: int = 0, pair: str | None = None, training: str = "model", at_step: int = AFTER
    ) -> pd.DataFrame:
        """One row per layer and head: the columns of locality_probe.tables.NONLOCALITY, which has their units."""
        rows = []
        for layer, values, parameters in zip(self.layers, self.values, self.parameters, strict=True):
            means = {name: value.mean(0) for name, value in values.items()}
            for head in range(layer.num_heads if values else 0):
                of_head = {name: mean[head].item() for name, mean in means.items()}
                d_loc = values["d_loc"][:, head]
                rows.append(
                    {name: float("nan") for name in NONLOCALITY.columns}
                    | {"run": run, "task": task, "at_step": at_step, "layer": layer.index, "head": head, "pair": pair or run,
                       "training": training, "kind": layer.kind, "extent": layer.extent, "images": len(d_loc),
                       "d_loc_sd": d_loc.std(correction=1).item() if len(d_loc) > 1 else 0.0,
                       "d_uniform": layer.d_uniform, "d_ratio": of_head["d_loc"] / layer.d_uniform}
                    | {"d_loc_pixels": of_head["d_loc"] * layer.patch_pixels, "d_loc_side": of_head["d_loc"] * layer.patch_side}
                    | of_head
                    | {name: values[head].item() for name, values in parameters.items()}
                )  # fmt: skip
        return NONLOCALITY.check(pd.DataFrame(rows, columns=list(NONLOCALITY.columns)))

    def per_image(
        self, run: str = "model", task: int = 0, index: list[int] | None = None, at_step: int = AFTER
    ) -> pd.DataFrame:
        """One row per layer, head and image: the columns of NONLOCALITY_IMAGES. index: each image's place in its source."""
        parts = [
            pd.DataFrame(
                {name: float("nan") for name in NONLOCALITY_IMAGES.columns}
                | {"run": run, "task": task, "at_step": at_step, "layer": layer.index, "head": head}
                | {"image": range(len(values["d_loc"])) if index is None else index}
                | {name: value[:, head].numpy() for name, value in values.items()}
            )
            for layer, values in zip(self.layers, self.values, strict=True)
            for head in range(layer.num_heads if values else 0)
        ]
        empty = pd.DataFrame(columns=list(NONLOCALITY_IMAGES.columns))
        return NONLOCALITY_IMAGES.check(pd.concat(parts, ignore_index=True) if parts else empty)

    def layer_table(self, run: str = "model", task: int = 0, at_step: int = AFTER) -> pd.DataFrame:
        """One row per attention layer, measured or skipped with its reason: the columns of LAYERS."""
        rows = [
            {"run": run, "task": task, "at_step": at_step, "layer": layer.index, "name": layer.name, "kind": layer.kind,
             "how": layer.how, "places": layer.places, "num_heads": layer.num_heads, "grid": "x".join(map(str, layer.grid)),
             "grid_rows": layer.grid[-2] if len(layer.grid) > 1 else 1, "grid_columns": layer.grid[-1],
             "extent": layer.extent, "num_prefix_tokens": layer.num_prefix_tokens, "status": layer.status,
             "reason": layer.reason}
            for layer in self.layers
        ]  # fmt: skip
        return LAYERS.check(pd.DataFrame(rows, columns=list(LAYERS.columns)))


class Probe:
    """Measures the attention of every layer of `model` while it runs, as it is: fused, in its own precision, in eval mode.

        with Probe(model) as probe:
            for images, _ in loader:
                probe.update(images)
        table = probe.result().table()

    grid: (rows, columns) of patches, (N,) for a sequence, (frames, rows, columns) for a video, or a dict of them by the
    prefix of a tower's module names; num_prefix_tokens: tokens without a place. For images neither is needed: places are
    observed, and what is given is checked. measures: some of locality_probe.measures.MEASURES; entropy costs most, d_loc
    is always there. The first batch of a size costs some passes more, in which your own forward hooks run, too.
    Nothing is put on the model but during update; after it, also by an exception, the model is as it was.
    Scores are computed in float32 at least, whatever the model computes in. Memory grows neither with the number of layers
    nor with N^2.

    update raises ValueError for a model without attention and for inputs of another size.
    """

    def __init__(
        self, model: nn.Module, grid: tuple[int, ...] | Grids | None = None, num_prefix_tokens: int | None = None,
        measures: tuple[str, ...] = MEASURES,
    ):  # fmt: skip
        self.model, self.grid, self.num_prefix_tokens = model, grid, num_prefix_tokens
        self.measures = check_measures(tuple(dict.fromkeys(("d_loc", *measures))))
        self._recorder = Recorder(model, self._read, grid, num_prefix_tokens)
        self._seen: list[list[Recorded]] = []
        self._open = False

    def __enter__(self) -> Probe:
        self._open = True
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False

    def update(self, *inputs: object, **named: object) -> object:
        """Run the model on a batch, [B, 3, H, W] or whatever it takes, and add what is seen. Returns the model's output."""
        if not self._open:
            raise ValueError("update a Probe inside `with Probe(model) as probe:`")
        output = self._recorder.forward(*inputs, **named)
        recorded = self._recorder.result()
        if self._seen and [r.layer for r in recorded] != [r.layer for r in self._seen[0]]:
            changed = next(
                (a.layer for a, b in zip(recorded, self._seen[0], strict=False) if a.layer != b.layer),
                recorded[0].layer,
            )
            raise ValueError(
                f"layer {changed.index} ({changed.name}) is another than for the first images (grid {changed.grid}, "
                f"{changed.status}); use a Probe for each image size"
            )
        self._seen.append(recorded)
        return output

    def _read(self, layer: Layer, maps: Maps) -> dict[str, Tensor]:
        if not layer.between_patches:
            return {}
        sums: list[Sums] = []

        def add(attention: Tensor, images: slice, heads: slice, first: int) -> None:
            if not sums:
                sums.append(Sums(layer.geometry, maps.shape[:2], attention, self.measures))
            sums[0].add(attention, images, heads, first)

        maps.visit(add, whole=bool({"sink_mass", "d_loc_no_sinks"} & set(self.measures)))
        if sums[0].sinks_missing:
            maps.visit(sums[0].add_sinks)
        return sums[0].values()

    def result(self) -> Measurement:
        """The measurement of all images so far. Raises ValueError if there were none."""
        if not self._seen:
            raise ValueError("nothing was measured: call probe.update(images) first")
        layers, values, parameters = [], [], []
        for parts in zip(*self._seen, strict=True):
            layer = parts[0].layer
            if layer.status == "ok" and not layer.between_patches:
                layer = layer.skipped(NO_PATCHES)
            layers.append(layer)
            values.append({name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values})
            parameters.append(locality_parameters(self.model, layer) if values[-1] else {})
        return Measurement(layers, values, parameters)


@torch.no_grad()
def locality_parameters(model: nn.Module, layer: Layer) -> dict[str, Tensor]:
    """What a local layer has learned about its locality: {name: [H]} of the parameters below that the layer has.

    gate: share of positional attention in GPSA, sigmoid of its parameter (ConViT, eq. 7), 0 to 1; content_scale: LPA's
    lambda (arXiv 2304.06971, eq. 3).
    """
    module = next((m for name, m in plain(model).named_modules() if layer.module in (name, type(m).__name__)), None)
    gate = getattr(module, "gating_param", getattr(module, "gate", None) if hasattr(module, "attention_map") else None)
    learned = {
        "gate": None if gate is None else gate.sigmoid(),
        "content_scale": getattr(module, "content_scale", None),
    }
    fitting = {name: v for name, v in learned.items() if isinstance(v, Tensor) and v.numel() == layer.num_heads}
    return {name: v.detach().double().flatten().cpu() for name, v in fitting.items()}
