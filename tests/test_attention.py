"""Attention layers against their equations, written as slowly and plainly as possible."""

import itertools

import pytest
import torch

from cil.attention import GPSA, LPA, SelfAttention, TaskAttention, local_heads
from locality_probe.measures import nonlocality

GRIDS = [(4, 4), (3, 5)]


def r(grid):
    """[N, N, 3]: (dx, dy, dx^2 + dy^2), by two loops."""
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    rows = [[(jx - ix, jy - iy, (jx - ix) ** 2 + (jy - iy) ** 2) for jy, jx in places] for iy, ix in places]
    return torch.tensor(rows, dtype=torch.float32)


def moved(layer):
    """Away from the initial values, where much is zero."""
    torch.manual_seed(1)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", [SelfAttention, GPSA, LPA])
@pytest.mark.parametrize("mode", ["training", "inference", "bf16 training", "bf16 inference"])
def test_forward_computes_with_the_attention_map(kind, grid, mode):
    layer = moved(kind(20, 5, grid))
    x = torch.randn(2, grid[0] * grid[1], 20)
    with torch.no_grad():
        v = layer.v(x).unflatten(-1, (5, 4)).transpose(1, 2)
        expected = layer.proj((layer.attention_map(x) @ v).transpose(1, 2).flatten(2))
    with torch.set_grad_enabled("training" in mode), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in mode):
        y = layer(x)
    tolerance = 0.05 if "bf16" in mode else 1e-5
    torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)
    rows = layer.attention_map(x).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("grid", GRIDS)
def test_lpa_equation(grid):
    layer = moved(LPA(20, 5, grid))
    x = torch.randn(2, grid[0] * grid[1], 20)
    q, k = layer.query_key(x)
    scores = layer.content_scale[:, None, None] * (q @ k.transpose(-2, -1)) / 4**0.5
    scores = scores + torch.einsum("ijr,hr->hij", r(grid), layer.pos_weight)
    torch.testing.assert_close(layer.attention_map(x), scores.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_gpsa_equation(grid):
    layer = moved(GPSA(20, 5, grid))
    x = torch.randn(2, grid[0] * grid[1], 20)
    q, k = layer.query_key(x)
    s = layer.gate.sigmoid()[:, None, None]
    position = torch.einsum("ijr,hr->hij", r(grid), layer.pos_weight) + layer.pos_bias[:, None, None]
    expected = (1 - s) * (q @ k.transpose(-2, -1) / 4**0.5).softmax(-1) + s * position.softmax(-1)
    torch.testing.assert_close(layer.attention_map(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [GPSA, LPA])
def test_gradients_reach_every_parameter(kind):
    layer = moved(kind(16, 4, (3, 3)))
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and (name == "pos_bias" or parameter.grad.abs().max() > 0), name


def test_clamped_bias_changes_nothing_at_14_by_14():
    layer = LPA(36, 9, (14, 14), locality_strength=3.0)
    x = torch.randn(1, 196, 36)
    q, k = layer.query_key(x)
    scores = (layer.content_scale[:, None, None] * (q @ k.transpose(-2, -1)) / 2).double()
    scores = scores + torch.einsum("ijr,hr->hij", r((14, 14)), layer.pos_weight).double()
    torch.testing.assert_close(layer.attention_map(x).double(), scores.softmax(-1), atol=1e-6, rtol=0)


def test_d_loc_at_initialisation():
    """GPSA with 4 heads at 14 x 14 and uniform content, and LPA's local heads, in closed form."""
    x = torch.zeros(1, 196, 16)
    for layer, expected in [(GPSA(16, 4, (14, 14)), 2.678900), (LPA(16, 4, (14, 14)), 0.985969)]:
        d_loc = nonlocality(layer.attention_map(x), (14, 14))[0]
        assert d_loc.mean().item() == pytest.approx(expected, rel=1e-5)


def test_extra_heads_and_lambda():
    torch.manual_seed(0)
    assert (local_heads(12, 1.0, "uniform")[9:] == 0).all()
    random = local_heads(12, 1.0, "random")[9:]
    assert 0 < random.abs().max() < 0.1
    assert (LPA(12, 12, (2, 2)).content_scale == 0.02).all()
    scale = LPA(400, 400, (2, 2), lambda_init=0.5, lambda_init_mode="normal").content_scale
    assert 0.4 < scale.std() < 0.6 and 120 < (scale < 0).sum() < 280


def test_task_attention_tokens_never_see_each_other():
    layer = moved(TaskAttention(16, 4, (3, 3)))
    tokens, patches = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    attention, together = layer.attention_map(tokens, patches), layer(tokens, patches)
    assert attention.shape == (2, 4, 3, 10)
    for t in range(3):
        alone = layer(tokens[:, t : t + 1], patches)
        torch.testing.assert_close(together[:, t : t + 1], alone)
        # Plain attention of one query over [its token, patches].
        keys = torch.cat([tokens[:, t : t + 1], patches], 1)
        q, k = (f(z).unflatten(-1, (4, 4)).transpose(1, 2) for f, z in ((layer.q, keys[:, :1]), (layer.k, keys)))
        torch.testing.assert_close(attention[:, :, t : t + 1], (q @ k.transpose(-2, -1) / 2).softmax(-1))
