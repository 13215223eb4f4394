"""What long work shows on standard error: one line that is renewed, or on no terminal a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from cil.train import Progress


@contextlib.contextmanager
def training(name: str) -> Iterator[Callable[[Progress], None]]:
    """The `report` of cil.train: task, epoch, loss, accuracy, images/s and time left."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(desc=name, unit="step", mininterval=interval, maxinterval=interval, dynamic_ncols=True) as bar:
        began, images = time.monotonic(), 0

        def report(p: Progress) -> None:
            nonlocal images
            if bar.total is None:  # the first step, perhaps of a run that goes on
                bar.total, bar.initial, bar.n = p.total, p.done - 1, p.done - 1
            images += p.images
            rate = images / (time.monotonic() - began)
            bar.set_postfix_str(
                f"task {p.task + 1}/{p.tasks} {p.phase} epoch {p.epoch + 1}/{p.epochs} loss {p.loss:.3f} "
                f"accuracy {p.accuracy:.2f} {rate:.0f} images/s",
                refresh=False,
            )
            bar.update(1)

        yield report


@contextlib.contextmanager
def counter(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """Counts finished pieces; shows nothing on no terminal."""
    with tqdm(total=total, desc=what, leave=False, disable=None) as bar:
        yield lambda name: bar.update(1)
