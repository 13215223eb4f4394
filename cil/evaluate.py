"""Predictions -> accuracy rows; Last, Avg, Fgt, BWT as pure functions of the T x T matrix.

a[i, j] is the accuracy on task j's test images after task i, among all classes seen, no task id; NaN for j > i.
`sizes` [T] are the tasks' test images: with them numbers are weighted by image (the headline), without by task.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cil import parallel
from cil.augment import normalize
from cil.data import FileSet, ImageSet
from cil.scenario import Scenario

PRECISION = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def batch_size(device: str) -> int:
    """Images at a time where nothing is learned: few on a CPU, whose cache they stay in (460 against 370 images/s)."""
    return 32 if device == "cpu" else 256


@torch.no_grad()
def predict(model: nn.Module, images: ImageSet | FileSet, indices: Tensor, mean, std, device: str, amp: str) -> Tensor:
    """Predicted labels [n] of some images under the test transform, in eval mode; amp: none (float32), bf16 or fp16."""
    model.eval()
    batches, predicted = indices.split(batch_size(device)), []
    for x in images.batches(parallel.share(batches)):
        with torch.autocast(torch.device(device).type, PRECISION[amp], enabled=amp != "none"):
            predicted.append(model(normalize(x.to(device), mean, std)).argmax(1))
    return torch.cat(parallel.join([labels.cpu() for labels in predicted], len(batches)))


def accuracy_rows(
    model: nn.Module, test: ImageSet | FileSet, scenario: Scenario, task: int, mean, std, device: str, amp: str = "none"
) -> pd.DataFrame:
    """Rows of cil.tables.ACCURACY after `task`; test.labels are positions in the class order."""
    seen = [scenario[on_task].select(test.labels) for on_task in range(task + 1)]
    predicted = predict(model, test, torch.cat(seen), mean, std, device, amp).split([len(indices) for indices in seen])
    rows = []
    for on_task, (indices, labels) in enumerate(zip(seen, predicted, strict=True)):
        correct = int((labels == test.labels[indices]).sum())
        rows.append((task, on_task, len(indices), correct, correct / len(indices)))
    return pd.DataFrame(rows, columns=["task", "on_task", "images", "correct", "accuracy"])


def matrix(accuracy: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy table -> (a [T, T], sizes [T]); a task without a model (joint-terminal, joint-as-long) is a row of NaN."""
    sizes = accuracy.groupby("on_task")["images"].first()
    a = accuracy.pivot(index="task", columns="on_task", values="accuracy").reindex(index=sizes.index)
    return a.to_numpy(), sizes.to_numpy()


def seen(a: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
    """Accuracy over all classes seen after each task [T]: sum_j n_j a[i, j] / sum_j n_j, j <= i."""
    sizes = np.ones(len(a)) if sizes is None else np.asarray(sizes, float)
    return np.array([np.average(a[i, : i + 1], weights=sizes[: i + 1]) for i in range(len(a))])


def last(a: np.ndarray, sizes: np.ndarray | None = None) -> float:
    """Last: `seen` after the last task."""
    return float(seen(a, sizes)[-1])


def average(a: np.ndarray, sizes: np.ndarray | None = None) -> float:
    """Avg, average incremental accuracy: mean of `seen` over the tasks, task 0 included."""
    return float(seen(a, sizes).mean())


def forgetting(a: np.ndarray, sizes: np.ndarray | None = None) -> float:
    """Fgt: mean over j < T-1 of max over l in j..T-2 of a[l, j], minus a[T-1, j]. NaN for one task."""
    return _over_old_tasks([np.max(a[j : len(a) - 1, j]) - a[-1, j] for j in range(len(a) - 1)], sizes)


def backward_transfer(a: np.ndarray, sizes: np.ndarray | None = None) -> float:
    """BWT: mean over j < T-1 of a[T-1, j] - a[j, j]. NaN for one task."""
    return _over_old_tasks([a[-1, j] - a[j, j] for j in range(len(a) - 1)], sizes)


def _over_old_tasks(values: list[float], sizes: np.ndarray | None) -> float:
    if not values:
        return float("nan")
    return float(np.average(values, weights=None if sizes is None else np.asarray(sizes, float)[:-1]))


METRICS = {"Last": last, "Avg": average, "Fgt": forgetting, "BWT": backward_transfer}


def scores(accuracy: pd.DataFrame, training: str = "incremental") -> dict[str, float]:
    """Last, Avg, Fgt, BWT of an accuracy table, 0 to 1, weighted by image; without those that are not defined for it.

    Joint models start afresh for each task, so there is nothing that they could have forgotten.
    """
    a, sizes = matrix(accuracy)
    names = METRICS if training == "incremental" else ("Last", "Avg")
    values = {name: METRICS[name](a, sizes) for name in names}
    return {name: value for name, value in values.items() if not np.isnan(value)}


def format_scores(accuracy: pd.DataFrame, training: str = "incremental") -> str:
    """The scores in one line, percent."""
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in scores(accuracy, training).items()) + " %"
