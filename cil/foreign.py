"""Weights under other names: what the trainers of LPA, DyTox and ConViT save, read into our network or timm's ConViT."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from timm.models.convit import ConVit
from torch import Tensor, nn

from cil.files import regular
from cil.models import IncrementalViT
from cil.run import Run
from cil.tensors import load_weights

# Released name -> ours, in order. The class-token model carries its blocks twice: `transformer_blocks.*` are dropped.
NAMES = [
    (r"^module\.", ""),
    (r"^sabs\.", "blocks."),
    (r"^tabs\.0\.", "task_block."),
    (r"^task_tokens\.", "tokens."),
    (r"^cls_token$", "tokens.0"),
    (r"^head\.(\d+)\.head\.", r"heads.\1.fc."),
    (r"^head\.(\d+)\.norm\.", r"heads.\1.norm."),
    (r"^head_div\.head\.", "div_head.fc."),
    (r"^head_div\.norm\.", "div_head.norm."),
    (r"\.attn\.gating_param$", ".attn.gate"),
    (r"\.attn\.pos_proj\.bias$", ".attn.pos_bias"),
    (r"\.attn\.pos_proj\.weight$", ".attn.pos_weight"),
]


# What trainers save beside weights: arguments, paths of either system, numpy's numbers. They hold values and run nothing.
HARMLESS: list = [
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.WindowsPath,
    pathlib.Path, pathlib.PurePath, np.dtype, np.ndarray, np.float64(0).__reduce__()[0],  # what makes a number of numpy
    *{type(np.dtype(kind)) for kind in np.typecodes["All"]},
]  # fmt: skip
DEEPEST = 8  # dicts in dicts: one that holds itself has no end
# Where a checkpoint has its weights, the most wanted first: averages (as DINO's and timm's evaluation take them), then states.
CONTAINERS = (
    "teacher", "model_ema", "state_dict_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model_state",
    "model", "module", "backbone", "encoder", "net", "network", "student", "params",
)  # fmt: skip


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released names and layouts -> ours. LPA's fourth positional column is lambda: its own parameter here."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if name.startswith("transformer_blocks."):
            continue
        if name.endswith(".attn.pos_weight") and tensor.shape[1] == 4:
            renamed[name.replace("pos_weight", "content_scale")] = tensor[:, 3].clone()
            tensor = tensor[:, :3].clone()
        renamed[name] = tensor
    return renamed


def read(state: dict[str, Tensor], source: Path) -> tuple[nn.Module, tuple[int, int]]:
    """The network that released weights belong to, in eval mode, and the height and width of its images.

    Its architecture is told from names and shapes: heads from the positional weights, so at least one block must be GPSA
    or LPA; the image is taken as square. Raises ValueError when the names are not those of these trainers.
    """
    try:
        state = {re.sub(r"^module\.", "", name): tensor for name, tensor in state.items()}
        if "head.weight" in state and "blocks.0.attn.gating_param" in state:
            model, side = _convit(state)
        else:
            state = rename(state)
            run, side, heads = _architecture(state)
            model = IncrementalViT(run, (side, side))
            for num_classes in heads:
                model.grow(num_classes, divergence="div_head.fc.bias" in state)
    except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError, AssertionError):
        raise ValueError(  # shapes that are no network's stop anywhere in what tells a network from them
            f"{source} does not hold the weights of an LPA, DyTox or ConViT network; those of another model go with "
            "--model, as in --model timm/NAME --weights FILE"
        ) from None
    load_weights(model, state, source)
    return model.eval(), (side, side)


def _convit(state: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """timm's network for weights of ConViT's trainer, and the side of its images. Raises LookupError for other weights."""
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    gates = [name for name in state if name.endswith(".attn.gating_param")]
    heads = len(state[gates[0]])
    side = patch * round(state["pos_embed"].shape[1] ** 0.5)
    model = ConVit(
        img_size=side, patch_size=patch, num_classes=len(state["head.weight"]), embed_dim=dim // heads,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=heads, mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
        qkv_bias="blocks.0.attn.v.bias" in state, local_up_to_layer=len(gates),
    )  # fmt: skip
    return model, side


def _architecture(state: dict[str, Tensor]) -> tuple[Run, int, list[int]]:
    """The run, pixels of a side, and classes of each head. Raises LookupError or ValueError for other weights."""
    positional = [v for k, v in state.items() if k.endswith(".attn.pos_weight")]
    dim, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    side = round(state["pos_embed"].shape[1] ** 0.5)
    depth = 1 + len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    n_lpa = sum(k.endswith(".attn.content_scale") for k in state)
    tokens = sum(k.startswith("tokens.") for k in state)
    heads = sorted((int(k.split(".")[1]), len(v)) for k, v in state.items() if re.match(r"heads\.\d+\.fc\.bias", k))
    run = Run(
        method="dytox" if tokens > 1 or "div_head.fc.bias" in state else "baseline",
        dim=dim, num_heads=len(positional[0]), depth=depth, patch_size=patch, n_lpa=n_lpa,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
    )  # fmt: skip
    return run, side * patch, [num_classes for _, num_classes in heads]


def read_pth(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pth file, as `open_pth` finds it."""
    return open_pth(path)[0]


def open_pth(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in a .pth file, without unpickling objects, and the keys of CONTAINERS that it is under, if it is nested.

    Raises ValueError for a file that is truncated, something else, or holds more than weights.
    """
    if not path.exists():
        raise ValueError(f"no weights file {path}")
    _check_archive(regular(path))
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of what it cannot read, which it then says again
            content = torch.load(path, weights_only=True, map_location="cpu")
    except PermissionError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is no .pth file, or holds objects that could run code when they are read: save the state dict alone"
        ) from None
    except Exception:  # torch raises a different class for each way in which a file is torn
        raise ValueError(f"{path} is truncated or no .pth file") from None
    where: list[str] = []
    while isinstance(content, dict) and not _is_state(content) and len(where) < DEEPEST:
        key = next((key for key in CONTAINERS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        content = content[key]
        where.append(key)
    if not isinstance(content, dict) or not _is_state(content):
        raise ValueError(f"{path} holds no state dict")
    _check_claims(content, path)
    return dict(content), ".".join(where)


def _check_archive(path: Path) -> None:
    """Raises ValueError for a zip file that unpacks to far more than it is: torch.save compresses nothing."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
        except (zipfile.BadZipFile, OSError, NotImplementedError):
            raise ValueError(f"{path} is truncated or no .pth file") from None
        if unpacked > 2 * path.stat().st_size + 2**20:
            raise ValueError(f"{path} unpacks to {unpacked / 2**20:.0f} MiB, which torch.save does not write")


def _check_claims(state: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError where tensors claim more numbers than the file has bytes, as expanded ones do."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values() if tensor.layout == torch.strided)
    if claimed > 4 * path.stat().st_size + 2**20:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, and its tensors claim {claimed:.3g}: save them contiguous"
        )


def _is_state(content: dict) -> bool:
    """Whether a dict is of tensors by name, and of nothing else."""
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
