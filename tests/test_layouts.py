"""Two hundred ways to lay tokens out and to write attention: each D_loc is the true one, or refused; none is wrong.

The networks are small but real: a convolution cuts patches, their places are learned, attention has residuals around it. What
is true is worked out in float64 from the layer's own queries and keys, whose places are known by construction.
"""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from locality_probe.probe import Probe

sdpa = F.scaled_dot_product_attention


def merged(attend):
    """[B, W, H, n, d] as [B * W, H, n, d]"""
    return lambda q, k, v: attend(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, q.shape[:2])


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT / q.shape[-1] ** 0.5).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


CALLS = {  # attention of q, k, v [B, W, H, n, d]
    "fused": merged(sdpa),
    "fused, five dimensions": sdpa,
    "fused, heads in the batch": lambda q, k, v: (
        sdpa(*(x.flatten(0, 2)[:, None] for x in (q, k, v)))[:, 0].unflatten(0, q.shape[:3])
    ),
    "fused, three dimensions": lambda q, k, v: sdpa(*(x.flatten(0, 2) for x in (q, k, v))).unflatten(0, q.shape[:3]),
    "heads before windows": lambda q, k, v: sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
    "written out": lambda q, k, v: weights(q, k) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bwhij,bwhjd->bwhid", (torch.einsum("bwhid,bwhjd->bwhij", q, k) / q.shape[-1] ** 0.5).softmax(-1), v
    ),
    "values first": lambda q, k, v: (v.mT @ weights(q, k).mT).mT,
    "exp over sum": over_sum,
    "bmm": lambda q, k, v: torch.bmm(weights(q, k).flatten(0, 2), v.flatten(0, 2)).unflatten(0, q.shape[:3]),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """rows, columns of patches; cut: whole | windows | shifted | padded | dilated | pooled; window: its side, or the stride of
    the pooling; order: of the tokens of the whole; front, behind, between: tokens without a place; call: one of CALLS."""

    rows: int
    columns: int
    cut: str
    window: int
    order: str
    front: int
    behind: int
    between: int
    heads: int
    call: str
    seed: int


class Net(nn.Module):
    def __init__(self, layout: Layout, dim: int = 48):
        super().__init__()
        self.layout, generator = layout, torch.Generator().manual_seed(layout.seed)
        n = layout.rows * layout.columns
        self.patch, self.qkv, self.proj = nn.Conv2d(3, dim, 4, 4), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.positions = nn.Parameter(torch.randn(n, dim, generator=generator))
        self.extra = nn.Parameter(torch.randn(layout.front + layout.between + layout.behind, dim, generator=generator))
        self.permutation = torch.randperm(n, generator=generator)
        self.maps: list[Tensor] = []  # [B, W, H, Q, K] of each layer, float64

    def arrange(self, x: Tensor, fill: float) -> Tensor:
        """[B, rows, columns, C] -> [B, W, n, C]"""
        lay, w = self.layout, self.layout.window
        if lay.cut in ("windows", "shifted", "padded", "dilated"):
            if lay.cut == "shifted":
                x = x.roll((-(w // 2), -(w // 2)), (1, 2))
            x = F.pad(x, (0, 0, 0, -lay.columns % w, 0, -lay.rows % w), value=fill)
            x = x.unflatten(2, (-1, w) if lay.cut != "dilated" else (w, -1))
            x = x.unflatten(1, (-1, w) if lay.cut != "dilated" else (w, -1))  # [B, a, b, c, d, C]
            order = (0, 1, 3, 2, 4, 5) if lay.cut != "dilated" else (0, 2, 4, 1, 3, 5)
            return x.permute(order).flatten(3, 4).flatten(1, 2)
        x = {
            "rows": lambda: x.flatten(1, 2),
            "columns": lambda: x.transpose(1, 2).flatten(1, 2),
            "any": lambda: x.flatten(1, 2)[:, self.permutation],
            "units": lambda: x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(1, 4),
            "shuffled": lambda: x.flatten(1, 2)[:, torch.randperm(lay.rows * lay.columns)],
        }[lay.order]()
        return x[:, None]

    def with_extra(self, x: Tensor, extra: Tensor) -> Tensor:
        lay, half = self.layout, x.shape[2] // 2
        some = extra.expand(*x.shape[:2], *extra.shape).split((lay.front, lay.between, lay.behind), 2)
        return torch.cat([some[0], x[:, :, :half], some[1], x[:, :, half:], some[2]], 2)

    def places(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys: [W, Q, 2] and [W, K, 2], NaN for none."""
        lay = self.layout
        grid = torch.stack(
            torch.meshgrid(torch.arange(lay.rows), torch.arange(lay.columns), indexing="ij"), -1
        ).double()
        q = self.with_extra(self.arrange(grid[None], math.nan), torch.full((len(self.extra), 2), math.nan).double())[0]
        if lay.cut != "pooled":
            return q, q
        return q, F.avg_pool2d(grid.permute(2, 0, 1)[None], lay.window)[0].flatten(1).mT[None]

    def forward(self, x: Tensor) -> Tensor:
        lay, self.maps = self.layout, []
        t = self.patch(x).permute(0, 2, 3, 1) + self.positions.view(lay.rows, lay.columns, -1)
        pooled = F.avg_pool2d(t.permute(0, 3, 1, 2), lay.window).flatten(2).mT[:, None] if lay.cut == "pooled" else None
        t = self.with_extra(self.arrange(t, 0.0), self.extra)
        for _ in range(2):
            own, others = self.norm(t), self.norm(t if pooled is None else pooled)
            q, k, v = (y.unflatten(-1, (lay.heads, -1)).transpose(2, 3) for y in (
                self.qkv(own).chunk(3, -1)[0], *self.qkv(others).chunk(3, -1)[1:]))  # fmt: skip
            q = 3 * q  # attention that is far from uniform
            self.maps.append(weights(q.double(), k.double()).detach())
            t = t + self.proj(CALLS[lay.call](q, k, v).transpose(2, 3).flatten(3))
        return t


def true_d_loc(a: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """a [B, W, H, Q, K] -> [B, H]"""
    placed_q, placed_k = ~queries.isnan().any(-1), ~keys.isnan().any(-1)
    far = (queries[:, :, None] - keys[:, None]).square().sum(-1).sqrt().nan_to_num(0.0)
    a = a * placed_k[None, :, None, None]
    per_query = (a * far[None, :, None]).sum(-1) / a.sum(-1)  # [B, W, H, Q]
    return per_query.transpose(1, 2).flatten(2)[:, :, placed_q.flatten()].mean(-1)


@st.composite
def layouts(draw) -> Layout:
    cut = draw(st.sampled_from(["whole"] * 4 + ["windows", "shifted", "padded", "dilated", "pooled"]))
    rows, columns = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    window = draw(st.integers(2, 3))
    if cut != "whole":
        rows, columns = window * draw(st.integers(2, 3)), window * draw(st.integers(2, 3))
    if cut == "padded":
        rows, columns = rows - 1, columns - draw(st.integers(0, 1))
    order = draw(st.sampled_from(["rows", "columns", "any", "units", "shuffled"])) if cut == "whole" else "rows"
    if order == "units":
        rows, columns = 2 * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))
    extra = [draw(st.integers(0, 3)) for _ in range(3)] if cut in ("whole", "pooled") else [0, 0, 0]
    return Layout(rows, columns, cut, window, order, *extra, heads=draw(st.sampled_from([1, 2, 4])),
                  call=draw(st.sampled_from(list(CALLS))), seed=draw(st.integers(0, 10**6)))  # fmt: skip


def outcomes(layout: Layout) -> list[str]:
    """ok, or why it was refused, of each layer. Fails for a number that is wrong."""
    torch.manual_seed(layout.seed)
    model, x = Net(layout).eval(), torch.randn(2, 3, 4 * layout.rows, 4 * layout.columns)
    with Probe(model, measures=("d_loc",)) as probe:
        probe.update(x)
    found, (queries, keys) = probe.result(), model.places()
    names = [layer.name for layer in found.layers]
    assert names == ["Net", "Net#2"], layout
    for layer, values, a in zip(found.layers, found.values, model.maps, strict=True):
        if layer.status == "ok":
            assert layout.order != "shuffled" and layer.num_heads == layout.heads, (layout, layer)
            true = true_d_loc(a, queries, keys)
            torch.testing.assert_close(values["d_loc"], true, rtol=1e-5, atol=1e-6, msg=lambda m: f"{layout}: {m}")
    return [layer.status if layer.status == "ok" else layer.reason for layer in found.layers]


COUNTS: Counter = Counter()


@seed(0)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(layout=layouts())
def test_no_layout_gives_a_wrong_number(layout):
    for outcome in outcomes(layout):
        COUNTS[layout.order == "shuffled", outcome] += 1


def test_regular_layouts_are_measured():
    """The layouts of the test before: hardly one is refused that has its tokens at regular places."""
    regular = {outcome: n for (shuffled, outcome), n in COUNTS.items() if not shuffled}
    if sum(regular.values()) < 30:
        pytest.skip("too few layouts were tried in this process")
    assert regular.get("ok", 0) >= 0.9 * sum(regular.values()), regular


@pytest.mark.slow
@seed(1)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(layout=layouts())
def test_none_of_two_hundred_layouts_gives_a_wrong_number(layout):
    outcomes(layout)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("cut", ["whole", "windows", "shifted", "padded", "dilated", "pooled"])
def test_every_cut_is_measured_in_every_spelling(cut, call):
    rows = 5 if cut == "padded" else 6
    front = 1 if cut == "whole" else 0
    layout = Layout(rows, 6, cut, 2, "rows", front, 0, 0, heads=2, call=call, seed=3)
    assert outcomes(layout) == ["ok", "ok"]
