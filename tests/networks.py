"""Small networks of known attention, in timm's parts, ours and a user's own, for the tests that record it.

Their attention is peaked: near-uniform maps would let wrong shortcuts pass.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from conftest import TOY
from torch import Tensor, nn

from cil.models import IncrementalViT
from locality_probe.record import Layer, Recorded

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
CHANGED = "its softmax does not meet the values as it is"
CHANNELS = "it attends between channels"
TWICE = "it attends more than once in a forward pass"


def maps(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
    return {"map": attention}


def images(batch: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def sharpen(model: nn.Module) -> nn.Module:
    """Random weights of one size where attention depends on them; timm starts many at zero or near it."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if any(
            part in name for part in ("qkv", "q_proj", "k_proj", "q_bias", "q_norm", "k_norm", "in_proj", "rel_pos")
        ):
            p.data = 0.4 * torch.randn(p.shape, generator=generator) + 2 * ("norm.weight" in name)
        elif any(part in name for part in ("pos_embed", "token")):
            p.data = torch.randn(p.shape, generator=generator)
    return model.eval()


def vit(name: str = "vit_tiny_patch16_224", fused: bool = True, **options) -> nn.Module:
    options = {key: value for key, value in (SMALL | options).items() if value is not None}
    model = sharpen(timm.create_model(name, **options))
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    return model


def status(recorded: list[Recorded]) -> list[tuple[str, str, str]]:
    return [(item.layer.kind, item.layer.status, item.layer.reason) for item in recorded]


def whole() -> nn.Module:
    model = IncrementalViT(TOY, (8, 8))
    model.grow(2)
    return model


def small(name: str, **options):
    return lambda: timm.create_model(name, num_classes=3, **options)


class Tokens(nn.Module):
    """Images [B, 3, 8, 8] -> `mixer`(x) of 2 x 2 patches; what is around a user's own attention."""

    num_prefix_tokens = 0

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.patch_embed = timm.layers.PatchEmbed(8, 4, 3, 8)
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(2 * self.patch_embed(x))


class Mixer(nn.Module):
    """attend(q, k, v [B, 2, 4, 4]) of any kind, in a class whose name says nothing."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.expected = None

    def forward(self, x):
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = 2 * q.roll(1, -1), q.flip(-1)
        out = self.attend(q, k, v)
        return out.transpose(1, 2).flatten(2)


class AttendModule(nn.Module):
    """As `written` below, with the softmax and the dropout in modules of their own."""

    def __init__(self, softmax):
        super().__init__()
        self.softmax, self.drop = softmax, nn.Dropout(0.3)

    def forward(self, q, k, v):
        return torch.matmul(self.drop(self.softmax(q @ k.mT / 2)), v)


class OwnSoftmax(nn.Module):
    def forward(self, scores):
        return torch.softmax(scores, dim=3)


BATCH = 3
GENERATOR = torch.Generator().manual_seed(2)
BOOL = torch.rand(4, 4, generator=GENERATOR) > 0.4
BOOL[2] = True
FLOAT = {n: torch.randn(*(BATCH, 2, 4, 4)[4 - n :], generator=GENERATOR) for n in (2, 3, 4)}
SHARED = torch.randn(1, 1, 4, 4, generator=GENERATOR)
PER_IMAGE = torch.rand(BATCH, 1, 4, 4, generator=GENERATOR) > 0.3
PER_IMAGE[..., 0] = True
sdpa = F.scaled_dot_product_attention

FUSED = {
    "positional": lambda q, k, v: sdpa(q, k, v),
    "keywords": lambda q, k, v: sdpa(value=v, key=k, query=q),
    "all positional": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "bool mask": lambda q, k, v: sdpa(q, k, v, BOOL),
    "bool mask, keyword": lambda q, k, v: sdpa(q, k, v, attn_mask=BOOL),
    "bool mask, an image each": lambda q, k, v: sdpa(q, k, v, attn_mask=PER_IMAGE),
    "float mask [Q, K]": lambda q, k, v: sdpa(q, k, v, attn_mask=FLOAT[2]),
    "float mask [H, Q, K]": lambda q, k, v: sdpa(q, k, v, attn_mask=FLOAT[3]),
    "float mask [B, H, Q, K]": lambda q, k, v: sdpa(q, k, v, attn_mask=FLOAT[4]),
    "float mask [1, 1, Q, K]": lambda q, k, v: sdpa(q, k, v, attn_mask=SHARED),
    "minus infinity": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.zeros(4, 4).masked_fill(~BOOL, float("-inf"))),
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "scale": lambda q, k, v: sdpa(q, k, v, scale=1.7),
    "scale and mask": lambda q, k, v: sdpa(q, k, v, BOOL, scale=0.1),
    "grouped queries": lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
    "one head of keys": lambda q, k, v: sdpa(q, k[:, 1:], v[:, 1:]),
    "through nn.functional": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
}


def written(softmax, product=torch.matmul):
    return lambda q, k, v: product(softmax(q @ k.mT / 2), v)


WRITTEN = {
    "torch.softmax": written(lambda s: torch.softmax(s, -1)),
    "torch.softmax(dim=3)": written(lambda s: torch.softmax(s, dim=3)),
    "Tensor.softmax": written(lambda s: s.softmax(-1)),
    "Tensor.softmax(dim=)": written(lambda s: s.softmax(dim=-1)),
    "F.softmax": written(lambda s: F.softmax(s, -1)),
    "F.softmax(dim=)": written(lambda s: F.softmax(s, dim=-1)),
    "torch.special.softmax": written(lambda s: torch.special.softmax(s, -1)),
    "in float64, back": written(lambda s: s.softmax(-1, dtype=torch.float64).to(s.dtype)),
    "in float64, type_as": written(lambda s: torch.softmax(s.double(), -1).type_as(s)),
    "dropout": written(lambda s: F.dropout(s.softmax(-1), 0.5, training=False)),
    "@": written(lambda s: s.softmax(-1), lambda a, v: a @ v),
    "Tensor.matmul": written(lambda s: s.softmax(-1), lambda a, v: a.matmul(v)),
    "einsum": written(lambda s: s.softmax(-1), lambda a, v: torch.einsum("bhij,bhjd->bhid", a, v)),
    "einsum, values first": written(lambda s: s.softmax(-1), lambda a, v: torch.einsum("bhjd, bhij -> bhid", v, a)),
    "einsum, ellipsis": written(lambda s: s.softmax(-1), lambda a, v: torch.einsum("...ij,...jd->...id", a, v)),
    "einsum, list": written(lambda s: s.softmax(-1), lambda a, v: torch.einsum("bhij,bhjd->bhid", [a, v])),
    "nn.Softmax": AttendModule(nn.Softmax(dim=-1)),
    "a module around softmax": AttendModule(OwnSoftmax()),
}


class Asked(nn.Module):
    """A user's layer that offers its map, and computes with modules and softmaxes inside."""

    grid, num_prefix_tokens = (2, 2), 0

    def __init__(self):
        super().__init__()
        self.soft, self.inner, self.calls = nn.Softmax(-1), Mixer(FUSED["positional"]), 0

    def attention_map(self, x):
        self.calls += 1
        return self.soft((x @ x.mT)[:, None])

    def forward(self, x):
        return (self.attention_map(x) @ x[:, None])[:, 0] + self.inner(x)
