"""Attention layers against their equations, written as slowly and plainly as possible."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cil import attention
from cil.attention import GPSA, LPA, SelfAttention, TaskAttention, fused, local_heads, written_out
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


def positions_alone(layer):
    """softmax_j(v.r_ij) [H, N, N] in float64, by the equation."""
    return torch.einsum("ijr,hr->hij", r(layer.grid).double(), layer.pos_weight.detach().double()).softmax(-1)


@pytest.mark.parametrize("heads,d", [(5, 4), (9, 16), (12, 8)])  # of 16, 24 and 16 columns in the fused form
@pytest.mark.parametrize("grid", [(3, 5), (8, 8), (14, 14)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 3e-5), (torch.float64, 1e-12)])
def test_fused_is_written_out_with_its_gradients(heads, d, grid, dtype, tolerance):
    """Float32: 14 x 14 sums products up to 100, of which eps is 1e-5."""
    torch.manual_seed(0)
    weight = local_heads(heads, 1.0, "random") + 0.1 * torch.randn(heads, 3)
    qkv = torch.randn(3, 2, heads, grid[0] * grid[1], d)
    grad = torch.randn(qkv.shape[1:]).to(dtype)

    def run(formulation):
        leaves = [t.to(dtype).requires_grad_() for t in (*qkv, weight)]
        y = formulation(*leaves, grid)
        return y, *torch.autograd.grad((y * grad).sum(), leaves)

    for name, ours, other in zip(["y", "q", "k", "v", "weight"], run(fused), run(written_out), strict=True):
        assert ours.dtype == dtype
        error = (ours - other).abs().max() / max(1, other.abs().max())
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("formulation", [fused, written_out])
def test_gradients_by_differences(formulation):
    torch.manual_seed(0)
    weight = local_heads(4, 1.0, "random") + 0.1 * torch.randn(4, 3)
    leaves = [t.double().requires_grad_() for t in (*torch.randn(3, 1, 4, 6, 3), weight)]
    assert torch.autograd.gradcheck(lambda *leaves: formulation(*leaves, (2, 3)), leaves)


@pytest.mark.parametrize("formulation", [fused, written_out])
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_at_14_by_14(formulation, dtype, tolerance):
    """Against float64 on the same halves; logits reach -300, and a mask rounded to bf16 would be off by 1."""
    torch.manual_seed(0)
    layer = LPA(12 * 16, 12, (14, 14))
    layer.pos_weight.data += 0.1 * torch.randn(12, 3)  # not just integers
    q, k, v = torch.randn(3, 2, 12, 196, 16).to(dtype)
    scores = (q / 8).double() @ k.double().mT + positions_alone(layer).log()
    expected = scores.softmax(-1) @ v.double()
    with torch.no_grad():
        y = formulation(q / 8, k, v, layer.pos_weight, layer.grid)
    assert y.dtype == dtype
    # Outputs up to 4 round by tolerance themselves.
    assert (y.double() - expected).square().mean().sqrt() < tolerance / 2 and (y - expected).abs().max() < 4 * tolerance


@pytest.mark.parametrize("kind", [SelfAttention, GPSA, LPA])
def test_float64(kind):
    layer = moved(kind(20, 5, (3, 5))).double()
    x = torch.randn(2, 15, 20).double()
    v = layer.v(x).unflatten(-1, (5, 4)).transpose(1, 2)
    a = layer.attention_map(x)
    assert a.dtype == torch.float64
    torch.testing.assert_close(layer(x), layer.proj((a @ v).transpose(1, 2).flatten(2)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype,written", [(torch.float32, False), (torch.float64, False), (torch.bfloat16, True)])
def test_choice_on_a_cpu(dtype, written):
    assert attention.writes_out(torch.empty(2, 3, 64, 8, dtype=dtype)) == written
    assert not attention.writes_out(torch.empty(2, 3, 4096, 8, dtype=dtype))
    assert not attention.writes_out(torch.empty(2, 3, 64, 8, dtype=dtype, device="meta"))  # as on a GPU


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("training", [False, True])
def test_fused_lpa_builds_no_map_and_no_mask(training):
    layer, x = LPA(12, 3, (16, 16)), torch.randn(1, 256, 12)
    assert not attention.writes_out(x)
    with torch.set_grad_enabled(training), Largest() as largest:
        y = layer(x)
        if training:
            y.sum().backward()
    assert 0 < largest.elements < 256 * 256  # a map of a single head
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Largest() as largest:
        layer(x)
    assert largest.elements >= 3 * 256 * 256  # written out


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
