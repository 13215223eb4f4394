"""The command line's: how a command is declared, and how it says what went wrong."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator

import click

from locality_probe.typed import Typed


def open_streams() -> None:
    """Give standard streams that are closed somewhere to go: else the next file that is opened gets what is written to them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


class OneSentence(click.Command):
    """A command that fails with one clear sentence: exit code 2 for what was typed wrongly, 1 for everything else."""

    def invoke(self, context: click.Context) -> object:
        with terminable(), one_sentence(context):
            return super().invoke(context)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        with one_sentence(context):  # callbacks of options look at paths
            return super().parse_args(context, args)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM in the body is Ctrl-C: what was under way leaves nothing half-written, and says so."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    alone = threading.current_thread() is not threading.main_thread()
    if alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # whoever calls us has a way of its own
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def one_sentence(context: click.Context) -> Iterator[None]:
    """ValueError, OSError and want of memory in the body, as what click prints in one sentence."""
    try:
        yield
    except Typed as error:
        raise click.UsageError(str(error), context) from None
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        raise click.ClickException(out_of_memory(context.info_name or "", error)) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{place}{error.strerror or error}") from None


ADVICE = {  # where a device's memory is too small, by command
    "train": "several processes (torchrun --nproc-per-node 2 -m locality_probe train ...), which go on with the same run, or "
    "in another --out a smaller --set batch_size or --set amp=bf16",
    "sweep": "a smaller --set batch_size, --set amp=bf16, or fewer --workers",
    "reproduce": "fewer --workers, or --device cpu",
}


def out_of_memory(command: str, error: RuntimeError) -> str:
    """In a sentence, with what helps."""
    where = "the GPU's memory" if "CUDA" in str(error) else "memory"
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    more = f", which wanted {wanted[1]} more" if wanted else ""
    advice = ADVICE.get(command, "--device cpu, or a device with more memory")
    return f"{where} is too small for this work{more}; what helps: {advice}"


command = functools.partial(click.command, cls=OneSentence)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C in work that goes on when its command is given again."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; the same command goes on where it was") from None


def say(words: str) -> None:
    """Print for people: no wider than the terminal, or than 80 columns on a pipe."""
    from cil.text import prose

    click.echo(prose(words))


def warn(sentence: str) -> None:
    """Say it on standard error."""
    click.echo(sentence, err=True)
