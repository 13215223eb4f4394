"""What a run directory must hold, checked when it is opened: nothing trains on, or is measured, from a damaged state.

Each check raises ValueError with one sentence that names the file and says what to do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from cil.memory import budget_per_class
from cil.tables import ACCURACY, MEMORY

if TYPE_CHECKING:
    from cil.checkpoint import RunDir

MOST_PIXELS = 10_000  # of a side
MOST_CLASSES = 1_000_000
LONGEST_NAME = 255


def check_description(content: dict[str, Any]) -> None:
    """The fields of run.json beside `run`. Raises ValueError that names the field."""

    def is_number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    def is_count(value: object, least: int, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    def all_of(value: object, length: int | None, fits) -> bool:
        return isinstance(value, list) and (length is None or len(value) == length) and all(fits(v) for v in value)

    order, names = content["class_order"], content["classes"]
    wanted = {
        "image_size": (all_of(content["image_size"], 2, lambda v: is_count(v, 1, MOST_PIXELS)),
                       f"two whole numbers of pixels, 1 to {MOST_PIXELS}"),
        "mean": (all_of(content["mean"], 3, is_number), "three numbers, one per channel"),
        "std": (all_of(content["std"], 3, lambda v: is_number(v) and v > 0), "three numbers above 0, one per channel"),
        "class_order": (all_of(order, None, lambda v: is_count(v, 0, MOST_CLASSES)) and 0 < len(order) == len(set(order)),
                        "different whole numbers, one per class"),
        "classes": (all_of(names, None, lambda v: isinstance(v, str)) and isinstance(order, list) and len(names) == len(order),
                    "as many names as class_order has classes"),
        "joint_twin": (_is_name(content["joint_twin"]), "the name of a run directory, or null"),
        "twin_of": (_is_name(content["twin_of"]), "the name of a run directory, or null"),
        "trainer": (is_count(content["trainer"], 1, 10**6), "the number of a trainer"),
        "device": (isinstance(content["device"], str), "the name of a processor"),
    }  # fmt: skip
    for name, (fits, words) in wanted.items():
        if not fits:
            raise ValueError(f"{name} is not {words}")


def _is_name(value: object) -> bool:
    return value is None or (isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and "/" not in value)


def accuracy_of(directory: RunDir) -> pd.DataFrame:
    """accuracy.csv of the finished tasks. Raises ValueError where rows are missing, or do not add up."""
    path = directory.path / "accuracy.csv"
    rows = ACCURACY.read(path)
    there = set(zip(rows["task"], rows["on_task"], strict=True))
    wanted = {(task, on_task) for task in directory.tasks for on_task in range(task + 1)}
    if missing := sorted(wanted - there):
        raise ValueError(
            f"{path} lacks the accuracy after task {missing[0][0]} on task {missing[0][1]}: restore the file, or delete "
            f"{directory.weights_path(missing[0][0]).name} to have that task trained again"
        )
    odd = rows[
        (rows["correct"] > rows["images"]) | ((rows["correct"] / rows["images"] - rows["accuracy"]).abs() > 1e-6)
    ]
    if len(odd):
        row = odd.iloc[0]
        raise ValueError(
            f"{path}: after task {row['task']} on task {row['on_task']}, {row['correct']} of {row['images']} images are no "
            f"accuracy of {row['accuracy']:g}: restore the file"
        )
    return rows[[pair in wanted for pair in zip(rows["task"], rows["on_task"], strict=True)]].reset_index(drop=True)


def check_memory(directory: RunDir, task: int, labels: Tensor) -> None:
    """The exemplars after `task`, which the next one trains with; labels: of the training images, as class positions [n].

    Raises ValueError where they are missing, or are not images of the classes seen.
    """
    run, seen = directory.run, directory.scenario[: task + 1].labels.stop
    m, path = budget_per_class(run.memory, seen), directory.memory_path(task)
    if run.training != "incremental" or m == 0:
        return
    again = f"restore it, or delete {directory.weights_path(task).name} to have task {task} trained again"
    if not path.exists():
        raise ValueError(f"{path} is missing, and task {task + 1} trains with its exemplars: {again}")
    rows = MEMORY.read(path)
    images = rows["image"].to_numpy()
    if len(images) and images.max() >= len(labels):
        raise ValueError(f"{path} holds image {images.max()}, and there are {len(labels)} training images: {again}")
    wrong = rows[rows["label"].to_numpy() != labels.numpy()[images]]
    if len(wrong):
        row = wrong.iloc[0]
        raise ValueError(f"{path} holds image {row['image']} as class {row['label']}, which it is not: {again}")
    missing = np.setdiff1d(np.arange(seen), rows["label"])
    if (
        len(missing)
        or rows.duplicated(["process", "image"]).any()
        or (rows.groupby(["process", "label"]).size() > m).any()
    ):
        what = f"no exemplar of class {missing[0]}" if len(missing) else f"images twice, or more than {m} of a class"
        raise ValueError(f"{path} holds {what}: {again}")
