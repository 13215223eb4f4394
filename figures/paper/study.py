"""A study: one folder of tables (locality_probe.tables.STUDY) about many runs, and the measurements that fill it.

The tables are what a study knows. A run whose measurements are in them need not be there any more, and one that is cut
short goes on with what is missing: a measurement counts once its row is in measurements.csv, which is written last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from cil import checkpoint, data, recipes
from cil.checkpoint import RunDir
from cil.device import spread
from cil.files import git_state, reason_of
from locality_probe import spectra, survey, transfer
from locality_probe.images import load_images
from locality_probe.intervals import CODES
from locality_probe.measures import distances
from locality_probe.plan import subjects_of
from locality_probe.record import Layer, record
from locality_probe.subject import from_run
from locality_probe.tables import ATTENTION, EXAMPLES, MEASUREMENTS, RUNS, STEPS, STUDY

Frames = dict[str, pd.DataFrame]  # file of STUDY -> its rows of one run


@dataclass(frozen=True)
class Sizes:
    """How many images each kind of measurement takes; None: all test images."""

    nonlocality: int = 256
    spectrum: int | None = 3000
    transfer: tuple[int, int] = (30, 10)  # training and test images of a class


class Study:
    """The tables of a folder, read when asked for; `add` is atomic a table."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def read(self, file: str) -> pd.DataFrame:
        """A table of STUDY; without rows where there is none yet."""
        path = self.folder / file
        return STUDY[file].read(path) if path.is_file() else pd.DataFrame(columns=list(STUDY[file].columns))

    def done(self) -> set[tuple[str, str]]:
        """(run, kind) of every measurement that is there."""
        return set(self.read("measurements.csv")[["run", "kind"]].itertuples(index=False, name=None))

    def add(self, run: str, frames: Frames, row: dict[str, object]) -> None:
        """Put one measurement of a run into the tables, in place of an earlier one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, frame in frames.items():
            if file == "examples.parquet":  # the same for every run
                STUDY[file].write(frame, self.folder / file)
                continue
            before = self.read(file)
            self._write(file, [before[before["run"] != run], frame])
        before = self.read("measurements.csv")
        kept = before[(before["run"] != run) | (before["kind"] != row["kind"])]
        self._write("measurements.csv", [kept, pd.DataFrame([row], columns=list(MEASUREMENTS.columns))])

    def _write(self, file: str, parts: list[pd.DataFrame]) -> None:
        whole = pd.concat([part for part in parts if len(part)], ignore_index=True)
        # In one order, whatever the order of measuring.
        STUDY[file].write(whole.sort_values(list(STUDY[file].keys), kind="stable"), self.folder / file)


def load(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a study's folder. Raises ValueError where there is no study, naming what is missing."""
    if not (Path(folder) / "runs.csv").is_file():
        raise ValueError(f"{folder} holds no runs.csv, so it is no folder of a study's tables")
    study = Study(folder)
    tables = {file: study.read(file) for file in STUDY}
    _check_together(tables, Path(folder))
    return tables


def _check_together(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Raises ValueError, naming the file, for rows of runs that runs.csv lacks and of tasks that they have not, for settings
    that are none, and for pictures and maps of another size than theirs."""
    runs = tables["runs.csv"].set_index("run")
    for file, frame in tables.items():
        if "run" not in frame or file == "runs.csv":
            continue
        strangers = sorted(set(frame["run"]) - set(runs.index))
        if strangers:
            raise ValueError(f"{folder / file} holds the run {strangers[0]}, which {folder / 'runs.csv'} lacks")
        if "task" in frame and len(frame):
            most = frame.groupby("run")["task"].max()
            odd = most[most >= 10**6]
            if len(odd):
                raise ValueError(f"{folder / file} holds task {odd.iloc[0]} of {odd.index[0]}, and no run has so many")
    for name, text in runs["settings"].items():
        try:
            settings = json.loads(text)
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise ValueError(f"{folder / 'runs.csv'}: the settings of {name} are no JSON object")
    examples = tables["examples.parquet"]
    for row in examples.itertuples():
        if len(row.rgb) != row.rows * row.columns * 3:
            raise ValueError(
                f"{folder / 'examples.parquet'}: {row.image} is no picture of {row.rows} x {row.columns} pixels"
            )
    attention = tables["attention.parquet"]
    wrong = attention["weights"].map(len) != attention["grid_rows"] * attention["grid_columns"]
    if len(attention) and wrong.any():
        row = attention[wrong].iloc[0]
        raise ValueError(
            f"{folder / 'attention.parquet'}: the map of {row['run']}, task {row['task']}, is not of "
            f"{row['grid_rows']} x {row['grid_columns']} patches"
        )


def accuracy(directory: RunDir, sizes: Sizes, data_dir: str, device: str) -> tuple[Frames, dict[str, object]]:
    """What training wrote down: the accuracy matrix, steps, and the row of RUNS."""
    run, epochs, rows = directory.run, directory.written("training"), directory.written("accuracy")
    scale, setting, system = recipes.parts(run.recipe)
    # An epoch drops what fills no batch.
    seen = np.minimum(epochs["images"], epochs["steps"] * run.batch_size).sum()
    row = {
        "run": directory.name, "scale": scale, "setting": setting, "system": system, "method": run.method,
        "n_lpa": run.n_lpa, "lpa_blocks": run.depth - 1, "lambda_init": run.lambda_init, "training": run.training,
        "seed": run.seed, "tasks": len(directory.tasks), "classes": len(directory.class_order),
        "steps": epochs["steps"].sum(), "images": seen, "seconds": epochs["seconds"].sum(),
        "git": directory.git or "", "trainer": directory.trainer, "torch": directory.versions.get("torch", ""),
        "device": directory.device,
        "settings": json.dumps(run.to_dict() | {"data_dir": ""}),
    }  # fmt: skip
    tested = int(rows.groupby("on_task")["images"].first().sum())
    steps = epochs.groupby("task")["steps"].sum()
    steps = steps.cumsum() if run.training == "incremental" else steps
    frames = {
        "runs.csv": pd.DataFrame([row], columns=list(RUNS.columns)),
        "accuracy.csv": rows.assign(run=directory.name),
        "steps.csv": steps.reset_index().assign(run=directory.name)[list(STEPS.columns)],
    }
    return frames, {"images": tested, "source": f"{run.dataset}, test", "sha256": ""}


def nonlocality(directory: RunDir, sizes: Sizes, data_dir: str, device: str) -> tuple[Frames, dict[str, object]]:
    """D_loc of every task, checkpoint inside one, layer and head, and for each image the mean of each layer."""
    images = load_images(directory.run.dataset, sizes.nonlocality, 0, data_dir, sorted(directory.class_order))
    found = [survey.measure(make(), images, device)[:2] for make in subjects_of([directory])]
    rows, per_image = (pd.concat(parts, ignore_index=True) for parts in zip(*found, strict=True))
    means = per_image.groupby([*CODES, "at_step", "image"], as_index=False)["d_loc"].mean()
    return {"nonlocality.parquet": rows, "layer_images.parquet": means}, _described(images.describe())


def spectrum(directory: RunDir, sizes: Sizes, data_dir: str, device: str) -> tuple[Frames, dict[str, object]]:
    """Summaries of all layers and groups of classes; the eigenvalues themselves of what the newest head is fed."""
    found = spectra.spectra([directory], n=sizes.spectrum, data_dir=data_dir, device=device)
    kept = (found.spectrum["layer"] == "token") & found.spectrum["group"].isin(["all", "seen"])
    return {"spectrum.parquet": found.spectrum[kept], "spectrum_summary.parquet": found.summary}, _described(
        found.images
    )


def transferred(directory: RunDir, sizes: Sizes, data_dir: str, device: str) -> tuple[Frames, dict[str, object]]:
    """kNN and linear probes of each layer, on seen and future classes, and how they go with D_loc."""
    found = transfer.transfer([directory], None, *sizes.transfer, data_dir=data_dir, device=device)
    frames = {"transfer.parquet": found.transfer, "transfer_locality.csv": found.locality}
    return frames, _described({**found.images, "n": len(found.images["test"])})


def attention(directory: RunDir, sizes: Sizes, data_dir: str, device: str) -> tuple[Frames, dict[str, object]]:
    """Where every patch of the example images looks, at every task, layer and head."""
    images, shown, tables = examples(directory.run.dataset), [], []
    for task in directory.tasks:
        subject = from_run(directory, task)
        subject.model.to(device)
        for name, (image, _) in images.items():
            x = subject.preprocess(image)[None].to(device)
            for item in record(subject.model, x, _patch_rows):
                if item.values:
                    rows = item.values["rows"][0].cpu()
                    tables.append(_attention_rows(rows, item.layer).assign(run=directory.name, task=task, image=name))
    for name, (image, credit) in images.items():
        pixels = np.asarray(subject.crop(image.convert("RGB")))
        shown.append({"image": name, "rows": pixels.shape[0], "columns": pixels.shape[1], "rgb": pixels.tobytes(),
                      "credit": credit})  # fmt: skip
    frames = {
        "attention.parquet": pd.concat(tables, ignore_index=True)[list(ATTENTION.columns)],
        "examples.parquet": pd.DataFrame(shown, columns=list(EXAMPLES.columns)),
    }
    return frames, {"images": len(shown), "source": ", ".join(images), "sha256": ""}


def _patch_rows(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
    """record's measure: between patches and renormalised, as D_loc has it, [b, H, N, N]."""
    rows = layer.of_patches(attention) if layer.between_patches else None
    on_grid = None if rows is None else layer.on_grid(rows)
    if on_grid is None:
        return {}
    patches = on_grid.flatten(-2)
    return {"rows": patches / patches.sum(-1, keepdim=True)}


def _attention_rows(maps: Tensor, layer: Layer) -> pd.DataFrame:
    """Attention [H, N, N] of one layer -> rows of ATTENTION, but for run, task and image."""
    heads, n, _ = maps.shape
    peak = maps.amax(-1)
    quantised = (maps / peak[..., None] * 255).round().to(torch.uint8).numpy()
    return pd.DataFrame({
        "layer": layer.index, "head": np.repeat(np.arange(heads), n), "query": np.tile(np.arange(n), heads),
        "grid_rows": layer.grid[0], "grid_columns": layer.grid[1],
        "distance": (maps * distances(layer.grid).to(maps)).sum(-1).flatten().numpy(), "peak": peak.flatten().numpy(),
        "weights": [row.tobytes() for row in quantised.reshape(-1, n)],
    })  # fmt: skip


def examples(dataset: str) -> dict[str, tuple[Image.Image, str]]:
    """Images that may be passed on, for figures and the report: name -> (image, credit)."""
    if dataset == "digits":
        test = data.load("digits").test
        first = {int(label): place for place, label in reversed(list(enumerate(test.labels)))}
        credit = "UCI Optical Recognition of Handwritten Digits, CC BY 4.0"
        chosen = (0, 3, 8)
        pixels = next(test.batches([torch.tensor([first[d] for d in chosen])]))
        return {f"digit {d}": (data.to_pil(x), credit) for d, x in zip(chosen, pixels, strict=True)}
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images  # China, flower
    credits = ("danielbuechele, CC BY 2.0", "vultilion, CC BY 2.0")
    return {
        name: (Image.fromarray(photo), credit)
        for name, photo, credit in zip(("temple", "flower"), photos, credits, strict=True)
    }


KINDS: dict[str, Callable[[RunDir, Sizes, str, str], tuple[Frames, dict[str, object]]]] = {
    "accuracy": accuracy,
    "nonlocality": nonlocality,
    "spectrum": spectrum,
    "transfer": transferred,
    "attention": attention,
}


def _described(images: dict[str, Any]) -> dict[str, object]:
    """Columns of MEASUREMENTS about the images; those that say which they are by index are hashed here."""
    digest = images.get("sha256") or hashlib.sha256(json.dumps(images, sort_keys=True).encode()).hexdigest()
    return {"images": images["n"], "source": images["source"], "sha256": digest}


def measure(kind: str, path: str | Path, sizes: Sizes, data_dir: str, device: str = "cpu") -> tuple[Frames, dict]:
    """One measurement of one finished run: its rows, and its row of MEASUREMENTS."""
    torch.set_num_threads(1)  # runs are measured side by side
    began, directory = time.monotonic(), checkpoint.open_run(path)
    frames, images = KINDS[kind](directory, sizes, data_dir, device)
    row = {"run": directory.name, "kind": kind, **images, "git": git_state() or ""}
    return frames, row | {"seconds": round(time.monotonic() - began, 1)}


class Measuring:
    """Measures (kind, run directory) in processes side by side, and puts each into the study as it comes.

    Inside `with`, `ask` hands work in and `collect` takes in what is done; leaving waits for the rest, or on an exception
    drops it. `failed` holds a sentence for each measurement that could not be made; the others are there all the same. On
    several GPUs, each measurement is given the next.
    """

    def __init__(self, study: Study, sizes: Sizes, data_dir: str, device: str, workers: int):
        self.study, self.settings, self.devices = study, (sizes, data_dir), itertools.cycle(spread(device))
        self.workers = workers
        self.pool = self._new_pool()
        self.jobs: dict[Future, tuple[str, Path]] = {}
        self.asked: set[tuple[str, Path]] = set()
        self.failed: list[str] = []

    def _new_pool(self) -> ProcessPoolExecutor:
        # Ctrl-C is for this process alone.
        return ProcessPoolExecutor(self.workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))

    def __enter__(self) -> Measuring:
        return self

    def ask(self, kind: str, path: Path) -> None:
        """Measure one kind of a finished run; what was asked for already is not done twice."""
        if (kind, path) not in self.asked:
            self.asked.add((kind, path))
            self._submit(kind, path)

    def _submit(self, kind: str, path: Path) -> Future:
        try:
            job = self.pool.submit(measure, kind, path, *self.settings, next(self.devices))
        except BrokenProcessPool:  # found out now: those that were under way are looked at in `collect`
            self.pool = self._new_pool()
            return self._submit(kind, path)
        self.jobs[job] = kind, path
        return job

    def collect(self, wait: bool = False, report: Callable[[str], None] = lambda done: None) -> None:
        """Put into the study what is done, or with `wait` all that was asked for.

        A process that is killed takes all that are under way with it: those are then measured one by one, so that the one
        that is at fault fails alone.
        """
        done = as_completed(list(self.jobs)) if wait else [job for job in self.jobs if job.done()]
        again: list[tuple[str, Path]] = []
        for job in done:
            kind, path = self.jobs.pop(job)
            if isinstance(job.exception(), BrokenProcessPool):
                again.append((kind, path))
                continue
            self._take(job, kind, path)
            report(path.name)
        for kind, path in again:
            job = self._submit(kind, path)
            self.jobs.pop(job)
            self._take(job, kind, path)
            report(path.name)

    def _take(self, job: Future, kind: str, path: Path) -> None:
        """What a job has measured, once it is done; a sentence where it failed."""
        try:
            self.study.add(path.name, *job.result())
        except BrokenProcessPool:
            self.failed.append(f"{kind} of {path.name}: its process was killed; is memory full?")
        except Exception as error:  # whatever it is, it is this measurement's alone
            named = isinstance(error, (ValueError, OSError))
            reason = str(error) if named else f"{type(error).__name__}: {reason_of(error)}"
            self.failed.append(f"{kind} of {path.name}: {reason}")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.collect(wait=True)
        self.pool.shutdown(wait=kind is None, cancel_futures=True)


def measure_all(
    study: Study, wanted: Iterable[tuple[str, Path]], sizes: Sizes, data_dir: str, device: str, workers: int,
    report: Callable[[str], None] = lambda done: None,
) -> list[str]:  # fmt: skip
    """Measure (kind, run directory), all of them; returns a sentence for each that failed."""
    with Measuring(study, sizes, data_dir, device, workers) as measuring:
        for kind, path in wanted:
            measuring.ask(kind, path)
        measuring.collect(wait=True, report=report)
    return measuring.failed
