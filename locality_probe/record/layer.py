"""What a layer is: where it stands, where its tokens are, how it was seen, and why it was skipped if it was."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from locality_probe.measures import uniform_nonlocality


@runtime_checkable
class AttentionLayer(Protocol):
    """A layer that says what it attends to. K = num_prefix_tokens + the patches of grid, Q = K or tokens only."""

    grid: tuple[int, int]
    num_prefix_tokens: int

    def attention_map(self, *inputs: Tensor) -> Tensor:
        """The layer's own inputs, each [B, N, dim] -> [B, H, Q, K]"""


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model and what became of it: `status` is ok, or skipped with a `reason`.

    how: sdpa (F.scaled_dot_product_attention) | eager (a softmax times the values) | multihead (nn.MultiheadAttention) |
    asked (by attention_map)
    extent: grid, of the whole image, or window: the grid is that of one window, and maps are [B * windows, H, Q, K]
    """

    index: int
    name: str
    kind: str
    num_heads: int
    queries: int
    grid: tuple[int, ...]
    num_prefix_tokens: int
    status: str = "ok"
    reason: str = ""
    how: str = ""
    extent: str = "grid"
    causal: bool = False

    @property
    def keys(self) -> int:
        return self.num_prefix_tokens + math.prod(self.grid)

    @property
    def between_patches(self) -> bool:
        """Whether patches are among the queries; not so where a class or task token alone looks at them."""
        return self.queries == self.keys

    @property
    def d_uniform(self) -> float:
        """D_loc of uniform attention here, in patches; under a causal mask, over the keys that it leaves."""
        return uniform_nonlocality(self.grid, self.causal)

    def skipped(self, reason: str) -> Layer:
        return replace(self, status="skipped", reason=reason)


@dataclass
class Recorded:
    """A layer, and the values that were read off it: tensors [B, ...], empty if the layer was skipped."""

    layer: Layer
    values: dict[str, Tensor] = field(default_factory=dict)
