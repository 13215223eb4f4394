"""transfer: probes, CKA, the rank correlation, groups and controls; the command and its figure."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group, spearmanr
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from cil.checkpoint import open_run
from figures import transfer as figure
from locality_probe.cli import main
from locality_probe.features import features, load
from locality_probe.tables import ALL_TASKS, CKA, TRANSFER, TRANSFER_LOCALITY
from locality_probe.transfer import PROBES, cka, correct, rank_correlation, transfer


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("probe", PROBES)
def test_probes_find_what_is_there_and_nothing_else(probe):
    labels = np.arange(400) % 4
    far = np.eye(4)[labels] * 20 + normal(400, 4).numpy()
    assert correct(probe, far[:200], labels[:200], far[200:], labels[200:]).all()
    near = np.eye(4)[labels] + normal(400, 4).numpy()
    shuffled = np.random.default_rng(0).permutation(labels[:200])
    assert correct(probe, near[:200], labels[:200], near[200:], labels[200:]).mean() > 0.4
    assert 0.13 < correct(probe, near[:200], shuffled, near[200:], labels[200:]).mean() < 0.37  # chance is .25
    noise = normal(400, 4, 1).numpy()
    assert 0.13 < correct(probe, noise[:200], labels[:200], noise[200:], labels[200:]).mean() < 0.37  # chance is .25


def test_cka_identities():
    x = normal(60, 8)
    turned = x @ torch.from_numpy(ortho_group.rvs(8, random_state=0)).float()
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, 3 * turned + 5) == pytest.approx(1, abs=1e-6)
    assert cka(x, normal(60, 5, 2)) == pytest.approx(cka(normal(60, 5, 2), x))
    unrelated = [cka(normal(60, 50, 2 * i), normal(60, 50, 2 * i + 1)) for i in range(20)]
    assert abs(np.mean(unrelated)) < 0.03  # biased CKA of as many: about .45


def hsic_1(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012 (eq. 5), summed over distinct i, j, q, r."""
    n = len(k)
    k, m = k * (1 - np.eye(n)), m * (1 - np.eye(n))
    one = np.ones(n)
    first = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
    return first / (n * (n - 3))


@settings(max_examples=15, deadline=None)
@given(n=st.integers(5, 20), p=st.integers(1, 4), q=st.integers(1, 4), seed=st.integers(0, 1000))
def test_cka_is_its_formula(n, p, q, seed):
    x, y = normal(n, p, seed), normal(n, q, seed + 1) + normal(n, p, seed)[:, :1]
    k, m = ((z - z.mean(0)).double().numpy() @ (z - z.mean(0)).double().numpy().T for z in (x, y))
    expected = hsic_1(k, m) / np.sqrt(hsic_1(k, k) * hsic_1(m, m))
    np.testing.assert_allclose(cka(x, y), expected, rtol=1e-5, atol=1e-6)


def test_rank_correlation():
    rng = np.random.default_rng(0)
    distances = rng.normal([1.0, 2.0, 3.0, 4.0, 5.0], 0.1, (50, 5))
    bits = rng.random((400, 5)) < [0.9, 0.7, 0.5, 0.3, 0.1]
    assert rank_correlation(distances, bits.astype(float)) == (-1, -1, -1)
    noisy = rng.random((400, 5)) < [0.5, 0.52, 0.48, 0.55, 0.45]
    rho, low, high = rank_correlation(distances, noisy.astype(float))
    assert rho == pytest.approx(spearmanr(distances.mean(0), noisy.mean(0)).statistic)
    assert low < rho < high and high - low > 0.5
    assert rank_correlation(distances, np.ones((9, 5)))[0] == 0  # all layers alike: no correlation


@pytest.fixture(scope="module")
def found(toy_runs):
    directories = [open_run(toy_runs / name) for name in ("toy", "toy-joint")]
    directories[1] = directories[1].__class__(**{**directories[1].__dict__, "twin_of": "toy"})
    return transfer(directories, per_class=12, test_per_class=10)


def test_rows_are_those_of_the_features(found, toy_runs):
    directory = open_run(toy_runs / "toy")
    data = load(directory)
    (train, train_labels), (test, labels) = data.draw("train", 12, 0), data.draw("test", 10, 0)
    model = directory.model(1)
    x, y = (torch.cat(list(data.batches(s, i))) for s, i in (("train", train), ("test", test)))
    rows = found.transfer.set_index(["run", "task", "layer", "group", "control", "probe"])
    for group, classes in (("seen", range(4)), ("future", range(4, 6))):
        mine, asked = (np.isin(part, list(classes)) for part in (train_labels, labels))
        z, asked_z = (features(model, images)["block 1"].numpy() for images in (x, y))
        scale = StandardScaler().fit(z[mine])
        probe = RidgeClassifier(alpha=1.0).fit(scale.transform(z[mine]), train_labels[mine])
        row = rows.loc[("toy", 1, "block 1", group, "none", "linear")]
        assert row["accuracy"] == probe.score(scale.transform(asked_z[asked]), labels[asked])
        assert (row["classes"], row["train_images"], row["test_images"]) == (
            len(classes),
            12 * len(classes),
            10 * len(classes),
        )
        assert row["chance"] == 1 / len(classes) and row["low"] < row["accuracy"] < row["high"]
        untrained = directory.new_model(0)
        z, asked_z = (features(untrained, images)["block 1"].numpy() for images in (x, y))
        scale = StandardScaler().fit(z[mine])
        probe = RidgeClassifier(alpha=1.0).fit(scale.transform(z[mine]), train_labels[mine])
        row = rows.loc[("toy", 1, "block 1", group, "initial", "linear")]
        assert row["accuracy"] == probe.score(scale.transform(asked_z[asked]), labels[asked])


def test_groups_and_controls(found):
    rows = found.transfer
    assert set(rows["control"]) == {"none", "initial", "shuffled"} and set(rows["run"]) == {"toy", "toy-joint"}
    assert "future" not in set(rows[rows["task"] == 2]["group"])  # nothing is left to learn
    means = rows[rows["layer"] == "token"].groupby(["group", "control"])["accuracy"].mean()
    assert means["seen", "none"] > means["seen", "shuffled"] + 0.2
    shuffled = rows[rows["control"] == "shuffled"]
    assert abs((shuffled["accuracy"] - shuffled["chance"]).mean()) < 0.1


def test_cka_is_to_the_twin_and_to_the_first_task(found, toy_runs):
    rows = found.cka.set_index(["run", "task", "other_run", "other_task", "layer"])["cka"]
    assert set(rows.loc["toy", 2].index.droplevel("layer")) == {("toy", 0), ("toy-joint", 2)}
    assert set(rows.loc["toy-joint", 1].index.droplevel("layer")) == {("toy-joint", 0)}
    assert rows["toy", 0, "toy-joint", 0, "token"] == pytest.approx(1)  # the first task is the same training
    assert rows.loc["toy", 2].max() < 1
    directory = open_run(toy_runs / "toy")
    data = load(directory)
    x = torch.cat(list(data.batches("test", data.draw("test", 10, 0)[0])))
    expected = cka(features(directory.model(2), x)["block 0"], features(directory.model(0), x)["block 0"])
    assert rows["toy", 2, "toy", 0, "block 0"] == pytest.approx(expected, abs=1e-5)


def test_correlation_with_locality(found):
    rows = found.locality.set_index(["run", "task", "probe"])
    assert set(found.locality["task"]) == {0, 1, ALL_TASKS}
    distances = found.nonlocality.query("run == 'toy' and task == 1").groupby("layer")["d_loc"].mean()
    right = found.transfer.set_index(["run", "task", "group", "control", "probe", "layer"])["accuracy"]
    for probe in PROBES:
        accuracy = [right["toy", 1, "future", "none", probe, f"block {i}"] for i in (0, 1)]
        expected = spearmanr(distances, accuracy).statistic if accuracy[0] != accuracy[1] else 0
        row = rows.loc[("toy", 1, probe)]
        assert row["rho"] == pytest.approx(expected) and row["low"] <= row["rho"] <= row["high"]
        assert (row["over"], row["layers"], row["n"]) == ("images", 2, 60)
        mean = rows.loc[("toy", ALL_TASKS, probe)]
        assert mean["over"] == "tasks" and mean["rho"] == pytest.approx(
            np.mean([rows.loc[("toy", t, probe), "rho"] for t in (0, 1)])
        )


def test_the_seed_draws_the_images(found, toy_runs):
    again = transfer([open_run(toy_runs / "toy")], tasks=[1], per_class=12, test_per_class=10)
    assert again.images["test"] == found.images["test"]
    mine = found.transfer.query("run == 'toy' and task == 1").reset_index(drop=True)
    assert again.transfer.equals(mine)
    other = transfer([open_run(toy_runs / "toy")], tasks=[1], per_class=12, test_per_class=10, seed=1)
    assert other.images["test"] != found.images["test"]


def test_figure_draws_the_tables(found):
    drawn = figure.draw(found.transfer, found.nonlocality, "knn")
    cells = found.transfer.set_index(["run", "task", "layer", "group", "control", "probe"])["accuracy"]
    above, below = drawn.axes[0], drawn.axes[2]
    (line,) = [line for line in above.lines if line.get_label() == "task 1"]
    own, initial = (
        [cells["toy", 1, f"block {i}", "future", control, "knn"] for i in (0, 1)] for control in ("none", "initial")
    )
    gain = 100 * (np.array(own) - initial)
    assert line.get_xdata().tolist() == [0, 1]
    np.testing.assert_allclose(line.get_ydata(), gain)
    (line,) = [line for line in below.lines if line.get_label() == "task 1"]
    expected = found.nonlocality.query("run == 'toy' and task == 1").groupby("layer")["d_loc"].mean()
    np.testing.assert_allclose(line.get_ydata(), expected)
    with pytest.raises(ValueError, match="no probe 'tree'; there: knn, linear"):
        figure.draw(found.transfer, found.nonlocality, "tree")


def test_command(runs):
    result = CliRunner().invoke(
        main, ["transfer", "runs/toy", "--per-class", "6", "--test-per-class", "4", "--task", "0", "--task", "1"]
    )
    assert result.exit_code == 0, result.output
    rows = TRANSFER.read("runs/toy/transfer.csv")
    assert set(rows["run"]) == {"toy", "toy-joint"} and set(rows["train_images"]) == {12, 24}
    assert set(CKA.read("runs/toy/cka.csv")["images"]) == {24}
    TRANSFER_LOCALITY.read("runs/toy/transfer_locality.csv")
    own = rows.set_index(["run", "task", "layer", "group", "control", "probe"])["accuracy"][
        "toy", 1, "token", "future", "none", "linear"
    ]
    assert f"{100 * own:.1f} (50.0; " in result.stdout and "correlate by" in result.stdout
    last = CliRunner().invoke(
        main, ["transfer", "runs/toy-joint", "--per-class", "6", "--test-per-class", "4", "--task", "2"]
    )
    assert last.exit_code == 0 and "no run here has classes yet to learn" in last.output
    refused = CliRunner().invoke(main, ["transfer", "runs/toy", "--task", "5"])
    assert refused.exit_code == 2 and "no task 5 in runs/toy; there: 0, 1, 2" in refused.output
