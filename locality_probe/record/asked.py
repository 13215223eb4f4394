"""Attention of a layer that says itself what it attends to, by `attention_map`."""

from __future__ import annotations

from torch import Tensor, nn

from locality_probe.record.layer import AttentionLayer
from locality_probe.record.maps import Maps


def offers_map(module: nn.Module) -> bool:
    """isinstance(module, AttentionLayer), which takes Python 20 microseconds a module, for most of which a look is enough."""
    return hasattr(type(module), "attention_map") and isinstance(module, AttentionLayer)


def asked_maps(module: AttentionLayer, inputs: tuple[Tensor, ...]) -> Maps:
    """The maps that the layer gives for its own inputs, each [B, N, dim]."""
    maps = Maps(lambda rows: module.attention_map(*(x[rows] for x in inputs)), (), inputs[0].device)
    maps.shape = (len(inputs[0]), *maps.part(slice(0, 1)).shape[1:])
    return maps
