"""What a layer is: where it stands, where its tokens are, how it was seen, and why it was skipped if it was."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from locality_probe.geometry import Geometry

NOWHERE = Geometry.of_grid((0, 0))  # of a layer that was skipped before its tokens were found


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

    name: of its module; name#2, name#3 for the second and third time that it attends in one forward pass.
    how: sdpa (scaled_dot_product_attention's fused kernels) | eager (a product of queries and keys, times the values) |
    kernel (another fused kernel, read by unit vectors) | asked (by attention_map)
    places: how it is known where its tokens are: declared (by the layer or the model), given (by grid=), observed
    geometry: the places; maps of the layer are [B * geometry.windows, H, Q, K]
    """

    index: int
    name: str
    kind: str
    num_heads: int = 0
    geometry: Geometry = NOWHERE
    status: str = "ok"
    reason: str = ""
    how: str = ""
    places: str = ""
    causal: bool = False

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.partition("#")[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """Places along each axis, of the whole image or of one window."""
        return self.geometry.grid

    @property
    def extent(self) -> str:
        """grid: over the whole image | window: maps and grid are those of a window"""
        return "window" if self.geometry.windows > 1 else "grid"

    @property
    def queries(self) -> int:
        return self.geometry.queries.shape[1]

    @property
    def keys(self) -> int:
        return self.geometry.keys.shape[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Keys that have no place in the image: class, register and prompt tokens, in front of the patches or not."""
        return self.geometry.unplaced_keys

    @property
    def between_patches(self) -> bool:
        """Whether patches are among the queries; not so where a class or task token alone looks at them."""
        return bool(self.geometry.placed_queries.any()) and bool(self.geometry.placed_keys.any())

    def on_grid(self, attention: Tensor) -> Tensor | None:
        """Attention [.., K] of any queries -> [.., rows, columns], on each patch; None in windows, and where patches are not
        one key each."""
        order = self.geometry.key_order
        if order is None or len(self.grid) != 2:
            return None
        return attention.index_select(-1, order.to(attention.device)).unflatten(-1, self.grid)

    def of_patches(self, attention: Tensor) -> Tensor | None:
        """Attention [.., Q, K] -> that of the patches, row by row, [.., rows * columns, K]; None where patches are not one
        query each."""
        order = self.geometry.query_order
        return None if order is None else attention.index_select(-2, order.to(attention.device))

    @property
    def d_uniform(self) -> float:
        """D_loc of uniform attention here, in patches; under a causal mask, over the keys that it leaves."""
        return self.geometry.uniform(self.causal)

    @property
    def patch_pixels(self) -> float:
        """Pixels of the input between neighbouring patches; NaN where that is not known, or not the same along both axes."""
        pixels = self.geometry.patch_pixels or (math.nan,)
        return pixels[0] if all(p == pixels[0] for p in pixels) else math.nan

    @property
    def patch_side(self) -> float:
        """A patch in parts of the input's side, the geometric mean of height and width; NaN where pixels are not known."""
        return self.patch_pixels / math.sqrt(math.prod(self.geometry.image)) if self.geometry.image else math.nan

    def as_dict(self) -> dict[str, object]:
        """What is known of the layer, in plain words and numbers."""
        return {
            "index": self.index, "name": self.name, "kind": self.kind, "status": self.status, "reason": self.reason,
            "how": self.how, "places": self.places, "num_heads": self.num_heads, "grid": list(self.grid),
            "extent": self.extent, "windows": self.geometry.windows, "queries": self.queries, "keys": self.keys,
            "num_prefix_tokens": self.num_prefix_tokens, "causal": self.causal,
        }  # fmt: skip

    def skipped(self, reason: str) -> Layer:
        return replace(self, status="skipped", reason=reason)


@dataclass
class Recorded:
    """A layer, and the values that were read off it: tensors [B, ...], empty if the layer was skipped."""

    layer: Layer
    values: dict[str, Tensor] = field(default_factory=dict)
