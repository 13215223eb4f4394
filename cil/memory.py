"""What is kept of old classes: exemplar indices by iCaRL herding, within one budget."""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor


def herd(features: Tensor, m: int) -> list[int]:
    """The m rows of features [n, d] that iCaRL's herding picks, in order (arXiv 1611.07725, algorithm 4).

    Features are L2-normalised, mu is their mean; w starts at mu; again and again the row with the largest w.f is picked
    if it is new, and w += mu - f. At most 1000 turns, after which fewer than m may be found; but where there are no more
    than m, all come back.
    """
    features = F.normalize(features.double(), dim=1)
    mu = features.mean(0)
    picked: list[int] = []
    w = mu.clone()
    for _ in range(1000):
        if len(picked) >= min(m, len(features)):
            break
        best = int((features @ w).argmax())
        if best not in picked:
            picked.append(best)
        w = w + mu - features[best]
    if m >= len(features):
        picked += [row for row in range(len(features)) if row not in picked]
    return picked


def budget_per_class(budget: int, classes_seen: int) -> int:
    """floor(budget / classes seen): the same for every class."""
    return budget // classes_seen


def remember(
    old: pd.DataFrame | None, features: Tensor, labels: Tensor, indices: Tensor, m: int, process: int = 0
) -> pd.DataFrame:
    """The memory after a task: old classes keep their first m exemplars, new ones get m by herding.

    old: rows of cil.tables.MEMORY or None, of which those of `process` count; features [n, d], labels [n] and data-set
    indices [n] are of the new classes.
    """
    rows = [] if old is None else [old[(old["rank"] < m) & (old["process"] == process)]]
    for label in labels.unique().tolist():
        mine = (labels == label).nonzero().squeeze(1)
        chosen = indices[mine[torch.tensor(herd(features[mine], m), dtype=torch.long)]]
        ranks = range(len(chosen))
        rows.append(pd.DataFrame({"process": process, "label": label, "rank": ranks, "image": chosen.tolist()}))
    return pd.concat(rows, ignore_index=True)
