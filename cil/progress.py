"""What long work shows on standard error: one line that is renewed, or on no terminal a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from cil.session import Progress


@contextlib.contextmanager
def training(name: str, shown: bool = True) -> Iterator[Callable[[Progress], None]]:
    """The `report` of cil.train: task, epoch, loss, accuracy, images/s and time left, from the first step on."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    began, images = time.monotonic(), 0
    bar, run = None, ""

    def report(p: Progress) -> None:
        nonlocal bar, images, began, run
        if bar is not None and p.run != run:  # the one before was what this one starts from
            bar.close()
            began, images, bar = time.monotonic(), 0, None
        run = p.run
        if bar is None:
            look = {"unit": "step", "mininterval": interval, "maxinterval": interval, "dynamic_ncols": True}
            bar = tqdm(desc=p.run or name, total=p.total, initial=p.done - p.steps, disable=not shown, **look)
        images += p.images
        rate = images / (time.monotonic() - began)
        bar.set_postfix_str(
            f"task {p.task + 1}/{p.tasks} {p.phase} epoch {p.epoch + 1}/{p.epochs} loss {p.loss:.3f} "
            f"accuracy {p.accuracy:.2f} {rate:.0f} images/s",
            refresh=False,
        )
        bar.update(p.steps)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def counter(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """Counts finished pieces; shows nothing on no terminal."""
    with tqdm(total=total, desc=what, leave=False, disable=None) as bar:
        yield lambda name: bar.update(1)
