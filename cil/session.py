"""Session: where a run is trained, what it reports after every step, and what a signal does to it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """What `report` gets: on a CPU after every step, on a GPU after some (cil.fit.READ_EVERY), as it would wait for each.

    `done` and `total` count steps of the whole run; loss and accuracy are means of the steps since the last report.
    """

    task: int
    tasks: int
    phase: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    done: int
    total: int
    images: int  # in the steps since the last report
    steps: int = 1  # since the last report
    run: str = ""  # the name of its directory


Report = Callable[[Progress], None]


@dataclass
class Session:
    """Where and how a run is trained; nothing that its result depends on.

    Ctrl-C and SIGTERM raise KeyboardInterrupt, inside an epoch after the step that is under way: then it is saved first.
    A second Ctrl-C does not wait. (Under torchrun, one Ctrl-C arrives as SIGINT and as SIGTERM.)
    """

    device: str
    report: Report
    in_epoch: bool = False
    asked: int = field(default=0, init=False)  # the signal that came inside an epoch

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """The body is told of Ctrl-C and SIGTERM as the class says; afterwards signals are handled as they were before."""

        def handle(number: int, frame: object) -> None:
            if not self.in_epoch or number == self.asked == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = number

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) is not signal.SIG_IGN]
        before = {kind: signal.signal(kind, handle) for kind in kinds}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
