"""Networks x images -> tables: each task, layer and head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cil import text
from cil.files import together, write_provenance
from cil.tables import AFTER
from locality_probe.images import ProbeImages
from locality_probe.intervals import group_by_seed, intervals
from locality_probe.probe import Measurement, Probe
from locality_probe.subject import Subject
from locality_probe.tables import INITIAL, INTERVALS, LAYERS, NONLOCALITY, NONLOCALITY_IMAGES

BATCH = 32
TRAININGS = ("incremental", "joint", "joint-terminal", "joint-as-long", "model")  # in the order of printing


@dataclass(frozen=True)
class Survey:
    """The tables of a measurement, and what was measured on."""

    nonlocality: pd.DataFrame
    per_image: pd.DataFrame
    layers: pd.DataFrame
    intervals: pd.DataFrame
    images: dict[str, object]

    def write(self, out: str | Path, model: Mapping[str, str] | None = None) -> list[Path]:
        """nonlocality.csv, intervals.csv, nonlocality_images.parquet, layers.csv and measurement.json in the folder `out`.

        model: how a model that is no run was made.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        described = {"images": self.images} | ({"model": dict(model)} if model else {})
        with together():
            return [
                NONLOCALITY.write(self.nonlocality, out / "nonlocality.csv"),
                NONLOCALITY_IMAGES.write(self.per_image, out / "nonlocality_images.parquet"),
                LAYERS.write(self.layers, out / "layers.csv"),
                INTERVALS.write(self.intervals, out / "intervals.csv"),
                write_provenance(out / "measurement.json", described),
            ]


def survey(
    subjects: Iterable[Subject],
    images: ProbeImages,
    device: str = "cpu",
    report: Callable[[str], None] = lambda done: None,
) -> Survey:
    """Measure each subject on the same images, one at a time. Raises ValueError naming what cannot be measured."""
    tables: list[tuple[pd.DataFrame, ...]] = []
    experiments: dict[str, tuple[str, int]] = {}
    for subject in subjects:
        tables.append(measure(subject, images, device))
        if subject.settings:
            experiments[subject.run] = subject.settings, subject.seed
        report(subject.run)
    nonlocality, per_image, layers = (pd.concat(part, ignore_index=True) for part in zip(*tables, strict=True))
    joint = nonlocality[nonlocality["training"] == "joint"].drop_duplicates("run")
    interval_rows = intervals(
        per_image, dict(zip(joint["pair"], joint["run"], strict=True)), group_by_seed(experiments)
    )
    return Survey(NONLOCALITY.check(nonlocality), per_image, layers, interval_rows, images.describe())


def measure(
    subject: Subject, images: ProbeImages, device: str = "cpu"
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows of NONLOCALITY, NONLOCALITY_IMAGES and LAYERS for one subject."""
    probed = probe(subject, images, device)
    if not any(probed.values):
        reasons = sorted({layer.reason for layer in probed.layers})
        raise ValueError(f"no layer of {subject.run} has attention between patches: {'; '.join(reasons)}")
    for layer, values in zip(probed.layers, probed.values, strict=True):
        if values and not values["d_loc"].isfinite().all():
            raise ValueError(f"layer {layer.index} ({layer.name}) of {subject.run} gives attention that is not finite")
    run, task, at_step = subject.run, subject.task, subject.at_step
    return (
        probed.table(run, task, subject.pair, subject.training, at_step),
        probed.per_image(run, task, images.index, at_step),
        probed.layer_table(run, task, at_step),
    )


def probe(subject: Subject, images: ProbeImages, device: str = "cpu") -> Measurement:
    """All of `images` through a Probe on the subject's network. Raises ValueError that names the subject."""
    subject.model.to(device)
    try:
        with Probe(subject.model, subject.grid, subject.num_prefix_tokens) as instrument:
            for batch in images.batches(subject, BATCH):
                try:
                    instrument.update(batch.to(device))
                except (RuntimeError, AssertionError) as error:  # an input that the network does not take
                    size, reason = f"{batch.shape[-2]}x{batch.shape[-1]}", str(error).splitlines()[0]
                    raise ValueError(f"{subject.run} fails on images of {size} pixels: {reason}") from None
        return instrument.result()
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(subject.run) else f"{subject.run}: {message}") from None


def format_table(frame: pd.DataFrame, interval_rows: pd.DataFrame | None = None) -> str:
    """The NONLOCALITY table as text: task x layer, mean over heads, each run with its joint twins beside it.

    interval_rows: the table INTERVALS, for half the width of the 95 % interval over images behind each number.
    """
    half = {}
    if interval_rows is not None:
        over_images = interval_rows[
            (interval_rows["over"] == "images") & (interval_rows["measure"] == "d_loc") & (interval_rows["other"] == "")
        ]
        half = {(r.run, (r.task, AFTER), r.layer): (r.high - r.low) / 2 for r in over_images.itertuples()}
    frame = frame.assign(point=list(zip(frame["task"], frame["at_step"], strict=True)))
    blocks = [_pair_as_text(pair, rows, half) for pair, rows in frame.groupby("pair", sort=False)]
    lines = _seed_lines(interval_rows) if interval_rows is not None else []
    return "\n\n".join([*blocks, *(["\n".join(map(text.prose, lines))] if lines else [])]) + "\n"


def _pair_as_text(pair: str, rows: pd.DataFrame, half: dict[tuple, float]) -> str:
    """A title and a table: a line per task, or per checkpoint inside one, a column per layer and training."""
    runs = rows.drop_duplicates("training").set_index("training")["run"]
    means = rows.groupby(["point", "layer", "training"])["d_loc"].mean()
    trainings = [training for training in TRAININGS if training in set(rows["training"])]
    layers = sorted(rows["layer"].unique())
    first = rows.drop_duplicates("layer").set_index("layer")
    # Checkpoints inside a task, by their steps, then the network after it.
    points = sorted(rows["point"].unique(), key=lambda point: (point[0], point[1] == AFTER, point[1]))

    def cell(point: tuple[int, int], layer: int, training: str) -> str:
        mean, width = means.get((point, layer, training)), half.get((runs[training], point, layer))
        return "" if mean is None else f"{mean:.3f}" + ("" if width is None else f" ±{width:.3f}")

    def label(task: int, at_step: int) -> str:
        return f"step {at_step}" if at_step != AFTER else "init" if task == INITIAL else f"{task}"

    titles = {x: f"layer {x} {first['kind'][x]}" + ", window" * (first["extent"][x] == "window") for x in layers}
    header = ["task", *(f"{titles[x]}\n{t}" if len(trainings) > 1 else titles[x] for x in layers for t in trainings)]
    body = [[label(*point), *(cell(point, x, t) for x in layers for t in trainings)] for point in points]
    uniform = ["uniform", *(f"{first['d_uniform'][x]:.3f}" for x in layers for _ in trainings)]
    title = f"{pair}: D_loc in patches, mean over heads and {rows['images'].iloc[0]} images"
    title += ", ± half a 95 % interval over images" if half else ""
    title += f"; {', '.join(trainings)}" if trainings != ["model"] else ""
    return text.block(title, text.table(header, [*body, uniform], left=0, together=len(trainings)))


def _seed_lines(interval_rows: pd.DataFrame) -> list[str]:
    """What several seeds say, at the last task of each group: one line per layer."""
    rows = interval_rows[(interval_rows["over"].str.startswith("seeds")) & (interval_rows["task"] >= 0)]
    rows = rows[rows["task"] == rows.groupby("run")["task"].transform("max")]
    lines = ["D_loc after the last task, 95 % intervals over seeds:"] if len(rows) else []
    for row in rows.itertuples():
        what = f" minus {row.other}" if row.other else ""
        lines.append(
            f"  {row.run}, task {row.task}, layer {row.layer}{what}: {row.mean:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        )
    return lines
