"""Class order and increments -> tasks, as a sequence that can be sliced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# iCaRL's order of CIFAR-100 (fine labels in alphabetical order), which every CIL paper since uses.
ICARL_CIFAR100 = [
    87, 0, 52, 58, 44, 91, 68, 97, 51, 15, 94, 92, 10, 72, 49, 78, 61, 14, 8, 86, 84, 96, 18, 24, 32, 45, 88, 11, 4,
    67, 69, 66, 77, 47, 79, 93, 29, 50, 57, 83, 17, 81, 41, 12, 37, 59, 25, 20, 80, 73, 1, 28, 6, 46, 62, 82, 53, 9,
    31, 75, 38, 63, 33, 74, 27, 22, 36, 3, 16, 21, 60, 19, 70, 90, 89, 43, 5, 42, 65, 76, 40, 30, 23, 85, 2, 95, 56,
    48, 71, 64, 98, 13, 99, 7, 34, 55, 54, 26, 35, 39,
]  # fmt: skip


ORDERS = {
    "icarl": ICARL_CIFAR100,
    # Of the first 100 ILSVRC-2012 synsets in sorted order; numpy's legacy generator, whose stream is frozen.
    "imagenet100": np.random.RandomState(1993).permutation(100).tolist(),
}


def class_order(name: str, num_classes: int) -> list[int]:
    """Original class numbers in the order in which they are learned: alphabetical, that reversed, or one of ORDERS.

    Raises ValueError when the order is for another number of classes.
    """
    if name in ("alphabetical", "reversed"):
        return sorted(range(num_classes), reverse=name == "reversed")
    if num_classes != len(ORDERS[name]):
        raise ValueError(f"class_order={name} is for {len(ORDERS[name])} classes, not {num_classes}; use alphabetical")
    return list(ORDERS[name])


@dataclass(frozen=True)
class Task:
    """A stretch of the class order; `labels` are positions in it, and are what models predict."""

    labels: range

    def select(self, labels: Tensor) -> Tensor:
        """Indices [m] of the images whose label [n] belongs to this task."""
        return ((labels >= self.labels.start) & (labels < self.labels.stop)).nonzero().squeeze(1)


class Scenario:
    """Tasks of a Bx-y scenario: x classes first, then y a task (PODNet's notation; the last may be smaller).

    `scenario[t]` is task t; `scenario[: t + 1]` is one task with all classes seen by then: the joint counterpart.
    """

    def __init__(self, spec: str, num_classes: int):
        match = re.fullmatch(r"B(\d+)-(\d+)", spec)
        if match and not int(match[1]) and int(match[2]):
            raise ValueError(
                f"scenario={spec!r} starts with no class; where that stands for tasks of {match[2]} classes each, it is "
                f"B{match[2]}-{match[2]} here"
            )
        if not match or not all(map(int, match.groups())):
            raise ValueError(f"scenario={spec!r} is not of the form Bx-y, like B10-10")
        first, increment = map(int, match.groups())
        if first > num_classes:
            raise ValueError(f"scenario={spec} starts with {first} classes, but there are {num_classes}")
        starts = [0, *range(first, num_classes, increment)]
        self.spec = spec
        self.tasks = [Task(range(a, b)) for a, b in zip(starts, [*starts[1:], num_classes], strict=True)]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index: int | slice) -> Task:
        if not isinstance(index, slice):
            return self.tasks[index]
        tasks = self.tasks[index]
        return Task(range(tasks[0].labels.start, tasks[-1].labels.stop))


def relabel(labels: Tensor, order: list[int], num_classes: int) -> Tensor:
    """Original class numbers [n] -> positions in the class order [n]; -1 for classes that are not among the first ones."""
    position = torch.full((int(labels.max()) + 1 if len(labels) else 0,), -1)
    for place, original in enumerate(order[:num_classes]):
        if original < len(position):
            position[original] = place
    return position[labels]
