"""Losses of the protocol (section 3): classification, distillation, divergence. Logits in, scalars out, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy over all B x C elements; logits and soft targets [B, C]."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def distillation(logits: Tensor, old_logits: Tensor, tau: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """tau^2 times the mean, over all B x C_old elements, of KL(softmax(old / tau) || softmax(new[:, :C_old] / tau)).

    logits [B, C] of the student, old_logits [B, C_old] of the teacher. weights: float [B], 0 for rows that do not count and
    1 for the others; None: all count.
    """
    new = (logits[:, : old_logits.shape[1]].float() / tau).log_softmax(1)
    old = (old_logits.float() / tau).log_softmax(1)
    divergences = old.exp() * (old - new)
    if weights is None:
        return tau**2 * divergences.mean()
    return tau**2 * (weights[:, None] * divergences).sum() / (weights.sum() * divergences.shape[1])


def auto_kd(
    logits: Tensor, targets: Tensor, old_logits: Tensor | None, rows: Tensor | None, tau: float = 1.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Classification and distillation, weighed by rho = C_old / C: ((1 - rho) BCE, rho KD).

    rows: int64 [k], which images are distilled, and `weights` [k] as distillation takes them; None for all. Without a teacher
    (old_logits None) or without any such row in the batch, BCE stays unscaled and KD is 0, as in the released code.
    """
    bce = classification(logits, targets)
    if old_logits is None or (rows is not None and not len(rows)):
        return bce, torch.zeros_like(bce)
    rho = old_logits.shape[1] / logits.shape[1]
    if rows is not None:
        logits, old_logits = logits[rows], old_logits[rows]
    return (1 - rho) * bce, rho * distillation(logits, old_logits, tau, weights)


def divergence(div_logits: Tensor, targets: Tensor, num_old: int) -> Tensor:
    """DyTox's divergence loss: BCE of div_logits [B, 1 + new] against (mass of the old classes, each new class).

    targets [B, C] soft, its first num_old columns are the old classes.
    """
    merged = torch.cat([targets[:, :num_old].sum(1, keepdim=True), targets[:, num_old:]], dim=1)
    return classification(div_logits, merged)
