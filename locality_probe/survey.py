"""Run directories or models x images -> tables: each task, layer and head."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from cil import checkpoint
from cil.checkpoint import RunDir, atomically
from locality_probe.images import ProbeImages, load_images
from locality_probe.measures import nonlocality, uniform_nonlocality
from locality_probe.record import Layer, record
from locality_probe.subject import Subject, from_file, from_model_option, from_run, is_task_of_run
from locality_probe.tables import INITIAL, LAYERS, NONLOCALITY, NONLOCALITY_IMAGES

BATCH = 32


@dataclass(frozen=True)
class Survey:
    """The three tables of a measurement, and what was measured on."""

    nonlocality: pd.DataFrame
    per_image: pd.DataFrame
    layers: pd.DataFrame
    images: dict[str, object]

    def write(self, out: str | Path) -> list[Path]:
        """nonlocality.csv, nonlocality_images.parquet, layers.csv and measurement.json in the folder `out`."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        provenance = {"images": self.images, "versions": checkpoint.versions(), "git": checkpoint.git_state()}
        paths = [
            NONLOCALITY_IMAGES.write(self.per_image, out / "nonlocality_images.parquet"),
            LAYERS.write(self.layers, out / "layers.csv"),
        ]
        atomically(
            out / "measurement.json", lambda part: Path(part).write_text(json.dumps(provenance, indent=1) + "\n")
        )
        return [NONLOCALITY.write(self.nonlocality, out / "nonlocality.csv"), *paths, out / "measurement.json"]


def survey(
    subjects: Iterable[Subject],
    images: ProbeImages,
    device: str = "cpu",
    report: Callable[[str], None] = lambda done: None,
) -> Survey:
    """Measure each subject on the same images, one at a time. Raises ValueError naming what cannot be measured."""
    tables: list[tuple[pd.DataFrame, ...]] = []
    for subject in subjects:
        tables.append(measure(subject, images, device))
        report(subject.run)
    nonlocality_, per_image, layers = (pd.concat(part, ignore_index=True) for part in zip(*tables, strict=True))
    return Survey(
        NONLOCALITY.check(nonlocality_), NONLOCALITY_IMAGES.check(per_image), LAYERS.check(layers), images.describe()
    )


def measure(
    subject: Subject, images: ProbeImages, device: str = "cpu"
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows of NONLOCALITY, NONLOCALITY_IMAGES and LAYERS for one subject."""
    subject.model.to(device)
    batches = []
    for batch in images.batches(subject, BATCH):
        try:
            batches.append(record(subject.model, batch.to(device), _nonlocality))
        except (RuntimeError, AssertionError) as error:  # torch and timm: an input that the network does not take
            size = f"{batch.shape[-2]}x{batch.shape[-1]}"
            raise ValueError(
                f"{subject.run} does not take images of {size} pixels: {str(error).splitlines()[0]}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{subject.run}: {error}") from None
    if not any(item.values for item in batches[0]):
        reasons = sorted({item.layer.reason or "only tokens are queries" for item in batches[0]})
        raise ValueError(f"no layer of {subject.run} has attention between patches: {'; '.join(reasons)}")

    place = {"run": subject.run, "task": subject.task}
    rows, per_image, layers = [], [], []
    for parts in zip(*batches, strict=True):
        layer = parts[0].layer
        if layer.status == "ok" and not parts[0].values:
            layer = layer.skipped("only class or task tokens are queries: there is no attention between patches")
        layers.append(place | _layer_row(layer))
        if layer.status != "ok":
            continue
        d_loc, prefix = (torch.cat([part.values[k] for part in parts]).cpu() for k in ("d_loc", "prefix_mass"))
        if not d_loc.isfinite().all():
            raise ValueError(f"layer {layer.index} ({layer.name}) of {subject.run} gives attention that is not finite")
        uniform = uniform_nonlocality(layer.grid)
        for head in range(layer.num_heads):
            key = place | {"layer": layer.index, "head": head}
            mean = d_loc[:, head].mean().item()
            spread = d_loc[:, head].std(correction=1).item() if len(d_loc) > 1 else 0.0
            rows.append(
                key | {
                    "pair": subject.pair, "training": subject.training, "kind": layer.kind, "images": len(d_loc),
                    "d_loc": mean, "d_loc_sd": spread, "d_uniform": uniform, "d_ratio": mean / uniform,
                    "prefix_mass": prefix[:, head].mean().item(),
                }
            )  # fmt: skip
            values = {"image": images.index, "d_loc": d_loc[:, head].numpy(), "prefix_mass": prefix[:, head].numpy()}
            per_image.append(pd.DataFrame(key | values))
    return pd.DataFrame(rows), pd.concat(per_image, ignore_index=True), pd.DataFrame(layers)


def _nonlocality(attention: Tensor, layer: Layer) -> dict[str, Tensor]:
    if not layer.between_patches:
        return {}
    d_loc, prefix_mass = nonlocality(attention, layer.grid, layer.num_prefix_tokens)
    return {"d_loc": d_loc, "prefix_mass": prefix_mass}


def _layer_row(layer: Layer) -> dict[str, object]:
    return {
        "layer": layer.index, "name": layer.name, "kind": layer.kind, "num_heads": layer.num_heads,
        "grid_rows": layer.grid[0], "grid_columns": layer.grid[1], "num_prefix_tokens": layer.num_prefix_tokens,
        "status": layer.status, "reason": layer.reason,
    }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What `measure` will do: subjects, loaded when called; the images; the folder for the tables."""

    subjects: list[Callable[[], Subject]]
    images: ProbeImages
    out: Path


def plan(
    ckpts: list[str], model: str | None = None, weights: Path | None = None, pretrained: bool = False,
    images: str | None = None, n: int | None = None, seed: int = 0, tasks: list[int] | None = None,
    data_dir: str | None = None, warn: Callable[[str], None] = print,
) -> Plan:  # fmt: skip
    """Resolve the options of `locality-probe measure`. Raises ValueError for what is not there or does not go together."""
    if model:
        subject = from_model_option(model, weights, pretrained, warn)
        return Plan([lambda: subject], load_images(images or "photos", n, seed, data_dir or "data"), Path("."))
    files = list(dict.fromkeys(Path(c) for c in ckpts if Path(c).is_file()))
    given = [checkpoint.open_run(c) for c in ckpts if Path(c) not in files]
    directories, tasks = with_twins(given, warn), list(dict.fromkeys(tasks or ()))
    subjects, asked = [], {d.path for d in given}
    for directory in directories:
        # A twin that was not asked for may lack some of the tasks.
        wanted = tasks if directory.path in asked else [t for t in tasks if t in directory.tasks]
        subjects += subjects_of([directory], wanted) if wanted or not tasks else []
    subjects += [lambda path=path: from_file(path) for path in files]
    own = {p.parent: checkpoint.open_run(p.parent) for p in files if is_task_of_run(p)}
    others = [(p.stem, p) for p in files if not is_task_of_run(p)]
    _refuse_equal_names([(d.name, d.path) for d in (*directories, *own.values())] + others)
    runs = directories or list(own.values())
    classes = None
    if images in (None, "dataset"):
        if not runs:
            raise ValueError(f"{files[0]} does not say on which images: give --images")
        images, classes = runs[0].run.dataset, sorted(set().union(*(d.class_order for d in runs)))
    data_dir = data_dir or (runs[0].run.data_dir if runs else "data")
    out = given[0].path if given else Path(".")
    return Plan(subjects, load_images(images, n, seed, data_dir, classes), out)


def _refuse_equal_names(places: list[tuple[str, Path]]) -> None:
    """Rows are told apart by the name of their run alone. Raises ValueError naming two places of one name."""
    seen: dict[str, Path] = {}
    for name, path in places:
        if name in seen:
            raise ValueError(
                f"{name} would be in the tables twice, from {seen[name]} and {path}: measure them one by one, or rename one"
            )
        seen[name] = path


def with_twins(directories: list[RunDir], warn: Callable[[str], None] = lambda sentence: None) -> list[RunDir]:
    """The directories, and behind each incremental run the joint twin that it names, where that is there.

    A joint run's `twin_of` comes back as the incremental run among them that it really is the twin of, or None.
    """
    found = {d.path.resolve(): d for d in directories}
    for directory in directories:
        twin = directory.path.resolve().parent / (directory.joint_twin or "")
        if directory.joint_twin and twin not in found and (twin / "run.json").is_file():
            other = checkpoint.open_run(twin)
            if not other.run.is_twin_of(directory.run):
                warn(f"{twin.name} is left out: its settings are not those of {directory.name}")
            elif other.tasks:
                found[twin] = other

    def paired(joint: RunDir) -> RunDir:
        partners = [d for d in directories if d.run.training == "incremental" and d.run.is_twin_of(joint.run)]
        partners.sort(key=lambda d: d.joint_twin != joint.name)
        return replace(joint, twin_of=partners[0].name if partners else None)

    return [d if d.run.training == "incremental" else paired(d) for d in found.values()]


def subjects_of(directories: list[RunDir], tasks: list[int] | None = None) -> list[Callable[[], Subject]]:
    """What to measure of runs, each loaded when called: as initialised, then every finished task, or those in `tasks`.

    Raises ValueError for a run without a finished task, or a task that is not there.
    """
    subjects = []
    for directory in directories:
        if not directory.tasks:
            raise ValueError(f"{directory.path} has no finished task yet; locality-probe train goes on with it")
        missing = set(tasks or ()) - set(directory.tasks)
        if missing:
            raise ValueError(
                f"no task {min(missing)} in {directory.path}; there: {', '.join(map(str, directory.tasks))}"
            )
        for task in [INITIAL, *(tasks or directory.tasks)]:
            subjects.append(lambda directory=directory, task=task: from_run(directory, task))
    return subjects


def format_table(frame: pd.DataFrame) -> str:
    """The NONLOCALITY table as text: task x layer, mean over heads, each run with its joint twins beside it."""
    blocks = []
    for pair, rows in frame.groupby("pair", sort=False):
        first = rows.iloc[0]
        means = rows.groupby(["task", "layer", "training"])["d_loc"].mean()
        trainings = [t for t in ("incremental", "joint", "joint-terminal", "model") if t in set(rows["training"])]
        layers = sorted(rows["layer"].unique())
        kinds = rows.drop_duplicates("layer").set_index("layer")["kind"]
        titles = [f"layer {x} {kinds[x]}" for x in layers]
        width = max(*(len(t) + 2 for t in trainings), *(-(-(len(t) + 2) // len(trainings)) for t in titles))
        blocks.append(
            f"{pair}: D_loc in patches, mean over heads and {first['images']} images"
            + (f"; {', '.join(trainings)}" if trainings != ["model"] else "")
        )
        blocks.append(f"{'task':>8}" + "".join(f"{title:>{width * len(trainings)}}" for title in titles))
        if len(trainings) > 1:
            blocks.append(" " * 8 + "".join(f"{t:>{width}}" for t in trainings) * len(layers))
        for task in sorted(rows["task"].unique()):
            cells = [means.get((task, x, t)) for x in layers for t in trainings]
            name = "init" if task == INITIAL else str(task)
            blocks.append(f"{name:>8}" + "".join(f"{'' if c is None else f'{c:.3f}':>{width}}" for c in cells))
        uniform = rows.drop_duplicates("layer").set_index("layer")["d_uniform"]
        blocks.append(f"{'uniform':>8}" + "".join(f"{uniform[x]:>{width}.3f}" * len(trainings) for x in layers) + "\n")
    return "\n".join(blocks)
