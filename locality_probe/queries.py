"""The instrument's: what a query attends to in one layer, and followed from the first layer on (attention rollout)."""

from __future__ import annotations

import torch
from torch import Tensor

from locality_probe.record import Layer, Recorded
from locality_probe.typed import Patch, Typed

Query = str | Patch  # mean, cls, or a patch


def measure_of(query: Query):
    """record's measure: {map: [b, H, g_h, g_w]}, or nothing where the layer has no such query."""

    def measure(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
        return map_of(row_of(attention, layer, query), layer)

    return measure


def map_of(row: Tensor | None, layer: Layer) -> dict[str, Tensor]:
    """What a query attends to, [b, H, K], on the grid: {map: [b, H, g_h, g_w]}, or nothing where it has none."""
    drawn = None if row is None else layer.on_grid(row)
    return {} if drawn is None else {"map": drawn.cpu()}


def row_of(attention: Tensor, layer: Layer, query: Query) -> Tensor | None:
    """What the query attends to, [b, H, K], or None where the layer has no such query."""
    if layer.geometry.key_order is None or len(layer.grid) != 2:
        return None
    if isinstance(query, tuple) and not all(0 <= q < g for q, g in zip(query, layer.grid, strict=True)):
        raise Typed(f"query patch {query} is outside the grid of {layer.grid[0]} x {layer.grid[1]} patches")
    if query == "cls":
        if not layer.between_patches:
            return attention[:, :, -1]
        elsewhere = (~layer.geometry.placed_queries[0]).nonzero()
        return attention[:, :, elsewhere[0, 0]] if len(elsewhere) else None
    patches = layer.of_patches(attention) if layer.between_patches else None
    if patches is None:
        return None
    return patches[:, :, query[0] * layer.grid[1] + query[1]] if isinstance(query, tuple) else patches.mean(2)


def rows_of(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
    """record's measure for the rollout: mean over heads [b, 1, Q, K], or nothing within windows."""
    return {"rows": attention.mean(1, keepdim=True).cpu()} if layer.extent == "grid" else {}


def rolled_out(found: list[Recorded], query: Query, run: str) -> list[Recorded]:
    """Each layer's mean attention [1, 1, Q, K] -> the rollout up to it, seen from the query: {map: [1, 1, g_h, g_w]}.

    Raises ValueError where a layer is missing or its tokens are others: attention cannot be followed through it then.
    """
    rolled, so_far, first = [], None, None
    for item in found:
        layer = item.layer
        if not item.values:
            why = layer.reason or "it attends within windows"
            raise ValueError(f"no rollout of {run}: layer {layer.index} ({layer.name}) is not seen as a whole: {why}")
        attention = item.values["rows"]
        if not layer.between_patches:  # tokens that look at the patches of the last layer, and at themselves
            extra = layer.keys - (0 if so_far is None else so_far.shape[-1])
            if so_far is not None and extra >= 0:
                own, patches = attention[..., :extra], attention[..., extra:]
                attention = torch.cat([own, patches @ so_far], -1)
            row = row_of(attention, layer, query)
        else:
            first = first or layer
            if not torch.equal(layer.geometry.keys.nan_to_num(-1.0), first.geometry.keys.nan_to_num(-1.0)):
                raise ValueError(
                    f"no rollout of {run}: the tokens of layer {layer.index} are not those of layer {first.index}"
                )
            step = (attention + torch.eye(layer.keys)) / 2
            so_far = step if so_far is None else step @ so_far
            row = row_of(so_far, layer, query)
        rolled.append(Recorded(layer, map_of(row, layer)))
    return rolled


def no_query(query: str, found: list[Recorded]) -> str:
    reason = next((item.layer.reason for item in found if item.layer.reason), "")
    if any(item.layer.extent == "window" for item in found):
        reason = reason or "it attends within windows, which are not drawn over an image"
    what = "class token" if query == "cls" else "patch"
    where = f"layer {found[0].layer.index}" if len(found) == 1 else "any layer"
    return f"there is no {what} among the queries of {where}" + (f" ({reason})" if reason else "")
