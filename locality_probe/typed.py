"""The instrument's: what a user types, told apart from files that are not right, and parsed without torch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Library:
    """Where models come from by name. make: (name, weights file or None, pretrained) -> Subject, or where that function is, as
    module:function, to be imported when it is asked for."""

    make: Callable[..., object] | str
    names: str = "NAME"  # what follows the slash, as messages call it
    sized: bool = False  # whether `make` takes image_size, in pixels, too
    trained: bool = False  # whether a model has its own weights also without a file and without `pretrained`

    def maker(self) -> Callable[..., Any]:
        """The function itself."""
        if callable(self.make):
            return self.make
        module, _, function = self.make.partition(":")
        return getattr(importlib.import_module(module), function)


LIBRARIES = {  # LIBRARY/NAME on the command line; a new library is one line here
    "timm": Library("locality_probe.subject:from_timm", sized=True),
    "torchvision": Library("locality_probe.subject:from_torchvision", sized=True),
    "hf": Library("locality_probe.subject:from_hf", "FOLDER", trained=True),
    "open_clip": Library("locality_probe.subject:from_open_clip", "NAME[:FILE]", sized=True),
}


def forms() -> str:
    """How models of each library are named: timm/NAME, torchvision/NAME, hf/FOLDER or open_clip/NAME[:FILE]."""
    *first, last = (f"{name}/{library.names}" for name, library in LIBRARIES.items())
    return f"{', '.join(first)} or {last}"


class Typed(ValueError):
    """A word or a number that the user gave is wrong: the command line ends with exit code 2, for other ValueErrors with 1."""


def typed(call: Callable[..., Result], *args: object) -> Result:
    """Returns call(*args). Raises Typed for its ValueError, which is about what the user gave."""
    try:
        return call(*args)
    except ValueError as error:
        raise Typed(str(error)) from None


@dataclass(frozen=True)
class Pixel:
    """A pixel of the picture as it is in its file, before any network crops it."""

    row: int
    column: int

    def __str__(self) -> str:
        return f"pixel {self.row},{self.column}"


Patch = tuple[int, int]  # row, column


def parse_grid(text: str) -> tuple[int, ...]:
    """ROWS,COLUMNS, or N for a sequence, or FRAMES,ROWS,COLUMNS for a video. Raises Typed for anything else."""
    sides = text.split(",")
    if not 1 <= len(sides) <= 3 or not all(is_count(side.strip()) and 0 < int(side) < 10**5 for side in sides):
        raise Typed(
            f"--grid {short(text)} is not ROWS,COLUMNS in patches, like 14,14; nor N, for a sequence; nor FRAMES,ROWS,COLUMNS"
        )
    return tuple(int(side) for side in sides)


def parse_layers(text: str) -> list[int] | None:
    """Numbers like 0,2, or None for all. Raises Typed for anything else."""
    numbers = None if text == "all" else _numbers(text)
    if numbers == []:
        raise Typed(f"layer={short(text)} is neither all nor numbers like 0,2")
    if numbers and len(set(numbers)) < len(numbers):
        raise Typed(f"layer={short(text)} names a layer twice")
    return numbers


def parse_heads(text: str) -> list[int] | str:
    """mean, all, or numbers like 0,2. Raises Typed for anything else."""
    heads = text if text in ("mean", "all") else _numbers(text)
    if heads == []:
        raise Typed(
            f"no head {text if len(text) <= 80 else short(text)}: give numbers from 0, like 0,2, or mean or all"
        )
    return heads


def _numbers(text: str) -> list[int]:
    """Of whole numbers between commas; none where one of them is no such number."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(map(is_count, parts)) else []


MOST_DIGITS = 9  # of a number that is typed: no layer, task or patch has more


def is_count(text: str) -> bool:
    """Whether a text is a whole number from 0 on, of at most MOST_DIGITS digits."""
    return text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS


def short(text: str) -> str:
    """What was typed, for a message: in one line, and no longer than one reads."""
    return repr(text) if len(text) <= 80 else f"{text[:60]!r}... ({len(text)} characters)"


def parse_query(text: str) -> str | Patch | Pixel:
    """mean, cls, a patch as ROW,COLUMN, or pixel:ROW,COLUMN. Raises Typed for anything else."""
    if text in ("mean", "cls"):
        return text
    match = re.fullmatch(r"(pixel:)?(\d{1,9}),(\d{1,9})", text, re.ASCII)
    if not match:
        raise Typed(
            f"query={short(text)} is neither mean, cls, ROW,COLUMN in patches, like 3,4, "
            "nor pixel:ROW,COLUMN, like pixel:120,64"
        )
    place = int(match[2]), int(match[3])
    return Pixel(*place) if match[1] else place


def split_checkpoint(spec: str) -> tuple[str, str | None]:
    """RUN_DIR[:TASK] -> the run directory, and init, all, a number, or None where no task is given.

    Raises Typed for another word behind the colon, and ValueError where there is no such run directory.
    """
    from cil.files import check_run

    if Path(spec, "run.json").is_file():  # whose name may have a colon
        return spec, None
    matched = re.fullmatch(r"(.*?)(?::(init|all|\d{1,9}))?", spec, re.DOTALL)
    assert matched is not None  # whatever is written: the first group takes it
    path, which = matched.groups()
    run, _, wrong = path.rpartition(":")
    if wrong and Path(run, "run.json").is_file():
        raise Typed(f"no task {short(wrong)} of {run}: a number, init or all")
    check_run(path)
    return path, which


def split_model(option: str) -> tuple[str, str]:
    """LIBRARY/NAME -> (library, name). Raises Typed for anything else."""
    library, _, name = option.partition("/")
    if library not in LIBRARIES or not name:
        raise Typed(f"--model {option!r} is not of the form {forms()}, like timm/vit_small_patch16_224")
    return library, name


def check_place(place: str) -> Path:
    """A file or a run directory. Raises ValueError where neither is there."""
    from cil.files import check_run

    return Path(place) if Path(place).is_file() else check_run(place)


def check_model(model: str) -> None:
    """Raises ValueError for what is neither a file, a run directory nor LIBRARY/NAME."""
    if Path(model).is_dir():
        check_place(model)
    elif not Path(model).is_file() and model.partition("/")[0] not in LIBRARIES:
        raise ValueError(f"no model {model!r}: give a run directory, a weights file, {forms()}")
