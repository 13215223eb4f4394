"""Eigenvalues of the covariance of features: how many directions a network uses for an image, and for which classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from cil import text
from cil.checkpoint import RunDir
from cil.files import together, write_provenance
from locality_probe.features import RunData, load
from locality_probe.subject import Subject, from_run
from locality_probe.tables import INITIAL, SPECTRUM, SPECTRUM_SUMMARY
from locality_probe.typed import Typed

ENOUGH, TOO_FEW = 10, 2  # images per dimension: fewer flatten the spectrum visibly; fewer say nothing


@dataclass
class Covariance:
    """Mean and scatter of features [n, d], added batch by batch in float64 (Chan, Golub & LeVeque 1979): none is kept."""

    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def update(self, features: Tensor) -> Covariance:
        """Returns the covariance after adding features [b, d]."""
        if not len(features):
            return self
        z = features.double()
        mean = z.mean(0)
        return self + Covariance(len(z), mean, (z - mean).T @ (z - mean))

    def __add__(self, other: Covariance) -> Covariance:
        if not self.n or not other.n:
            return self if self.n else other
        n, apart = self.n + other.n, other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.n * other.n / n)
        return Covariance(n, self.mean + apart * (other.n / n), scatter)

    def eigenvalues(self) -> Tensor:
        """Of Zc^T Zc / (n - 1), descending: [d] float64. n is at least 2."""
        return torch.linalg.eigvalsh(self.scatter / (self.n - 1)).flip(0).clamp_min(0)

    def singular_values(self) -> Tensor:
        """Of the features as they are, not centred, descending: [d] float64."""
        moment = self.scatter + self.n * torch.outer(self.mean, self.mean)
        return torch.linalg.eigvalsh(moment).flip(0).clamp_min(0).sqrt()


def effective_rank(eigenvalues: Tensor) -> float:
    """exp of the entropy of the eigenvalues over their sum (Roy & Vetterli 2007): 1 to d."""
    p = eigenvalues / eigenvalues.sum()
    return torch.special.entr(p).sum().exp().item()


def participation_ratio(eigenvalues: Tensor) -> float:
    """(sum l)^2 / sum l^2: 1 to d."""
    return (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()


def rankme(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values of uncentred features over their sum (RankMe, Garrido et al. 2023)."""
    return effective_rank(singular_values)


def power_law_slope(eigenvalues: Tensor, first: int, last: int) -> float:
    """Slope of log l against log rank over the ranks first..last, counted from 1, by least squares; -a for l = rank^-a."""
    rank = torch.arange(first, last + 1, dtype=torch.float64)
    window = eigenvalues[first - 1 : last].clamp_min(torch.finfo(torch.float64).tiny)
    return stats.linregress(rank.log().numpy(), window.log().numpy()).slope


def slope_window(d: int) -> tuple[int, int]:
    """Ranks between the few directions that classes take and the noise at the end: d / 10 to d / 2, counted from 1."""
    return max(1, d // 10), max(2, d // 2)


def marchenko_pastur_edge(variance: float, n: int, d: int) -> float:
    """The largest eigenvalue that n isotropic features of this variance a dimension would show (Marchenko & Pastur 1967)."""
    return variance * (1 + (d / n) ** 0.5) ** 2


def summarise(covariance: Covariance) -> dict[str, float | str]:
    """The value columns of SPECTRUM_SUMMARY that describe a spectrum."""
    eigenvalues = covariance.eigenvalues()
    n, d, trace = covariance.n, len(eigenvalues), eigenvalues.sum().item()
    first, last = slope_window(d)
    edge = marchenko_pastur_edge(trace / d, n, d)
    return {
        "images": n, "dimension": d, "trace": trace, "effective_rank": effective_rank(eigenvalues),
        "participation_ratio": participation_ratio(eigenvalues),
        "spectral_ratio": trace / eigenvalues[0].item(), "rankme": rankme(covariance.singular_values()),
        "slope": power_law_slope(eigenvalues, first, last), "slope_first_rank": first, "slope_last_rank": last,
        "mp_edge": edge, "above_edge": int((eigenvalues > edge).sum()), "reliable": str(n >= ENOUGH * d).lower(),
    }  # fmt: skip


def groups(task: int, tasks: int) -> dict[str, range]:
    """Whose classes are looked at after `task`: group -> the tasks that bring them; empty groups are left out."""
    tasks_of = {"all": range(tasks)}
    if task != INITIAL:
        tasks_of |= {"seen": range(task + 1), "new": range(task, task + 1), "future": range(task + 1, tasks)}
    return {name: of for name, of in tasks_of.items() if len(of)}


def measure(
    subject: Subject, run_data: RunData, indices: Tensor, labels: Tensor, device: str = "cpu",
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, tuple[int, int]]]:  # fmt: skip
    """Rows of SPECTRUM and SPECTRUM_SUMMARY of one network on these test images, and which groups were small.

    A group with fewer than 2 images a dimension is left out, one with fewer than 10 is marked as not reliable; both are
    among the small ones: group -> (images, dimension).
    Raises ValueError where even all images are fewer than 2 a dimension.
    """
    tasks = run_data.task_of(labels)
    number = len(run_data.directory.scenario)
    covariances: dict[str, list[Covariance]] = {}
    start = 0
    for batch in run_data.features(subject, "test", indices, device):
        of_batch = tasks[start : start + len(next(iter(batch.values())))]
        start += len(of_batch)
        for layer, features in batch.items():
            parts = covariances.setdefault(layer, [Covariance() for _ in range(number)])
            for task in of_batch.unique().tolist():
                parts[task] = parts[task].update(features[of_batch == task])
    key = {"run": subject.run, "task": subject.task}
    values, rows = [], []
    few: dict[str, tuple[int, int]] = {}
    for layer, parts in covariances.items():
        for group, of in groups(subject.task, number).items():
            whole = sum((parts[task] for task in of), Covariance())
            d = found_dimension(parts)
            if whole.n < ENOUGH * d:
                few[group] = min(few.get(group, (whole.n, d)), (whole.n, d))
            if whole.n < max(2, TOO_FEW * d):
                if group == "all":
                    raise ValueError(
                        f"{whole.n} images are fewer than {TOO_FEW} for each of the {d} dimensions of {layer} of "
                        f"{subject.run}: give --n {TOO_FEW * d} or more (--n {ENOUGH * d} for eigenvalues to rely on)"
                    )
                continue
            place = key | {"layer": layer, "group": group}
            rows.append(place | {"pair": subject.pair, "training": subject.training} | summarise(whole))
            eigenvalues = whole.eigenvalues().numpy()
            ranks = {"rank": range(len(eigenvalues)), "eigenvalue": eigenvalues}
            values.append(pd.DataFrame(place | ranks | {"eigenvalue_normalised": eigenvalues / eigenvalues.sum()}))
    return pd.concat(values, ignore_index=True), pd.DataFrame(rows), few


def found_dimension(parts: list[Covariance]) -> int:
    """d of the features, from any group that has an image."""
    return next(len(part.mean) for part in parts if part.n)


@dataclass(frozen=True)
class Spectra:
    """The two tables, and what they were measured on."""

    spectrum: pd.DataFrame
    summary: pd.DataFrame
    images: dict[str, object]

    def write(self, out: Path) -> list[Path]:
        """spectrum.parquet, spectrum_summary.csv and spectrum_measurement.json in the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        with together():
            return [
                SPECTRUM_SUMMARY.write(self.summary, out / "spectrum_summary.csv"),
                SPECTRUM.write(self.spectrum, out / "spectrum.parquet"),
                write_provenance(out / "spectrum_measurement.json", {"images": self.images}),
            ]


def spectra(
    directories: list[RunDir], tasks: list[int] | None = None, n: int | None = None, seed: int = 0,
    data_dir: str | None = None, device: str = "cpu", report: Callable[[str], None] = lambda run: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Spectra:  # fmt: skip
    """Of runs on one data set: as initialised, and after every finished task or those in `tasks`, on their test images.

    n: of the images, drawn by `seed`; None: all. Raises ValueError for runs whose images or class orders differ.
    """
    first = load(directories[0], data_dir)
    for other in directories[1:]:
        if (other.run.dataset, other.class_order) != (directories[0].run.dataset, directories[0].class_order):
            raise ValueError(
                f"{other.name} and {directories[0].name} differ in images or class order: one by one, please"
            )
    indices, _ = first.draw("test", None, seed)
    if n is not None:
        if n > len(indices):
            raise Typed(f"n={n}, but there are {len(indices)} test images of the run's classes")
        indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))[:n]].sort().values
    labels = first.dataset.test.labels[indices]
    tables = []
    few: dict[str, tuple[int, int]] = {}
    for directory in directories:
        run_data = RunData(directory, first.dataset)
        for task in [INITIAL, *(t for t in directory.tasks if not tasks or t in tasks)]:
            *rows_of_task, small = measure(from_run(directory, task), run_data, indices, labels, device)
            tables.append(rows_of_task)
            few |= {group: min(few.get(group, place), place) for group, place in small.items()}
            report(directory.name)
    for group, (n, d) in few.items():
        what = "such groups are left out" if n < TOO_FEW * d else "their spectrum is flatter than it is"
        warn(f"as few as {n} images of {group} classes, fewer than {ENOUGH} for each of {d} dimensions: {what}")
    values, rows = (pd.concat(part, ignore_index=True) for part in zip(*tables, strict=True))
    used = {"source": f"{directories[0].run.dataset}, test", "n": len(indices), "seed": seed, "index": indices.tolist()}
    return Spectra(SPECTRUM.check(values), SPECTRUM_SUMMARY.check(rows), used)


def format_table(summary: pd.DataFrame, group: str = "seen") -> str:
    """Effective rank of a group's features, task x layer, for each run."""
    blocks = []
    for run, rows in summary.groupby("run", sort=False):
        shown = rows[(rows["group"] == group) | (rows["task"] == INITIAL)]
        layers = list(dict.fromkeys(shown["layer"]))
        ranks = shown.set_index(["task", "layer"])["effective_rank"]
        sizes = rows.groupby("layer", sort=False)["dimension"].max()

        def line(task: int, layers: list[str] = layers, ranks: pd.Series = ranks) -> list[str]:
            cells = [ranks.get((task, layer)) for layer in layers]
            return ["init" if task == INITIAL else f"{task}", *("" if c is None else f"{c:.1f}" for c in cells)]

        body = [line(task) for task in sorted(shown["task"].unique())]
        title = f"{run}: effective rank of features of {group} classes (init: of all)"
        shown_table = text.table(["task", *layers], [*body, ["of", *(f"{sizes[x]}" for x in layers)]], left=0)
        blocks.append(text.block(title, shown_table))
    return "\n\n".join(blocks) + "\n"
