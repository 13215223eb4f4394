"""Tensors of weights files: read without unpickling, checked before a network computes with them."""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from cil.files import reason_of, regular


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Strictly. Raises ValueError that names what does not fit or is not finite."""
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in state.items()}
    odd = sorted(k for k in expected.keys() | given.keys() if expected.get(k) != given.get(k))
    if odd:
        shapes = f"{odd[0]}: {given.get(odd[0], 'missing')} in the file, {expected.get(odd[0], 'unknown')} in the model"
        raise ValueError(f"{source} does not fit the model at {len(odd)} of {len(expected)} tensors ({shapes})")
    wanted = model.state_dict()
    for name, tensor in state.items():
        check_tensor(name, tensor, wanted[name], source)
    model.load_state_dict(state)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: Tensor, wanted: Tensor, source: Path) -> None:
    """Raises ValueError for a tensor of a weights file that the network cannot compute with."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not plain or (wanted.is_floating_point() and tensor.dtype not in DTYPES):
        odd = {
            "quantised": tensor.is_quantized,
            "meta": tensor.is_meta,
            str(tensor.layout): tensor.layout != torch.strided,
        }
        kind = next((name for name, so in odd.items() if so), str(tensor.dtype)).removeprefix("torch.")
        raise ValueError(f"{source} holds {name} as {kind}: save it as float32, float16 or bfloat16")
    if tensor.is_floating_point() and not tensor.to(wanted.dtype).isfinite().all():
        raise ValueError(f"{source} holds NaN or infinite values in {name}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError for a file that is truncated or something else."""
    try:
        return load_file(regular(path))
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({reason_of(error)})") from None
