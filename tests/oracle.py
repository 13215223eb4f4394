"""What attention a model computes, worked out by other means than the instrument's: for the tests of families.

Attention is materialised in float64 from the inputs of torch's operators; where tokens are is written down by hand, from how
each family is built.
"""

import math
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Oracle(TorchDispatchMode):
    """maps: name of a module -> the attention maps [..., Q, K] that it made, in turn."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.maps: dict[str, list[Tensor]] = defaultdict(list)

    def watch(self, model: nn.Module, *inputs: object, **named: object) -> dict[str, list[Tensor]]:
        handles = [
            register_module_forward_pre_hook(lambda module, _: self.stack.append(module)),
            register_module_forward_hook(lambda *_: self.stack.pop() and None),
        ]
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), self:
                model(*inputs, **named)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for handle in handles:
                handle.remove()
        return self.maps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = self.names.get(self.stack[-1]) if self.stack else None
        if name is not None:
            if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
                q, k, *_ = args
                self.maps[name].append(fused(q, k, len(args) > 4 and args[4], **kwargs))
            elif func in (aten._softmax.default, aten._safe_softmax.default):
                x, dim = args[:2]
                x = x.detach().double().softmax(dim)
                self.maps[name].append(x if dim in (-1, x.ndim - 1) else x.transpose(dim, -1))
        return func(*args, **kwargs)


def fused(q: Tensor, k: Tensor, causal: bool = False, *, attn_mask: Tensor | None = None, scale=None, **_) -> Tensor:
    """softmax(q k^T scale + mask) in float64: [B, H, Q, K]"""
    q, k = q.detach().double(), k.detach().double()
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return scores.softmax(-1)


def grid(rows: int, columns: int = 0, step: float = 1.0, first: float = 0.0, prefix: int = 0) -> np.ndarray:
    """Places [prefix + rows x columns, 2], row-major; NaN for the prefix."""
    y, x = np.meshgrid(np.arange(rows), np.arange(columns or rows), indexing="ij")
    places = first + step * np.stack([y.ravel(), x.ravel()], 1)
    return np.concatenate([np.full((prefix, 2), np.nan), places])


def sequence(n: int) -> np.ndarray:
    return np.arange(n, dtype=float)[:, None]


def video(frames: int, rows: int, columns: int) -> np.ndarray:
    """Places [frames x rows x columns, 3], row-major."""
    return (
        np.stack(np.meshgrid(*(np.arange(n) for n in (frames, rows, columns)), indexing="ij"), -1).reshape(-1, 3) + 0.0
    )


def windows(rows: int, window: int, shift: int = 0) -> np.ndarray:
    """Places [W, window^2, 2] of a grid that is padded to whole windows and rolled by `shift`; NaN for padding."""
    padded = math.ceil(rows / window) * window
    at = (np.arange(padded) + shift) % padded
    y, x = np.meshgrid(at, at, indexing="ij")
    places = np.stack([y, x], -1).astype(float)
    places[(y >= rows) | (x >= rows)] = np.nan
    n = padded // window
    return places.reshape(n, window, n, window, 2).transpose(0, 2, 1, 3, 4).reshape(n * n, window * window, 2)


def d_loc(maps: Tensor, queries: np.ndarray, keys: np.ndarray) -> Tensor:
    """(1 / Q) sum_i sum_j A_ij |p_j - q_i| / sum_j A_ij over tokens that have a place, all windows together.

    maps: [B, W, H, Q, K]; queries: [W, Q, D]; keys: [W, K, D] -> [B, H].
    """
    q, k = torch.from_numpy(queries), torch.from_numpy(keys)
    there = (~q.isnan().any(-1))[:, :, None] & (~k.isnan().any(-1))[:, None]  # [W, Q, K]
    distance = (q[:, :, None] - k[:, None]).square().sum(-1).sqrt()
    a = maps.double() * there[:, None]
    rows = (a * distance.nan_to_num()[:, None]).sum(-1) / a.sum(-1).clamp_min(1e-300)
    return rows.sum((1, 3)) / int(there.any(-1).sum())
