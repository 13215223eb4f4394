"""Attention of nn.MultiheadAttention: the same function again, with the weights that it then returns."""

from __future__ import annotations

from torch import Tensor

from locality_probe.record.maps import Maps


def multihead_maps(func, given: dict) -> Maps | str:
    """The maps of F.multi_head_attention_forward, a few images at a time, or why there are none; given: its arguments."""
    query, key, heads = given["query"], given["key"], given["num_heads"]
    if query.ndim != 3:
        return f"its input {list(query.shape)} is not a batch"

    def part(rows: slice) -> Tensor:
        some = given | {name: given[name][:, rows] for name in ("query", "key", "value")}
        if given.get("key_padding_mask") is not None:
            some["key_padding_mask"] = given["key_padding_mask"][rows]
        mask = given.get("attn_mask")
        if mask is not None and mask.ndim == 3:
            some["attn_mask"] = mask[rows.start * heads : rows.stop * heads]
        return func(**some | {"need_weights": True, "average_attn_weights": False})[1].float()

    keys = key.shape[0] + (given.get("bias_k") is not None) + bool(given.get("add_zero_attn"))
    return Maps(part, (query.shape[1], heads, query.shape[0], keys))
