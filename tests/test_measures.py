"""Closed forms of nonlocality, and what must hold for any attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locality_probe.measures import distances, nonlocality, uniform_nonlocality

UNIFORM = {2: 0.853553, 4: 2.008015, 7: 3.609465, 8: 4.136483, 14: 7.280764, 16: 8.326075, 32: 16.677003, 37: 19.285134}
FARTHEST = {
    2: 1.414214,
    4: 3.570543,
    7: 6.747916,
    8: 7.858119,
    14: 14.282977,
    16: 16.424218,
    32: 33.552551,
    37: 38.897386,
}
RECTANGLES = {(8, 16): 6.415021, (14, 10): 6.279514, (7, 28): 9.975342}
# softmax(-||delta - offset||^2) at g = 8 and 14
POSITIONAL = {(0, 0): (0.729213, 0.759376), (0, 1): (1.098085, 1.165688), (1, 1): (1.394490, 1.484557),
              (0.5, 0.5): (0.937365, 0.985969)}  # fmt: skip


def d_loc(attention, grid, prefix=0):
    return nonlocality(attention[None, None].double(), grid, prefix)[0].item()


def one_hot(target):
    return torch.nn.functional.one_hot(target, len(target)).double()


@pytest.mark.parametrize("g", UNIFORM)
def test_uniform_and_farthest(g):
    n = g * g
    assert uniform_nonlocality((g, g)) == pytest.approx(UNIFORM[g], abs=1e-6)
    assert d_loc(torch.full((n, n), 1 / n, dtype=torch.float64), (g, g)) == pytest.approx(UNIFORM[g], abs=1e-6)
    assert d_loc(one_hot(distances((g, g)).argmax(1)), (g, g)) == pytest.approx(FARTHEST[g], abs=1e-6)


@pytest.mark.parametrize("grid", RECTANGLES)
def test_rectangles_are_not_transposed(grid):
    assert uniform_nonlocality(grid) == pytest.approx(RECTANGLES[grid], abs=1e-6)
    rows, columns = grid
    below = (torch.arange(rows * columns) + columns) % (rows * columns)  # one row down; the last row wraps to the first
    expected = ((rows - 1) * 1 + (rows - 1)) / rows
    assert d_loc(one_hot(below), grid) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("g", [2, 8, 14])
def test_identity_and_neighbours(g):
    assert d_loc(torch.eye(g * g), (g, g)) == 0
    y, x = torch.meshgrid(torch.arange(g), torch.arange(g), indexing="ij")
    right, down = (x + 1).clamp_max(g - 1), (y + 1).clamp_max(g - 1)
    assert d_loc(one_hot((y * g + right).flatten()), (g, g)) == pytest.approx((g - 1) / g, abs=1e-6)
    diagonal = ((g - 1) ** 2 * 2**0.5 + 2 * (g - 1)) / g**2
    assert d_loc(one_hot((down * g + right).flatten()), (g, g)) == pytest.approx(diagonal, abs=1e-6)


@pytest.mark.parametrize("offset", POSITIONAL)
@pytest.mark.parametrize("which, g", [(0, 8), (1, 14)])
def test_positional_heads(offset, which, g):
    y, x = torch.meshgrid(torch.arange(g).double(), torch.arange(g).double(), indexing="ij")
    x, y = x.flatten(), y.flatten()
    dx, dy = x[None] - x[:, None], y[None] - y[:, None]
    attention = (-((dx - offset[0]) ** 2) - (dy - offset[1]) ** 2).softmax(-1)
    assert d_loc(attention, (g, g)) == pytest.approx(POSITIONAL[offset][which], abs=1e-6)


def test_prefix_tokens_are_dropped_and_rows_renormalised():
    g, n = 14, 196
    attention = torch.full((1, 1, n + 1, n + 1), 0.5 / n, dtype=torch.float64)
    attention[..., 0] = 0.5
    value, mass = nonlocality(attention, (g, g), 1)
    assert value.item() == pytest.approx(7.280764, abs=1e-6)  # without renormalising it would be 3.64
    assert mass.item() == pytest.approx(0.5)


def test_prefix_mass_is_taken_out_per_image_before_averaging():
    # Two patches in a row: the first looks at the second, the second at itself; masses differ by image and row.
    def image(m0, m1):
        return torch.tensor([[1, 0, 0], [m0, 0, 1 - m0], [m1, 0, 1 - m1]], dtype=torch.float64)

    value, mass = nonlocality(torch.stack([image(0.9, 0.1), image(0.0, 0.5)])[:, None], (1, 2), 1)
    torch.testing.assert_close(value, torch.tensor([[0.5], [0.5]], dtype=torch.float64))
    torch.testing.assert_close(mass, torch.tensor([[0.5], [0.25]], dtype=torch.float64))


def test_patch_that_looks_at_prefix_tokens_alone_is_left_out():
    attention = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)[None, None]
    assert nonlocality(attention, (1, 2), 1)[0].item() == 1.0


@pytest.mark.parametrize("shape", [(1, 1, 4, 5), (1, 1, 5, 5), (1, 4, 4), (1, 1, 3, 4)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match="2 x 2 patches"):
        nonlocality(torch.ones(shape), (2, 2))


grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(grid=grids, peaked=st.floats(0, 30), prefix=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_bounds_and_symmetries(grid, peaked, prefix, seed):
    n = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, prefix + n, prefix + n)
    attention = (peaked * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)
    value, mass = nonlocality(attention, grid, prefix)
    distance = distances(grid)
    assert (value >= 0).all() and (value <= distance.max(1).values.mean() + 1e-9).all()
    patches = attention[..., prefix:, prefix:] / attention[..., prefix:, prefix:].sum(-1, keepdim=True)
    assert (value <= (patches * distance**2).sum(-1).mean(-1).sqrt() + 1e-9).all()  # Jensen
    torch.testing.assert_close(value, (patches * distance).sum(-1).mean(-1))
    assert ((mass >= 0) & (mass <= 1)).all()
    # Mirrored images have the same distances.
    flipped = torch.arange(n).view(grid).flip(1).flatten()
    order = torch.cat([torch.arange(prefix), prefix + flipped])
    mirrored = attention[..., order, :][..., order]
    torch.testing.assert_close(nonlocality(mirrored, grid, prefix)[0], value)
    # Float32 maps lose nothing that counts, where they still hold what the patches attend to at all.
    if attention[..., prefix:, prefix:].sum(-1).min() > 1e-30:
        torch.testing.assert_close(nonlocality(attention.float(), grid, prefix)[0], value, rtol=1e-5, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(grid=grids)
def test_cyclic_shifts_of_one_hot_average_to_uniform(grid):
    n = grid[0] * grid[1]
    shifts = torch.stack([one_hot((torch.arange(n) + s) % n) for s in range(n)])[:, None]
    assert nonlocality(shifts, grid)[0].mean().item() == pytest.approx(uniform_nonlocality(grid), abs=1e-9)


def test_float32_on_a_long_grid():
    """1369 patches of local attention: sums over N^2 terms in float32 would be off by up to 2e-3."""
    grid = (37, 37)
    attention = (-(distances(grid) ** 2)).softmax(-1)[None, None]
    exact = nonlocality(attention, grid)[0]
    torch.testing.assert_close(nonlocality(attention.float(), grid)[0], exact, rtol=1e-6, atol=0)
