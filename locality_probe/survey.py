"""Networks x images -> tables: each task, layer and head."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from cil import checkpoint
from cil.checkpoint import atomically
from locality_probe.images import ProbeImages
from locality_probe.measures import nonlocality, uniform_nonlocality
from locality_probe.record import Layer, record
from locality_probe.subject import Subject
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
            reason = str(error).splitlines()[0]
            raise ValueError(f"{subject.run} fails on images of {size} pixels: {reason}") from None
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
