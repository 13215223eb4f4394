"""Weights files as people have them: which of their tensors are the network's, whatever stands before its names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from cil import foreign
from cil.tensors import check_tensor, read_safetensors

# First words of names that are no part of a trunk: classifiers, projections of self-supervised training, decoders of MAE.
HEADS = re.compile(
    r"(heads?|head_dist|fc|classifier|classifiers|proj(ector|ection)?|projection_head|predictor|prototypes|mlp_head|last_layer|"
    r"decoder\w*|mask_token|pooler|logit_scale|loss\w*|criterion\w*|queue\w*)(\.|$)"
)
AVERAGES = ("ema", "teacher", "momentum", "key", "encoder_k")  # of two networks that fit, the one that is an average


@dataclass
class Weights:
    """A file's tensors by name; said: sentences about what was read and what was left out, for the user."""

    path: Path
    state: dict[str, Tensor]
    said: list[str] = field(default_factory=list)


def read(path: Path) -> Weights:
    """A state dict, never unpickled. Raises ValueError for what is missing, empty, truncated, or more than weights, and for
    tensors that no network here computes with: whole numbers for weights, complex, 8-bit, sparse, quantised."""
    if not path.is_file():
        raise ValueError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        return Weights(path, read_safetensors(path))
    state, where = foreign.open_pth(path)
    said = [f"{path.name}: the weights under {where!r} are read"] if where not in ("", "state_dict", "model") else []
    return Weights(path, state, said)


def load(make: Callable[[int | None], nn.Module], weights: Weights, head: tuple[str, ...] = ()) -> nn.Module:
    """The network that make(image size or None) makes, with the file's tensors in it. head: names of its classifiers.

    It is made at the image size that the file's position embedding is for. All of the trunk must be there and fit;
    classifiers and projections of another size are left out, and `weights.said` says so.
    Raises ValueError that counts what does not fit, and names a tensor that is not finite or of no use.
    """
    model = make(None)
    inside = _inside(weights, {name for name in model.state_dict() if not _is_of(name, head)})
    size = _image_size(model, inside)
    model = model if size is None else make(size)
    if size is not None:
        weights.said.append(f"{weights.path.name}: its position embedding is for images of {size} pixels")
    expected = model.state_dict()
    of_head = [name for name in expected if _is_of(name, head)]
    wrong = [name for name, tensor in expected.items() if name not in inside or inside[name].shape != tensor.shape]
    _check_trunk(inside, expected, [name for name in expected if name not in of_head], weights.path)
    left = sorted(
        {name.split(".")[0] for name in wrong} | {name.split(".")[0] for name in inside if name not in expected}
    )
    if left:
        weights.said.append(f"{weights.path.name}: {', '.join(left)} is left out, which attention does not need")
    model.load_state_dict(
        {name: tensor for name, tensor in inside.items() if name in expected and name not in wrong}, strict=False
    )
    return model


def load_backbone(backbone: nn.Module, weights: Weights, new: Collection[str] = ()) -> None:
    """Put a file's tensors into a timm network without a classifier, whatever its image and patch size.

    Position embeddings and patch projections are resampled as timm does. All of the network must be there and fit, but for the
    tensors named in `new`, which stay as they are where the file has none; classifiers and projections are left out.
    Raises ValueError as `load` does.
    """
    expected = backbone.state_dict()
    inside = _inside(weights, set(expected) - set(new))
    resample = getattr(inspect.getmodule(type(backbone)), "checkpoint_filter_fn", None)
    if resample is not None:
        try:
            inside = resample(inside, backbone)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:  # tensors of other shapes than timm's
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{weights.path} does not fit {type(backbone).__name__}: {reason}") from None
    trunk = [name for name in expected if name in inside or name not in new]
    _check_trunk(inside, expected, trunk, weights.path)
    backbone.load_state_dict({name: inside[name] for name in trunk}, strict=False)


def _inside(weights: Weights, names: set[str]) -> dict[str, Tensor]:
    """The file's tensors under the network's names, of which `names` are to be found; says where they lay."""
    prefix = _prefix(weights.state, names)
    if prefix:
        weights.said.append(f"{weights.path.name}: the weights under {prefix!r} are read")
    return {name[len(prefix) :]: tensor for name, tensor in weights.state.items() if name.startswith(prefix)}


def _check_trunk(inside: dict[str, Tensor], expected: dict[str, Tensor], trunk: list[str], path: Path) -> None:
    """Raises ValueError unless the file holds all of `trunk`, of the expected shapes, and nothing unknown but classifiers."""
    bad = [name for name in trunk if name not in inside or inside[name].shape != expected[name].shape]
    extra = [name for name in inside if name not in expected and not HEADS.match(name)]
    if bad or extra:
        example = bad[0] if bad else extra[0]
        given = tuple(inside[example].shape) if example in inside else "missing"
        wants = tuple(expected[example].shape) if example in expected else "unknown"
        raise ValueError(
            f"{path} does not fit the model at {len(bad)} of {len(trunk)} tensors of its trunk, and holds "
            f"{len(extra)} others ({example}: {given} in the file, {wants} in the model)"
        )
    for name in trunk:
        check_tensor(name, inside[name], expected[name], path)


def _is_of(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a tensor is of one of these modules."""
    return any(name == part or name.startswith(part + ".") for part in parts)


def _prefix(state: dict[str, Tensor], names: set[str]) -> str:
    """What stands before the names of the network's trunk in the file: of all beginnings that which finds most of them."""
    beginnings = {""} | {name[: match.end()] for name in state for match in re.finditer(r"\.", name)}
    found = {
        start: sum(name.startswith(start) and name[len(start) :] in names for name in state) for start in beginnings
    }
    most = max(found.values())
    best = sorted(
        (start for start, count in found.items() if count == most), key=lambda start: (start.count("."), start)
    )
    averaged = [start for start in best if any(word in start for word in AVERAGES)]
    return (averaged or best)[0]


def _image_size(model: nn.Module, state: dict[str, Tensor]) -> int | None:
    """The side of the images that the file's position embedding is for, where it is not that of the model."""
    own, given = getattr(model, "pos_embed", None), state.get("pos_embed")
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(own, Tensor) or given is None or given.ndim != 3 or given.shape == own.shape or patch is None:
        return None
    grid = getattr(model.patch_embed, "grid_size", (0, 0))
    prefix = own.shape[1] - grid[0] * grid[1]
    side = round(max(given.shape[1] - prefix, 0) ** 0.5)
    fits = side > 0 and side**2 == given.shape[1] - prefix and patch[0] == patch[1] and given.shape[2] == own.shape[2]
    return side * patch[0] if fits and side * patch[0] < 10_000 else None
