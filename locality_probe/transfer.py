"""How well each layer's features serve classes that the network has seen, and classes that it has yet to learn.

After task t, kNN and a linear probe are trained on a layer's features of training images and tested on test images, among
the seen classes (tasks 0..t) or among the future ones (the paper's figure 5). Two controls say what the numbers are worth:
the network as initialised on the very same classes, and training labels that are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from cil import text
from cil.checkpoint import RunDir
from cil.files import together, write_provenance
from locality_probe import survey
from locality_probe.features import RunData, load
from locality_probe.images import ProbeImages, load_images
from locality_probe.intervals import LEVEL, layer_means, resamples
from locality_probe.subject import from_run
from locality_probe.tables import ALL_TASKS, CKA, INITIAL, TRANSFER, TRANSFER_LOCALITY

NEIGHBOURS = 20
CONTROLS = ("none", "initial", "shuffled")
PROBES = {
    # Cosine distance and votes by closeness, as self-supervised learning has it (Wu et al. 2018).
    "knn": lambda n: KNeighborsClassifier(min(NEIGHBOURS, n), metric="cosine", weights="distance", algorithm="brute"),
    # Least squares on one-hot labels: a closed form, so nothing hangs on steps or seeds.
    "linear": lambda n: make_pipeline(StandardScaler(), RidgeClassifier(alpha=1.0)),
}


def correct(
    probe: str, train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Whether each test image is classified rightly: features [n, d] and labels [n] -> bool [test images]."""
    return PROBES[probe](len(train)).fit(train, train_labels).predict(test) == labels


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA (Kornblith et al. 2019) of features [n, p] and [n, q], debiased (HSIC_1, Song et al. 2012).

    1 for features that are equal up to rotation and scale, about 0 for unrelated ones, however few the images (n > 3).
    """

    def gram(z: Tensor) -> Tensor:
        z = z.double() - z.double().mean(0)
        return (z @ z.T).fill_diagonal_(0)

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n = len(k)
        sums = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
        return ((k * m).sum() + sums) / (n * (n - 3))

    k, m = gram(x), gram(y)
    return (hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item()


def rank_correlation(distances: np.ndarray, bits: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rho over layers of mean distance and accuracy, and its 95 % interval by bootstrap over images.

    distances: [images, layers] of one set; bits: [other images, layers], classified rightly or not.
    """

    def rho(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (stats.rankdata(x, axis=-1) for x in (a, b))
        a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
        spread = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
        return np.divide((a * b).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)

    value = rho(distances.mean(0), bits.mean(0))
    again = rho(resamples(len(distances), 0) @ distances, resamples(len(bits), 1) @ bits)
    return float(value), *np.quantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


@dataclass(frozen=True)
class Drawn:
    """The images of all networks of one measurement: features are compared on these alone."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    probe: ProbeImages  # for D_loc
    seed: int


@dataclass(frozen=True)
class Transfer:
    """The three tables, and what they were measured on."""

    transfer: pd.DataFrame
    cka: pd.DataFrame
    locality: pd.DataFrame
    nonlocality: pd.DataFrame
    images: dict[str, Any]

    def write(self, out: Path) -> list[Path]:
        """transfer.csv, cka.csv, transfer_locality.csv and transfer_measurement.json in the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        tables = {"transfer.csv": (TRANSFER, self.transfer), "cka.csv": (CKA, self.cka),
                  "transfer_locality.csv": (TRANSFER_LOCALITY, self.locality)}  # fmt: skip
        with together():
            paths = [table.write(frame, out / name) for name, (table, frame) in tables.items()]
            return [*paths, write_provenance(out / "transfer_measurement.json", {"images": self.images})]


def transfer(
    directories: list[RunDir], tasks: list[int] | None = None, per_class: int = 50, test_per_class: int = 20,
    seed: int = 0, data_dir: str | None = None, device: str = "cpu", report: Callable[[str], None] = lambda run: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Transfer:  # fmt: skip
    """Of runs on one data set, each after every finished task or those in `tasks`; joint twins among them serve CKA.

    per_class, test_per_class: images of each class that probes are trained and tested on, drawn by `seed`. warn: is told of
    layers that CKA leaves out, because only one of two networks has them.
    Raises ValueError for runs whose images or class orders differ, and for too few images.
    """
    first = load(directories[0], data_dir)
    for other in directories[1:]:
        if (other.run.dataset, other.class_order) != (directories[0].run.dataset, directories[0].class_order):
            raise ValueError(
                f"{other.name} and {directories[0].name} differ in images or class order: one by one, please"
            )
    train, train_labels = first.draw("train", per_class, seed)
    test, test_labels = first.draw("test", test_per_class, seed)
    where = data_dir or directories[0].run.data_dir
    probe = load_images(directories[0].run.dataset, None, seed, where, sorted(directories[0].class_order))
    drawn = Drawn(train, train_labels, test, test_labels, probe, seed)
    rows: list[dict[str, Any]] = []
    local: list[dict[str, Any]] = []
    distances, seen = [], {}
    for directory in directories:
        measured = _of_run(directory, RunData(directory, first.dataset), drawn, tasks, device, report)
        rows += measured["rows"]
        local += measured["local"]
        distances.append(measured["distances"])
        seen[directory.name] = measured["features"]
    used = {"source": directories[0].run.dataset, "seed": seed, "train": train.tolist(), "test": test.tolist(),
            "d_loc": probe.describe()}  # fmt: skip
    return Transfer(
        TRANSFER.check(pd.DataFrame(rows, columns=list(TRANSFER.columns))),
        CKA.check(pd.DataFrame(_similarities(directories, seen, warn), columns=list(CKA.columns))),
        TRANSFER_LOCALITY.check(pd.DataFrame(local, columns=list(TRANSFER_LOCALITY.columns))),
        pd.concat(distances, ignore_index=True),
        used,
    )


def _similarities(
    directories: list[RunDir], seen: dict[str, dict[int, dict[str, Tensor]]], warn: Callable[[str], None]
) -> list[dict[str, object]]:
    """Rows of CKA: each run and task to the run's own task 0 and to the joint twin, by the layers that both have.

    seen: features [images, d] by run, task and layer. A DyTox network has the layer "tokens" from its second task on.
    """
    rows: list[dict[str, object]] = []
    alone: dict[str, set[str]] = {}
    for run, task in ((directory, task) for directory in directories for task in seen[directory.name]):
        others = [(run.name, 0)] if task > 0 and 0 in seen[run.name] else []
        others += [(d.name, task) for d in directories if d.twin_of == run.name and task in seen[d.name]]
        for other, other_task in others:
            layers, others_layers = seen[run.name][task], seen[other][other_task]
            for layer in layers.keys() ^ others_layers.keys():
                alone.setdefault(layer, set()).add(run.name)
            for layer in (layer for layer in layers if layer in others_layers):
                x, y = layers[layer], others_layers[layer]
                rows.append({"run": run.name, "task": task, "layer": layer, "other_run": other, "other_task": other_task,
                             "cka": cka(x, y), "images": len(x)})  # fmt: skip
    for layer, runs in sorted(alone.items()):
        names = ", ".join(sorted(runs))
        warn(f"CKA of {names} leaves out the layer {layer} where task 0 or the joint twin has no such layer")
    return rows


def _of_run(directory: RunDir, run_data: RunData, drawn: Drawn, tasks, device: str, report) -> dict[str, Any]:
    """Rows of TRANSFER and TRANSFER_LOCALITY, NONLOCALITY, and the features of the test images by task and layer."""
    kept, rows, local, distances = {}, [], [], []
    correlated: dict[str, dict[int, tuple[float, float, float]]] = {}
    wanted = [task for task in directory.tasks if not tasks or task in tasks]
    last = len(directory.scenario) - 1
    initial: tuple = ()
    for task in [INITIAL, *wanted]:
        subject = from_run(directory, task)
        train, test = (
            _together(run_data.features(subject, split, indices, device))
            for split, indices in (("train", drawn.train), ("test", drawn.test))
        )
        if task == INITIAL:
            initial = train, test
            report(directory.name)
            continue
        kept[task] = test
        groups = {"seen": range(task + 1)} | ({"future": range(task + 1, last + 1)} if task < last else {})
        bits = {}
        for group, of in groups.items():
            for control, (fit_on, ask) in zip(CONTROLS, ((train, test), initial, (train, test)), strict=True):
                for layer in fit_on:
                    if layer in ask:
                        found = _classify(fit_on[layer], ask[layer], run_data, drawn, of, control == "shuffled")
                        rows += _rows(subject, layer, group, control, found)
                        bits[group, control, layer] = found
        nonlocality, per_image, _ = survey.measure(subject, drawn.probe, device)
        distances.append(nonlocality)
        if task < last:
            means = layer_means(per_image)
            blocks = [layer for *_, layer in means.columns]
            for probe in PROBES:
                right = np.stack([bits["future", "none", f"block {i}"]["bits"][probe] for i in blocks], 1)
                correlated.setdefault(probe, {})[task] = rank_correlation(means.to_numpy(), right.astype(float))
        report(directory.name)
    for probe, by_task in correlated.items():
        for task, (rho, low, high) in by_task.items():
            local.append({"run": directory.name, "task": task, "probe": probe, "rho": rho, "low": low, "high": high,
                          "over": "images", "layers": len(blocks), "n": len(drawn.test)})  # fmt: skip
        if len(by_task) > 1:
            rhos = np.array([rho for rho, *_ in by_task.values()])
            half = stats.t.ppf((1 + LEVEL) / 2, len(rhos) - 1) * rhos.std(ddof=1) / len(rhos) ** 0.5
            local.append({"run": directory.name, "task": ALL_TASKS, "probe": probe, "rho": rhos.mean(),
                          "low": max(-1.0, rhos.mean() - half), "high": min(1.0, rhos.mean() + half), "over": "tasks",
                          "layers": len(blocks), "n": len(rhos)})  # fmt: skip
    return {"rows": rows, "local": local, "distances": pd.concat(distances), "features": kept}


def _together(batches) -> dict[str, Tensor]:
    parts = list(batches)
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def _classify(
    train: Tensor, test: Tensor, run_data: RunData, drawn: Drawn, of: range, shuffled: bool
) -> dict[str, Any]:
    """Bits by probe, among the classes that the tasks `of` bring."""
    tasks = [run_data.task_of(labels) for labels in (drawn.train_labels, drawn.test_labels)]
    mine, asked = ((t >= of.start) & (t < of.stop) for t in tasks)
    labels = drawn.train_labels[mine].numpy()
    if shuffled:
        labels = np.random.default_rng(drawn.seed).permutation(labels)
    answers = drawn.test_labels[asked].numpy()
    bits = {p: correct(p, train[mine].numpy(), labels, test[asked].numpy(), answers) for p in PROBES}
    return {"bits": bits, "classes": len(np.unique(labels)), "train_images": len(labels), "test_images": len(answers)}


def _rows(subject, layer: str, group: str, control: str, found: dict) -> list[dict[str, object]]:
    rows = []
    for probe, bits in found["bits"].items():
        sure = stats.binomtest(int(bits.sum()), len(bits)).proportion_ci(LEVEL, method="wilson")
        rows.append(
            {"run": subject.run, "task": subject.task, "layer": layer, "group": group, "control": control, "probe": probe,
             "pair": subject.pair, "training": subject.training}
            | {key: found[key] for key in ("classes", "train_images", "test_images")}
            | {"accuracy": bits.mean(), "low": sure.low, "high": sure.high, "chance": 1 / found["classes"]}
        )  # fmt: skip
    return rows


def format_tables(found: Transfer) -> str:
    """Accuracy on future classes by a linear probe, task x layer, with its controls; and the rank correlations."""
    blocks = []
    rows = found.transfer[(found.transfer["group"] == "future") & (found.transfer["probe"] == "linear")]
    for run, of_run in rows.groupby("run", sort=False):
        layers = list(dict.fromkeys(of_run["layer"]))
        cells = of_run.set_index(["task", "control", "layer"])["accuracy"] * 100
        chances = of_run.groupby("task")["chance"].first().items()
        body = [[f"{task}", *(_cell(cells, task, layer, chance) for layer in layers)] for task, chance in chances]
        title = (
            f"{run}: accuracy of a linear probe on future classes, percent (chance; as initialised; shuffled labels)"
        )
        blocks.append(text.block(title, text.table(["task", *layers], body, left=0)))
    lines = [
        f"{row.run}, {row.probe}: over {row.layers} layers, D_loc and accuracy on future classes correlate by "
        f"{row.rho:+.2f} [{row.low:+.2f}, {row.high:+.2f}] (Spearman; mean and 95 % interval over {row.n} tasks)"
        for row in found.locality[found.locality["task"] == ALL_TASKS].itertuples()
    ]
    if rows.empty:
        lines.append("no run here has classes yet to learn: only the last task was measured")
    return "\n\n".join([*blocks, "\n".join(map(text.prose, lines))])


def _cell(cells: pd.Series, task: int, layer: str, chance: float) -> str:
    """Accuracy and its controls, percent; empty for the layer "tokens", which is not there after a first task."""
    accuracy, initial, shuffled = (cells.get((task, control, layer)) for control in CONTROLS)
    controls = "; ".join(f"{value:.1f}" for value in (100 * chance, initial, shuffled) if value is not None)
    return "" if accuracy is None else f"{accuracy:.1f} ({controls})"
