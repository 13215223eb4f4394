"""The demonstration: train on embedded digits what the paper compares, measure it, draw it, and say where it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from cil import checkpoint, data, sweep, text
from cil.evaluate import format_scores, scores
from figures import attention_maps, nonlocality_over_tasks, style
from locality_probe import survey
from locality_probe.heatmap import heat_maps, parse_checkpoint
from locality_probe.plan import make_plan

PAIRS = ("demo-baseline", "demo-baseline-lpa")
WORKERS = 2  # processes of one thread each: for networks this small faster than one process with two threads
IMAGES = 128


def run_demo(out: Path, echo: Callable[[str], None], device: str = "cpu", threads: int = 1) -> None:
    """Train PAIRS and their joint twins into `out`, measure them, write tables, a heat map and the D_loc figure.

    threads: of the CPU, for each of the WORKERS trainings that run at once.

    Runs that are finished are not repeated, and one that was interrupted goes on. Raises ValueError when one fails.
    """
    began = time.monotonic()
    # The joint twins take longest, so they start first.
    train_all([f"{pair}-joint" for pair in PAIRS] + list(PAIRS), out, device, threads)
    trained = time.monotonic()

    plan = make_plan([str(out / pair) for pair in PAIRS], n=IMAGES)
    result = survey.survey((make() for make in plan.subjects), plan.images, device)
    tables = result.write(out)
    echo(survey.format_table(result.nonlocality))
    for name in PAIRS:
        echo(f"{name}: {format_scores(checkpoint.open_run(out / name).written('accuracy'))}")

    figure = nonlocality_over_tasks.draw(result.nonlocality)
    drawn = [style.save(figure, out / "nonlocality_over_tasks.png")]
    (pixels,) = next(data.load("digits").test.batches([torch.tensor([0])]))
    image = data.to_pil(pixels)
    image.save(out / "digit.png")
    specs = [f"{out / name}:all" for pair in PAIRS for name in (pair, f"{pair}-joint")]
    deepest = max(result.nonlocality["layer"])
    found = heat_maps(
        [make() for spec in specs for make in parse_checkpoint(spec)], image, str(deepest), query="3,3", device=device
    )
    drawn += [style.save(attention_maps.draw(**found.drawing()), out / "heatmap.png"), found.save(out / "heatmap.npz")]

    echo(f"\nTrained in {trained - began:.0f} s, measured and drawn in {time.monotonic() - trained:.0f} s.")
    for path in [
        *(out / name for pair in PAIRS for name in (pair, f"{pair}-joint")),
        *tables,
        out / "digit.png",
        *drawn,
    ]:
        echo(f"  {path}")
    echo(f"Next:\n  locality-probe heatmap {out / 'digit.png'} --head all \\\n      --ckpt {out / PAIRS[0]}")
    last = {name: scores(checkpoint.open_run(out / name).written("accuracy"))["Last"] for name in PAIRS}
    echo(what_was_seen(result.nonlocality, last))


def what_was_seen(nonlocality: pd.DataFrame, last: dict[str, float]) -> str:
    """The demonstration's result in a sentence: mean D_loc over tasks, of CIL and joint training, and accuracy.

    nonlocality: rows of NONLOCALITY of PAIRS and their joint twins; last: the score Last of each of PAIRS, 0 to 1.
    """
    mean = nonlocality[nonlocality["task"] >= 0].groupby(["pair", "training", "task"])["d_loc"].mean()
    parts = []
    for pair, what in zip(PAIRS, ("the baseline", "the baseline with LPA"), strict=True):
        cil, joint = mean[pair, "incremental"], mean[pair, "joint"]
        parts.append(
            f"{what} went from {cil.iloc[0]:.2f} to {cil.iloc[-1]:.2f} (joint training: {joint.iloc[0]:.2f} to "
            f"{joint.iloc[-1]:.2f}) and ended at an accuracy of {100 * last[pair]:.0f} %"
        )
    distance = "Seen, with one seed: from the first task to the last, mean D_loc in patches of"
    return text.prose(f"{distance} {'; that of '.join(parts)}.")


def train_all(names: list[str], out: Path, device: str = "cpu", threads: int = 1) -> None:
    """Train recipes into out/NAME, WORKERS at a time, showing how each stands. Raises ValueError that names what failed."""
    jobs = sweep.planned(sweep.expand(names, None, [], out))
    table = sweep.sweep(jobs, sweep.choose_place("local", len(jobs), out, device, WORKERS, threads, []), out)
    failed = [f"{row.run}: {row.reason}" for row in table.itertuples() if row.state == "failed"]
    if failed:
        raise ValueError("; ".join(failed))
