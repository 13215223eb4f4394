"""Measures of attention maps: tensors in, tensors out; no model, file or device in them.

A grid is (rows, columns) of patches in row-major order, or (N,) for a sequence; distances are in patches or positions.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from locality_probe.geometry import Geometry, distances, everyday_tensors, positions, uniform_nonlocality

__all__ = [
    "MEASURES",
    "Sums",
    "distances",
    "measure",
    "measure_attention",
    "nonlocality",
    "positions",
    "uniform_nonlocality",
]

MEASURES = (
    "d_loc", "rms_distance", "prefix_mass", "entropy", "self_mass", "centroid_shift", "sink_mass", "d_loc_no_sinks",
    "d_time", "d_space",
)  # fmt: skip


@functools.lru_cache(maxsize=64)  # of one grid, layer after layer; all queries at once would need N^2 memory
def _weights(
    geometry: Geometry,
    window: int,
    first: int,
    last: int,
    powers: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Of the queries first..last: [last - first, 2.., K] with 1, ||p_j - p_i|| and what `powers` names; 0 for keys and
    queries without a place.

    Keys go last, as they do in attention: a product over them is then 1.5 to 7 times as fast (benchmarks/probe.py).
    """
    with everyday_tensors():
        work = torch.float64 if device.type == "cpu" or dtype == torch.float64 else dtype
        q, k = geometry.queries[window, first:last].to(device, work), geometry.keys[window].to(device, work)
        both = (~q.isnan().any(-1))[:, None] & ~k.isnan().any(-1)
        squares = [(k[:, axis] - q[:, None, axis]).square() for axis in range(k.shape[1])]
        square = sum(squares[1:], squares[0])
        rows = {"mass": torch.ones_like(square), "distance": square.sqrt(), "square": square}
        if len(squares) == 3:  # video: frames, rows, columns
            rows |= {"time": squares[0].sqrt(), "space": (squares[1] + squares[2]).sqrt()}
        return torch.stack([rows[name].masked_fill(~both, 0.0) for name in ("mass", "distance", *powers)], 1).to(dtype)


class Sums:
    """What each measure needs of each row of attention maps [B * W, H, Q, K], added block by block: nothing else is kept.

    The windows of an image follow each other. A row is summed in the precision it comes in, rows are added in float64: near
    float64, at the price of float32. Where `add` was not shown all queries of an image at once, `sinks_missing` says so,
    and all blocks are to be shown to `add_sinks`.
    """

    # The sums of a row: over patches of A, A ||p_j - p_i||, then of what is wanted of these; then A p_j, one per axis.
    def __init__(self, geometry: Geometry, shape: tuple[int, ...], like: Tensor, wanted: tuple[str, ...] = MEASURES):
        self.geometry, self.wanted = geometry, check_measures(wanted)
        axes = len(geometry.grid)
        self.powers = ("square",) * ("rms_distance" in wanted) + ("time", "space") * (
            axes == 3 and bool({"d_time", "d_space"} & set(wanted))
        )
        names = ["mass", "distance", *self.powers, "entropy", "self", "prefix", "sink", "left", "left_distance"]
        self.at = {name: n for n, name in enumerate(names)}
        self.place = len(names)
        self.rows = like.new_zeros(*shape, geometry.queries.shape[1], self.place + axes)
        self.scratch: Tensor | None = None
        self.sinks = bool({"sink_mass", "d_loc_no_sinks"} & set(wanted))
        self.received = like.new_zeros(*shape, geometry.keys.shape[1], dtype=torch.float32) if self.sinks else None
        self.sinks_missing = False
        self.parts: list[tuple[int, Tensor | None]] = [
            (window, None if len(geometry.classes.unique()) == 1 else (geometry.classes == window))
            for window in geometry.classes.unique().tolist()
        ]  # windows that lie alike; None: all of them

    def add(self, attention: Tensor, images: slice, heads: slice, first: int) -> None:
        """attention [b, h, q, K], contiguous: of these images and heads, for the queries `first`, first + 1, ..."""
        self._each_part(self._add, attention, images, heads, first)

    def add_sinks(self, attention: Tensor, images: slice, heads: slice, first: int) -> None:
        """The same blocks a second time, once all queries have been seen: what the sinks get."""
        self._each_part(self._add_sinks, attention, images, heads, first)

    def _each_part(self, add, attention: Tensor, images: slice, heads: slice, first: int) -> None:
        for window, alike in self.parts:
            if alike is None:
                rows = self.rows[images, heads, first : first + attention.shape[2]]
                received = None if self.received is None else self.received[images, heads]
                add(window, attention, rows, received, first)
                continue
            of_images = torch.arange(len(self.rows))[images]
            chosen = alike[of_images % self.geometry.windows]
            if chosen.any():
                index, n = of_images[chosen].to(attention.device), attention.shape[2]
                rows = self.rows[index, heads, first : first + n]
                received = None if self.received is None else self.received[index, heads]
                add(window, attention[chosen.to(attention.device)], rows, received, first)
                self.rows[index, heads, first : first + n] = rows
                if self.received is not None and received is not None:
                    self.received[index, heads] = received

    def _add(self, window: int, attention: Tensor, rows: Tensor, received: Tensor | None, first: int) -> None:
        b, h, q, keys = attention.shape
        geometry, at = self.geometry, self.at
        weights = _weights(geometry, window, first, first + q, self.powers, attention.dtype, attention.device)
        # Not einsum over [b, h, q, K]: a batch of products, one a query, that reads each row once.
        sums = torch.bmm(weights, attention.view(b * h, q, keys).permute(1, 2, 0))  # [q, 3, K] @ [q, K, b * h]
        rows[..., : weights.shape[1]] = sums.permute(2, 0, 1).view(b, h, q, -1)
        if "centroid_shift" in self.wanted:
            places = _centred(geometry, window, attention.dtype, attention.device)
            rows[..., self.place :] = (attention.view(-1, keys) @ places).view(b, h, q, -1)
        front = _in_front(geometry, window)
        placed = geometry.placed_keys[window].to(attention.device)
        if "prefix_mass" in self.wanted and front != 0:
            elsewhere = attention[..., :front] if front else attention[..., ~placed]
            rows[..., at["prefix"]] = elsewhere.sum(-1)
        if "self_mass" in self.wanted and geometry.self_keys is not None:
            if geometry.same_places:
                rows[..., at["self"]] = attention.diagonal(first, 2, 3)
            else:
                own = geometry.self_keys[window, first : first + q].to(attention.device)
                there = attention.gather(-1, own.clamp_min(0)[:, None].expand(b, h, q, 1))[..., 0]
                rows[..., at["self"]] = there * (own >= 0)
        if "entropy" in self.wanted:
            rows[..., at["entropy"]] = self._a_log_a(
                attention[..., front:] if front is not None else attention[..., placed]
            )
        if received is not None:
            seen = geometry.placed_queries[window, first : first + q].to(attention.device)
            received += (attention if seen.all() else attention[:, :, seen]).sum(2)
            whole = q == geometry.queries.shape[1]
            self.sinks_missing |= not whole
            if whole:
                self._add_sinks(window, attention, rows, received, first)

    def _add_sinks(self, window: int, attention: Tensor, rows: Tensor, received: Tensor, first: int) -> None:
        b, h, q, keys = attention.shape
        placed = self.geometry.placed_keys[window].to(attention.device)
        count = -(-int(placed.sum()) // 100)
        if count == 0:
            return
        sinks = received.masked_fill(~placed, -1.0).topk(count, dim=-1).indices  # [b, h, count]
        sinks = sinks[:, :, None].expand(b, h, q, count)
        got = attention.gather(-1, sinks)
        rows[..., self.at["sink"]] = got.sum(-1)
        # Summed without them, not subtracted: little may be left. The block is as it was afterwards.
        attention.scatter_(-1, sinks, 0.0)
        weights = _weights(self.geometry, window, first, first + q, (), attention.dtype, attention.device)
        left = torch.bmm(weights, attention.view(b * h, q, keys).permute(1, 2, 0))
        rows[..., self.at["left"] : self.at["left"] + 2] = left.permute(2, 0, 1).view(b, h, q, 2)
        attention.scatter_(-1, sinks, got)

    def _a_log_a(self, patches: Tensor) -> Tensor:
        """sum_j A_ij log A_ij: [b, h, q, N] -> [b, h, q]"""
        if self.scratch is None or self.scratch.numel() < patches.numel():
            self.scratch = patches.new_empty(patches.numel())
        logs = self.scratch[: patches.numel()].view(patches.shape)
        # 0 log 0 = 0. The logarithm is vectorised, which torch.special.entr is not (ten times as long).
        torch.log(patches, out=logs).clamp_(min=-1e4).mul_(patches)
        return logs.sum(-1)

    def values(self) -> dict[str, Tensor]:
        """Each wanted measure [B, H] in float64: the mean over the patches of an image, in all of its windows; NaN where no
        patch attends to a patch, and where a measure has no meaning (d_time in an image)."""
        geometry, at = self.geometry, self.at
        rows = self.rows.cpu().double().unflatten(0, (-1, geometry.windows)).transpose(1, 2)  # [B, H, W, Q, ...]
        rows = rows.flatten(2, 3)[:, :, geometry.placed_queries.flatten()]  # queries that are patches
        mass = rows[..., at["mass"]]
        empty = mass == 0
        share, count = mass.masked_fill(empty, 1.0), (~empty).sum(-1)
        keys = geometry.placed_keys.sum(1)[:, None].expand_as(geometry.placed_queries)[geometry.placed_queries]
        own = geometry.self_keys
        p = torch.stack([_origin(geometry, w) for w in geometry.classes.tolist()])[:, None]
        queries = (geometry.queries - p)[geometry.placed_queries]

        def mean(per_query: Tensor) -> Tensor:
            return per_query.masked_fill(empty, 0.0).sum(-1) / count

        def entropy() -> Tensor:
            choice = keys > 1  # a patch alone in its window can look nowhere else
            ratio = (share.log() - rows[..., at["entropy"]] / share) / keys.double().log()
            return ratio.masked_fill(empty | ~choice, 0.0).sum(-1) / (~empty & choice).sum(-1)

        def sinkless() -> Tensor:
            left = rows[..., at["left"]]
            gone = left == 0
            return (rows[..., at["left_distance"]] / left.masked_fill(gone, 1.0)).sum(-1) / (~gone).sum(-1)

        nothing = torch.full(mass.shape[:2], math.nan, dtype=torch.float64)
        measures = {
            "d_loc": lambda: mean(rows[..., at["distance"]] / share),
            "rms_distance": lambda: mean(rows[..., at["square"]] / share).sqrt(),
            "prefix_mass": lambda: rows[..., at["prefix"]].mean(-1),
            "entropy": entropy,
            "self_mass": lambda: nothing if own is None else mean(rows[..., at["self"]] / share),
            "centroid_shift": lambda: mean((rows[..., self.place :] / share[..., None] - queries).norm(dim=-1)),
            "sink_mass": lambda: mean(rows[..., at["sink"]] / share),
            "d_loc_no_sinks": sinkless,
            "d_time": lambda: mean(rows[..., at["time"]] / share) if "time" in at else nothing,
            "d_space": lambda: mean(rows[..., at["space"]] / share) if "space" in at else nothing,
        }
        return {name: measures[name]() for name in self.wanted}


@functools.lru_cache(maxsize=64)
def _origin(geometry: Geometry, window: int) -> Tensor:
    """The mean place of a window's keys, [D]: sums of places are taken from there, where they are small."""
    with everyday_tensors():
        placed = geometry.keys[window][geometry.placed_keys[window]]
        return placed.mean(0) if len(placed) else torch.zeros(len(geometry.grid), dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def _centred(geometry: Geometry, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where the keys of a window are, from their mean: [K, D], 0 for those without a place."""
    with everyday_tensors():
        return (geometry.keys[window] - _origin(geometry, window)).nan_to_num(0.0).to(dtype).to(device)


@functools.lru_cache(maxsize=64)
def _in_front(geometry: Geometry, window: int) -> int | None:
    """How many keys have no place, where they are all in front of those that have one; else None."""
    placed = geometry.placed_keys[window]
    count = int((~placed).sum())
    return count if not placed[:count].any() else None


def check_measures(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError that names an unknown measure."""
    unknown = [name for name in wanted if name not in MEASURES]
    if unknown:
        raise ValueError(f"no measure {unknown[0]!r}; there: {', '.join(MEASURES)}")
    return tuple(wanted)


def measure_attention(
    attention: Tensor, grid: tuple[int, ...], num_prefix_tokens: int = 0, wanted: tuple[str, ...] = MEASURES
) -> dict[str, Tensor]:
    """The measures of each image and head, over patch-to-patch attention: each [B, H], float64.

    Prefix rows and columns are dropped and each row is renormalised to 1, per image: A' below. A patch whose attention is
    all on prefix tokens attends to no distance; it is left out of the means.

    - d_loc: 1/N sum_ij A'_ij ||p_j - p_i||, patches (nonlocality: arXiv 2304.06971, eq. 1)
    - rms_distance: sqrt(1/N sum_ij A'_ij ||p_j - p_i||^2), patches; never below d_loc
    - prefix_mass: mean attention of patches on prefix tokens, 0 to 1
    - entropy: mean over patches of -sum_j A'_ij log A'_ij, over log N: 0 one key, 1 uniform; without patches that are
      alone in their window
    - self_mass: mean of A'_ii, 0 to 1
    - centroid_shift: mean of ||sum_j A'_ij p_j - p_i||, patches; never above d_loc
    - sink_mass: mean of sum_j in S A'_ij, where S are the ceil(N / 100) patches that get most, by the mean over queries,
      per image and head: 0 to 1 (attention sinks: Darcet et al. 2024, "Vision transformers need registers")
    - d_loc_no_sinks: d_loc with the columns of S left out and rows renormalised, patches
    - d_time, d_space: mean of sum_j A'_ij |t_j - t_i|, and of the distance over rows and columns, for a grid of (frames,
      rows, columns); NaN for others

    attention: [B, H, prefix + N, prefix + N], rows sum to 1, N = product of `grid`, in row-major order.
    Raises ValueError when the shape does not fit the grid, and for an unknown measure.
    """
    geometry = Geometry.of_grid(tuple(grid), num_prefix_tokens)
    tokens = geometry.keys.shape[1]
    if attention.ndim != 4 or attention.shape[-2:] != (tokens, tokens):
        raise ValueError(
            f"attention {tuple(attention.shape)} is not [B, H, T, T] with T = {num_prefix_tokens} prefix tokens + "
            f"{' x '.join(map(str, grid))} patches"
        )
    return measure(attention, geometry, wanted)


def measure(attention: Tensor, geometry: Geometry, wanted: tuple[str, ...] = MEASURES) -> dict[str, Tensor]:
    """`measure_attention` for tokens anywhere: attention [B * W, H, Q, K], the windows of an image one after the other."""
    sums = Sums(geometry, tuple(attention.shape[:2]), attention, wanted)
    sums.add(attention.contiguous(), slice(None), slice(None), 0)
    return sums.values()


def nonlocality(attention: Tensor, grid: tuple[int, ...], num_prefix_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """d_loc and prefix_mass of `measure_attention`: two of [B, H], float64."""
    values = measure_attention(attention, grid, num_prefix_tokens, ("d_loc", "prefix_mass"))
    return values["d_loc"], values["prefix_mass"]
