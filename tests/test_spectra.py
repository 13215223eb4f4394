"""Spectra: closed forms, streaming, groups of classes, small samples; the command and its figure."""

import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from cil.checkpoint import open_run
from cil.models import create_model
from figures import spectra as figure
from locality_probe.cli import main
from locality_probe.features import features, load
from locality_probe.spectra import (
    Covariance,
    effective_rank,
    groups,
    marchenko_pastur_edge,
    participation_ratio,
    power_law_slope,
    rankme,
    slope_window,
    spectra,
    summarise,
)
from locality_probe.tables import INITIAL, SPECTRUM, SPECTRUM_SUMMARY


def covariance(z: torch.Tensor, batch: int = 10**9) -> Covariance:
    found = Covariance()
    for part in z.split(batch):
        found = found.update(part)
    return found


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "a, rank, ratio, spectral",
    [(0, 384, 384, 384),
     (0.5, 309.67, 218.34, 37.76), (1, 97.32, 25.96, 6.53), (1.5, 16.21, 5.24, 2.51), (2, 5.03, 2.49, 1.64)],
)  # fmt: skip
def test_power_laws(a, rank, ratio, spectral):
    eigenvalues = torch.arange(1, 385, dtype=torch.float64) ** -a
    assert effective_rank(eigenvalues) == pytest.approx(rank, abs=0.005)
    assert participation_ratio(eigenvalues) == pytest.approx(ratio, abs=0.005)
    assert (eigenvalues.sum() / eigenvalues[0]).item() == pytest.approx(spectral, abs=0.005)
    for window in ((1, 384), slope_window(384), (5, 20)):
        assert power_law_slope(eigenvalues, *window) == pytest.approx(-a, abs=1e-9)


def test_small_samples_of_isotropic_features():
    """n = 1000, d = 384: the effective rank is 317, not 384, and the largest eigenvalue is near the edge."""
    found = summarise(covariance(normal(1000, 384)))
    assert found["effective_rank"] == pytest.approx(317, abs=2)
    largest = found["trace"] / found["spectral_ratio"]
    assert largest == pytest.approx(2.57, abs=0.06)
    assert marchenko_pastur_edge(1.0, 1000, 384) == pytest.approx((1 + 0.384**0.5) ** 2)
    assert found["above_edge"] <= 1 and found["reliable"] == "false"
    strong = normal(4000, 384)
    strong[:, :3] *= 10
    assert summarise(covariance(strong))["above_edge"] == 3
    assert summarise(covariance(strong))["reliable"] == "true"


def test_against_numpy_and_scikit_learn():
    z = normal(300, 7) @ normal(7, 7, 1) + 5
    found = covariance(z, 32)
    np.testing.assert_allclose(found.scatter / 299, np.cov(z.double().numpy().T), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.eigenvalues(), PCA().fit(z.double().numpy()).explained_variance_, rtol=1e-9)
    singular = np.linalg.svd(z.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found.singular_values(), singular, rtol=1e-9)
    p = singular / singular.sum()
    assert rankme(found.singular_values()) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_batches_and_order_do_not_matter(data):
    n, d = data.draw(st.integers(4, 60)), data.draw(st.integers(1, 6))
    z = 100 + normal(n, d, data.draw(st.integers(0, 1000)))  # far from 0: uncentred sums would lose it
    whole = covariance(z).eigenvalues()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for part in (covariance(z, data.draw(st.integers(1, n))), covariance(z[order], 3)):
        torch.testing.assert_close(part.eigenvalues(), whole, rtol=2e-10, atol=1e-11 * whole[0].item())
    cut = data.draw(st.integers(0, n))
    torch.testing.assert_close(
        (covariance(z[:cut]) + covariance(z[cut:])).scatter, covariance(z).scatter, atol=1e-8, rtol=1e-10
    )


def test_groups():
    assert groups(INITIAL, 3) == {"all": range(3)}
    assert groups(1, 3) == {"all": range(3), "seen": range(2), "new": range(1, 2), "future": range(2, 3)}
    assert set(groups(2, 3)) == {"all", "seen", "new"}


# Features --------------------------------------------------------------------------------------------------------------


def stirred(run, image_size=(8, 8)):
    torch.manual_seed(0)
    model = create_model(run, image_size)
    model.grow(2)
    model.grow(2)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return model


@pytest.mark.parametrize("method", ["baseline", "dytox"])
def test_features_of_our_network(method, toy):
    model, x = stirred(dataclasses.replace(toy, method=method)), torch.randn(3, 3, 8, 8)
    model.train()
    model.blocks[0].eval()
    found = features(model, x)
    assert model.training and not model.blocks[0].training and not model.blocks[0]._forward_hooks
    model.eval()
    with torch.no_grad():
        tokens, patches = model.forward_features(x), model.patch_embed(x) + model.pos_embed
        for index, block in enumerate(model.blocks):
            patches = block(patches)
            torch.testing.assert_close(found[f"block {index}"], patches.mean(1))
    torch.testing.assert_close(found["token"], tokens[:, -1])
    assert list(found) == ["block 0", "block 1", "token"] + ["tokens"] * (method == "dytox")
    if method == "dytox":
        torch.testing.assert_close(found["tokens"], tokens.flatten(1))
        torch.testing.assert_close(model.heads[1](found["token"]), model.forward_head(tokens)[:, 2:])


def test_features_of_a_timm_backbone(toy):
    run = dataclasses.replace(toy, model="timm/vit_tiny_patch16_224", patch_size=4, n_lpa=0)
    model, x, seen = stirred(run), torch.randn(3, 3, 8, 8), {}
    model.eval()
    model.backbone.blocks[2].register_forward_hook(lambda _m, _i, output: seen.update(x=output))
    found = features(model, x)
    assert list(found) == [*(f"block {i}" for i in range(12)), "token"]
    torch.testing.assert_close(found["block 2"], seen["x"][:, 1:].mean(1))  # without the class token
    with torch.no_grad():
        torch.testing.assert_close(found["token"], model.backbone(x))


def test_networks_without_blocks_are_refused(toy):
    model = stirred(toy)
    del model.blocks
    with pytest.raises(ValueError, match="IncrementalViT has no list of blocks"):
        features(model, torch.randn(2, 3, 8, 8))


# The command -----------------------------------------------------------------------------------------------------------


def test_tables_of_a_run(toy_runs):
    directory = open_run(toy_runs / "toy")
    said = []
    found = spectra([directory], warn=said.append)
    data = load(directory)
    labels = data.dataset.test.labels
    indices = (labels >= 0).nonzero().squeeze(1)
    model = directory.model(1)
    x = torch.cat(list(data.batches("test", indices)))
    for layer, z in features(model, x).items():
        for group, classes in (("all", range(6)), ("seen", range(4))):
            mine = z[[int(label) in classes for label in labels[indices]]].double().numpy()
            expected = np.linalg.eigvalsh(np.cov(mine.T))[::-1]
            of = found.spectrum.set_index(["task", "layer", "group"])
            rows = of.loc[(1, layer, group)]
            np.testing.assert_allclose(rows["eigenvalue"], expected, rtol=1e-6, atol=1e-6 * expected[0])
            np.testing.assert_allclose(rows["eigenvalue_normalised"].sum(), 1)
    summary = found.summary.set_index(["task", "layer", "group"])
    assert summary.loc[(1, "token", "seen"), "images"] == sum(int(label) < 4 for label in labels[indices])
    assert set(found.summary["task"]) == {INITIAL, 0, 1, 2} and set(found.summary.query("task == -1")["group"]) == {
        "all"
    }
    assert "future" not in set(found.summary.query("task == 2")["group"])
    assert any("fewer than 10 for each of 24 dimensions: their spectrum is flatter" in sentence for sentence in said)


def test_too_few_images(toy_runs):
    with pytest.raises(
        ValueError, match=r"30 images are fewer than 2 for each of the 24 dimensions .* give --n 48 or more"
    ):
        spectra([open_run(toy_runs / "toy")], n=30)
    said = []
    found = spectra([open_run(toy_runs / "toy")], n=60, warn=said.append)
    assert (
        "new" not in set(found.summary["group"])
        and any("such groups are left out" in sentence for sentence in said)
        and len(said) <= 4
    )
    with pytest.raises(ValueError, match="n=100000, but there are"):
        spectra([open_run(toy_runs / "toy")], n=100000)


def test_command(runs):
    result = CliRunner().invoke(main, ["spectrum", "runs/toy", "--task", "2", "--n", "200"])
    assert result.exit_code == 0, result.output
    values, summary = SPECTRUM.read("runs/toy/spectrum.parquet"), SPECTRUM_SUMMARY.read("runs/toy/spectrum_summary.csv")
    assert set(summary["run"]) == {"toy", "toy-joint"} and set(summary["task"]) == {INITIAL, 2}
    rank = summary.set_index(["run", "task", "layer", "group"]).loc[("toy", 2, "token", "seen"), "effective_rank"]
    assert f"{rank:.1f}" in result.stdout
    drawn = figure.draw(values)
    for axes, run in zip(drawn.axes, ("toy", "toy-joint"), strict=False):
        rows = values.set_index(["run", "task", "layer", "group"]).loc[(run, 2, "token", "all")]
        (line,) = [line for line in axes.lines if line.get_label() == "task 2"]
        n = len(line.get_xdata())
        np.testing.assert_allclose(line.get_ydata(), rows["eigenvalue_normalised"][:n])
        assert line.get_xdata()[0] == 1 and axes.get_xscale() == axes.get_yscale() == "log"
    with pytest.raises(ValueError, match="no layer 'block 7'; there: block 0, block 1, token"):
        figure.draw(values, layer="block 7")
    for arguments, code, sentence in (
        (["nowhere"], 1, "nowhere"), ([], 2, "RUN_DIR"),
        (["runs/toy", "--task", "9"], 2, "no task 9 in runs/toy; there: 0, 1, 2"),
    ):  # fmt: skip
        refused = CliRunner().invoke(main, ["spectrum", *arguments])
        assert refused.exit_code == code and sentence in refused.output


def test_images_per_class_is_kept(toy_runs):
    """Training images that a run never saw are not among those that its features are read from."""
    data = load(open_run(toy_runs / "toy"))
    indices, labels = data.draw("train", None, 0)
    assert labels.bincount().tolist() == [12] * 6
    few, labels = data.draw("train", 5, 0)
    assert labels.bincount().tolist() == [5] * 6 and set(few.tolist()) <= set(indices.tolist())
    assert data.task_of(torch.arange(6)).tolist() == [0, 0, 1, 1, 2, 2]
