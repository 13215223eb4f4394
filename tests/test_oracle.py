"""D_loc of a member of every family equals what an oracle works out by other means, or is refused: the test that a new
family has to pass. See oracle.py."""

import math
from collections import Counter

import numpy as np
import oracle
import pytest
import torch
from oracle import grid

from locality_probe.families import families
from locality_probe.probe import Probe

MEMBERS = {(member.library, member.family): member for member in families()}
QUICK = [
    ("timm", "ViT"), ("timm", "DeiT distilled"), ("timm", "LeViT"), ("timm", "PVTv2"), ("timm", "MViTv2"), ("timm", "HaloNet"),
    ("timm", "MobileViT"), ("timm", "EfficientViT (MSRA)"), ("timm", "Twins-SVT"), ("timm", "PiT"),
    *((library, family) for library, family in MEMBERS if library == "transformers"),
]  # fmt: skip

# Tokens without a place, before the patches: class, distillation and register tokens. Families that are not here have none.
PREFIX = {
    "BEiT": 1, "BEiT v2": 1, "CrossViT": 1, "DeiT": 1, "DeiT distilled": 2, "DeiT-III": 1, "DINOv2": 1, "DINOv2, registers": 5,
    "DINOv3": 5, "EVA": 1, "EVA-02": 1, "FlexiViT": 1, "NaFlexViT": 4, "PiT": 1, "ViT": 1, "ViT, hybrid": 1, "ViT, parallel": 1,
    "ViT, registers": 4, "ViT, rotary": 1, "ViT, differential": 1, "ViT, shape-optimised": 4, "Dinov2": 1, "Beit": 1,
    "Dinov2WithRegisters": 5, "DINOv3ViT": 1, "CLIPVision": 1, "ViTMSN": 1, "Data2VecVision": 1, "CLIP": 1,
}  # fmt: skip


# No layer of theirs has attention between patches that can be read; docs/support.md says why of each.
REFUSED = (
    "BAT-ResNeXt", "CaiT", "CoaT", "CoaT-Lite", "EdgeNeXt", "EfficientViT (MIT)", "EfficientViT (MSRA)", "LambdaNet",
    "MllamaVision", "MobileViTv2", "SwiftFormer", "ViTMAE", "XCiT",
)  # fmt: skip


def square(family: str, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Row-major squares; where keys are pooled by patches of r x r, each is in the middle of its patch."""
    prefix = PREFIX.get(family, 0) or int(family in ("ConViT", "TNT") and keys == 197)
    side, coarse = math.isqrt(queries - prefix), math.isqrt(keys - prefix)
    assert side**2 + prefix == queries and coarse**2 + prefix == keys
    step = side / coarse
    return grid(side, prefix=prefix), grid(coarse, step=step, first=(step - 1) / 2, prefix=prefix)


def strided(queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries or keys that a convolution of kernel 3 and padding 1 made with a stride: centred on every r-th token."""
    many, few = math.isqrt(max(queries, keys)), math.isqrt(min(queries, keys))
    sparse = grid(few, step=round(many / few))
    return (grid(many), sparse) if queries >= keys else (sparse, grid(many))


def hiera(name: str, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of mask units of 8 x 8 patches, unrolled: the finest 2 x 2 is the slowest index, then the next ones, then units.

    Inside units (the first two stages) a window is one unit. Pooled queries are the middle of the finest 2 x 2.
    """
    block = int(name.split(".")[1])
    strides = sum(block > last for last in (-1, 1, 3, 10))  # blocks 1, 3 and 10 pool their queries
    strides = 4 - strides  # 2 x 2's that are still unrolled
    units = 1 if block < 4 else 7
    places = np.zeros((units * units, 2)) + grid(units) * 2**strides
    for level in reversed(range(strides)):
        offsets = grid(2) * 2**level
        places = (offsets[:, None] + places).reshape(-1, 2)
    asking = places
    if queries < keys:
        asking = places.reshape(4, queries, 2).mean(0)
    return asking, places


def halo(queries: int, keys: int, side: int, block: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of queries, each with its keys `margin` patches around it; those outside the image are padding."""
    blocks = range(0, side, block)
    inside, around = grid(block), grid(block + 2 * margin) - margin
    q = np.stack([inside + np.array([y, x]) for y in blocks for x in blocks])
    k = np.stack([around + np.array([y, x]) for y in blocks for x in blocks])
    k[((k < 0) | (k >= side)).any(-1)] = np.nan
    return q, k


def place(library: str, family: str, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where queries and keys are, [W, Q, D] and [W, K, D], or without windows; shape: [..., Q, K] of the maps."""
    queries, keys = shape[-2:]
    if family in ("GPT2", "Llama", "Bert") or name.startswith("text_model"):
        return oracle.sequence(queries), oracle.sequence(keys)
    if family == "Timesformer" and "temporal" in name:
        return oracle.sequence(4), oracle.sequence(4)
    if family in ("VideoMAE", "VJEPA2"):
        return oracle.video(2, 4, 4), oracle.video(2, 4, 4)
    if family == "Timesformer":
        return grid(4, prefix=1), grid(4, prefix=1)
    if family == "Qwen2VLVision":  # in blocks of 2 x 2, which are merged into one later
        rows, columns = {32: (4, 8), 24: (6, 4)}[queries]
        blocks = grid(rows // 2, columns // 2) * 2
        places = (blocks[:, None] + grid(2)).reshape(-1, 2)
        return places, places
    if family == "Yolos":
        places = np.concatenate([grid(4, prefix=1), np.full((100, 2), np.nan)])
        return places, places
    if family in ("MViTv2", "MobileNetV4 hybrid", "LeViT", "EfficientFormerV2"):
        return strided(queries, keys)
    if family == "Hiera":
        return hiera(name, queries, keys)
    if family == "Hiera (SAM 2)" and queries < keys:
        return grid(7, step=2, first=0.5), grid(14)
    if family == "HaloNet":
        side, block, margin = (16, 8, 2) if name.startswith("stages.2") else (8, 8, 2)
        if queries == 16:
            q, k = halo(queries, keys, 16, 8, 2)
            return q[:, [i for i in range(64) if i // 8 % 2 == 0 and i % 2 == 0]], k
        return halo(queries, keys, side, block, margin)
    if family == "GC-ViT" and name.split(".")[1] in "01" and name.split(".")[3] == "1":
        side = 56 // 2 ** int(name.split(".")[1])
        k = oracle.windows(side, 7)
        return np.repeat(grid(7, step=side // 7)[None], len(k), 0), k
    if "attn_grid" in name or "grid_attention" in name:  # every n-th patch, n = side / window
        sides = {8: 64, 7: 56}[math.isqrt(keys)]
        stage = int(name.split(".")[1])
        step = sides // 2**stage // math.isqrt(keys)
        return grid(math.isqrt(queries), step=step), grid(math.isqrt(keys), step=step)
    if family == "MobileViT":  # each of the 2 x 2 patches' pixels attends to its like
        return grid(math.isqrt(queries), step=2), grid(math.isqrt(keys), step=2)
    if (library, family) == ("torchvision", "Swin V2"):
        stage, block = int(name.split(".")[1]) // 2, int(name.split(".")[2])
        places = oracle.windows(56 >> stage, 8, 4 if block % 2 and 56 >> stage > 8 else 0)
        return places, places
    if family == "SamVision" and keys == 16:
        places = oracle.windows(6, 4)
        return places, places
    return square("DeiT distilled" if (library, family) == ("transformers", "DeiT") else family, queries, keys)


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[] if key in QUICK else pytest.mark.slow, id=" ".join(key)) for key in MEMBERS]
)
def test_d_loc_is_the_oracles(key):
    library, family = key
    member = MEMBERS[key]
    torch.manual_seed(0)
    model, inputs, named = member.make()
    model.eval()
    try:
        with Probe(model, grid=member.grid, measures=("d_loc",)) as probe:
            probe.update(*inputs, **named)
    except ValueError as error:
        assert "has no attention layer" in str(error)
        return
    measured = probe.result()
    found = oracle.Oracle(model).watch(model, *inputs, **named)
    calls: Counter[str] = Counter()
    checked = []
    for layer, values in zip(measured.layers, measured.values, strict=True):
        calls[layer.module] += 1
        if not values or (family == "VJEPA2" and "predictor" in layer.name):
            assert values or layer.reason
            continue
        maps = whose(found, layer.module)
        maps = gated(model, layer.name, maps) if family == "ConViT" and len(maps) == 2 else maps
        a = maps[(calls[layer.module] - 1) % len(maps)]
        queries, keys = (x if x.ndim == 3 else x[None] for x in place(library, family, layer.name, a.shape))
        several = len(queries)
        images = len(values["d_loc"])
        if several == 1:
            a = a.reshape(images, -1, *a.shape[-2:])[:, None]
        elif a.ndim == 5 or family == "HaloNet":  # [B, H, W, Q, K], or heads in the batch
            a = a.reshape(images, -1, several, *a.shape[-2:]).transpose(1, 2)
        else:
            a = a.reshape(images, several, -1, *a.shape[-2:])
        expected, got = oracle.d_loc(a, queries, keys), values["d_loc"]
        if (expected.shape == got.shape and several > 1) or a.shape[2] == layer.num_heads:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.mean(1), expected.mean(1), rtol=1e-5, atol=0)
        checked.append(layer.name)
    assert bool(checked) != (family in REFUSED)


def whose(found: dict[str, list[torch.Tensor]], module: str) -> list[torch.Tensor]:
    """The maps that a module made, or a softmax inside it."""
    if module in found:
        return found[module]
    (inside,) = {name for name in found if name.startswith(module + ".")} or {""}
    return found[inside]


def gated(model, name: str, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """GPSA of ConViT: (1 - s) content + s position, s = sigmoid(gate)."""
    s = model.get_submodule(name).gating_param.detach().double().sigmoid().view(1, -1, 1, 1)
    content, position = maps
    return [(1 - s) * content + s * position]
