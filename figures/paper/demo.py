"""The demonstration: train on embedded digits what the paper compares, measure it, draw it, and say where it is."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty

import torch
from tqdm import tqdm

from cil import checkpoint, data, recipes
from cil.evaluate import format_scores
from cil.train import Progress, train
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
        echo(f"{name}: {format_scores(checkpoint.open_run(out / name).table('accuracy'))}")

    figure = nonlocality_over_tasks.draw(result.nonlocality)
    drawn = [style.save(figure, out / "nonlocality_over_tasks.png")]
    image = data.to_pil(data.load("digits").test.images[0])
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
    echo(f"Next: locality-probe heatmap {out / 'digit.png'} --ckpt {out / PAIRS[0]} --head all")


def train_all(names: list[str], out: Path, device: str = "cpu", threads: int = 1) -> None:
    """Train recipes into out/NAME, WORKERS at a time, showing their progress on one line."""
    context = multiprocessing.get_context("spawn")
    events, waiting, running = context.Queue(), list(names), {}
    shares, failures = dict.fromkeys(names, 0.0), {}
    interval = 0.2 if sys.stderr.isatty() else 30.0
    look = "{percentage:3.0f} %|{bar}| {elapsed}, left {remaining}{postfix}"
    with tqdm(total=100, bar_format=look, mininterval=interval, maxinterval=interval) as bar:
        while waiting or running or not events.empty():
            while waiting and len(running) < WORKERS:
                name = waiting.pop(0)
                running[name] = context.Process(
                    target=_worker, args=(name, out / name, events, device, threads), daemon=True
                )
                running[name].start()
            try:
                name, share, state = events.get(timeout=0.2)
                shares[name] = share
                if state.startswith("failed: "):
                    failures[name] = state.removeprefix("failed: ")
                bar.set_postfix_str(f"{name}: {state}", refresh=False)
                bar.update(100 * sum(shares.values()) / len(names) - bar.n)
            except Empty:
                pass
            for name in [n for n, process in running.items() if not process.is_alive()]:
                process = running.pop(name)
                if process.exitcode and name not in failures:
                    failures[name] = f"its process ended with code {process.exitcode}"
                shares[name] = 1.0
    if failures:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))


def _worker(name: str, out: Path, events, device: str = "cpu", threads: int = 1) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is theirs
    torch.set_num_threads(threads)
    parent, last = multiprocessing.parent_process(), 0.0

    def report(p: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            if not parent.is_alive():  # killed: whoever starts the demo again takes over this run
                raise SystemExit(1)
            events.put(
                (name, p.done / p.total, f"task {p.task + 1}/{p.tasks} loss {p.loss:.2f} accuracy {p.accuracy:.2f}")
            )

    try:
        train(recipes.find(name), out, device, report)
    except KeyboardInterrupt:  # the parent is about to end, and has said why
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        events.put((name, 1.0, f"failed: {error}"))
