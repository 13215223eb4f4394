"""Attention of a layer that says itself what it attends to, by `attention_map` or a method that is known to give it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from locality_probe.record.layer import AttentionLayer
from locality_probe.record.maps import Maps

# timm's ConViT has two softmaxes and a gate, and a method that gives the map which it applies.
ASKED_AFTER = {"GPSA": "get_attention"}


def offers_map(module: nn.Module) -> bool:
    """isinstance(module, AttentionLayer), which takes Python 20 microseconds a module, for most of which a look is enough."""
    return hasattr(type(module), "attention_map") and isinstance(module, AttentionLayer)


def asked_maps(module: AttentionLayer, inputs: tuple[Tensor, ...]) -> Maps:
    """The maps that the layer gives for its own inputs, each [B, N, dim]."""
    maps = Maps(lambda rows: module.attention_map(*(x[rows] for x in inputs)), ())
    maps.shape = (len(inputs[0]), *maps.part(slice(0, 1)).shape[1:])
    return maps


def asked_after_maps(give: Callable[[Tensor], Tensor], inputs: tuple[Tensor, ...]) -> Maps:
    """The maps that a method of ASKED_AFTER gives for the first input of its layer."""
    return Maps(lambda rows: give(inputs[0][rows]).float(), (len(inputs[0]), *give(inputs[0][:1]).shape[1:]))
