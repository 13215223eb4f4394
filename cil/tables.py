"""Tables with declared columns: the only thing that goes up the stairs from training to measuring to drawing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cil.files import atomically, reason_of, regular

FORMULA = re.compile(
    r"'*[=+\-@\t\r]"
)  # the beginning of a cell that a spreadsheet runs: it is written behind an apostrophe
MANY = 10**12  # more than any count here
AFTER = -1  # the `at_step` of a network after its task, not inside it


@dataclass(frozen=True)
class Table:
    """A tidy table: `keys` name a row, `values` are measured for it. Both map a column to (dtype, unit and meaning).

    added: columns that tables of an earlier version lack -> what they then hold.
    renamed: text column -> {its word in tables of an earlier version: the word now}.
    ranges: numeric column -> (least, most) of its values, which are then never missing.
    """

    name: str
    keys: dict[str, tuple[str, str]]
    values: dict[str, tuple[str, str]]
    added: dict[str, object] = field(default_factory=dict)
    renamed: dict[str, dict[str, str]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, tuple[str, str]]:
        """Every column in order: keys first."""
        return {**self.keys, **self.values}

    def check(self, frame: pd.DataFrame) -> pd.DataFrame:
        """`frame` with exactly the declared columns, in order and dtype; what an earlier version wrote is brought up to date:
        columns of `added` are filled in where they lack, words of `renamed` translated.

        Raises ValueError that names a missing or unknown column, a value of the wrong kind, or a repeated key.
        """
        frame = frame.assign(**{c: value for c, value in self.added.items() if c not in frame})
        missing = [c for c in self.columns if c not in frame]
        unknown = [c for c in frame if c not in self.columns]
        if missing or unknown:
            wrong = [f"lacks {missing}"] * bool(missing) + [f"has the unknown {unknown}"] * bool(unknown)
            raise ValueError(f"table {self.name} {' and '.join(wrong)}; its columns are {list(self.columns)}")
        frame = frame[list(self.columns)].reset_index(drop=True)
        for column, (dtype, _) in self.columns.items():
            try:
                converted = frame[column].astype(dtype)
                exact = (
                    dtype != "int64" or len(frame) == 0 or bool((converted == frame[column].astype("float64")).all())
                )
            except (ValueError, TypeError, OverflowError):
                exact = False
            if not exact:
                raise ValueError(f"table {self.name}: column {column} holds values that are not {dtype}")
            frame[column] = converted
        for column, (least, most) in self.ranges.items():
            outside = frame[~frame[column].between(least, most)]
            if len(outside):
                value = outside[column].iloc[0]
                raise ValueError(
                    f"table {self.name}: column {column} holds {value:g}, which is not from {least:g} to {most:g}"
                )
        for column, words in self.renamed.items():
            frame[column] = frame[column].replace(words)
        repeated = frame[frame.duplicated(list(self.keys))]
        if len(repeated):
            raise ValueError(f"table {self.name} repeats the key {dict(repeated[list(self.keys)].iloc[0])}")
        return frame

    def write(self, frame: pd.DataFrame, path: str | Path) -> Path:
        """Write as CSV or Parquet by the suffix of `path`; a reader sees the old file or the new one, never a half."""
        path, frame = Path(path), self.check(frame)

        def write(part: Path) -> None:
            if path.suffix == ".parquet":
                frame.to_parquet(part, index=False, compression="zstd")
            else:
                for column in (c for c, (dtype, _) in self.columns.items() if dtype == "str"):
                    frame[column] = frame[column].map(lambda text: f"'{text}" if FORMULA.match(text) else text)
                frame.to_csv(part, index=False)

        return atomically(path, write)

    def read(self, path: str | Path) -> pd.DataFrame:
        """The table in `path`. Raises ValueError when it is no such table."""
        path = regular(path)
        try:
            # Text columns may hold "" and "nan": only numbers have missing values here.
            text = {c: str for c, (dtype, _) in self.columns.items() if dtype == "str"}
            frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=text)
        except (OSError, ValueError, OverflowError, RecursionError) as error:  # pandas' own are ValueErrors
            raise ValueError(f"{path} is no readable table: {reason_of(error)}") from None
        for column in text:
            if column in frame:
                frame[column] = frame[column].fillna("")
                if path.suffix != ".parquet":
                    frame[column] = frame[column].map(
                        lambda cell: cell[1:] if cell[:1] == "'" and FORMULA.match(cell[1:]) else cell
                    )
        try:
            return self.check(frame)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


ACCURACY = Table(
    "accuracy",
    keys={
        "task": ("int64", "the last task trained, from 0"),
        "on_task": ("int64", "the task whose test images are classified, from 0, at most `task`"),
    },
    values={
        "images": ("int64", "test images of `on_task`"),
        "correct": ("int64", "of them classified correctly among all classes seen, without a task id"),
        "accuracy": ("float64", "correct / images, 0 to 1"),
    },
    ranges={"task": (0, MANY), "on_task": (0, MANY), "images": (1, MANY), "correct": (0, MANY), "accuracy": (0, 1)},
)

TRAINING = Table(
    "training",
    keys={
        "task": ("int64", "from 0"),
        "phase": ("str", "fit, or finetune (balanced, on the memory alone)"),
        "epoch": ("int64", "from 0"),
    },
    values={
        "steps": ("int64", "optimiser steps in the epoch"),
        "images": ("int64", "images drawn in the epoch"),
        "loss": ("float64", "mean total loss, nats"),
        "accuracy": ("float64", "of the augmented training batches against the larger mixup share, 0 to 1"),
        "lr": ("float64", "learning rate"),
        "seconds": ("float64", "wall-clock time of the epoch"),
    },
    ranges={"task": (0, MANY), "epoch": (0, MANY), "steps": (0, MANY), "images": (0, MANY), "seconds": (0, MANY)},
)

MEMORY = Table(
    "memory",
    keys={
        "process": ("int64", "whose memory it is: 0, or one of those that memory_mode=per-process:W emulates"),
        "label": ("int64", "position of the class in the class order"),
        "rank": ("int64", "order in which herding picked the image, from 0"),
    },
    values={"image": ("int64", "index into the training set as its data set module loads it")},
    ranges={"process": (0, MANY), "label": (0, MANY), "rank": (0, MANY), "image": (0, MANY)},
)

SWEEP = Table(
    "sweep",
    keys={"run": ("str", "name of the run directory")},
    values={
        "recipe": ("str", "recipe that it was made from, with -joint, -joint-terminal or -joint-as-long"),
        "seed": ("int64", "its seed"),
        "state": ("str", "waiting | running | running elsewhere (another process trains it) | finished | failed"),
        "tasks": ("int64", "finished tasks"),
        "of": ("int64", "planned tasks; 0: not known"),
        "steps": ("int64", "optimiser steps in training.csv"),
        "of_steps": ("int64", "optimiser steps of the whole run; 0: not known"),
        "last": ("float64", "accuracy over all classes after the last task, percent"),
        "avg": ("float64", "mean over tasks of the accuracy over all classes seen, percent"),
        "fgt": ("float64", "forgetting, percent; not defined for joint training"),
        "seconds": ("float64", "wall-clock time of the epochs in training.csv"),
        "reason": ("str", "why it failed; empty if it did not"),
    },
)
