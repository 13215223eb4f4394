"""Every random number of an epoch, from the CPU's generator: order of images, crops, flips, RandAugment, mixup, drop path.

CPU and GPU therefore train with the same draws, and a run that goes on after an interruption needs no generator state: a
place (task, phase, epoch, step) names its stream (cil.run.randomness). Under torchrun, draws are for the whole batch and a
process takes its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.special import betaincinv
from torch import Generator, Tensor

from cil import augment, parallel
from cil.augment import Operations, RandAugment
from cil.run import Run, randomness

# One call of stochastic depth in a forward pass: the probability of dropping, and the shape of what is drawn for an image.
DropPathCall = tuple[float, tuple[int, ...]]


class Draws(NamedTuple):
    """The random numbers of one step, for the rows of a batch [b]. None or empty: this run draws none."""

    crop: Tensor | None  # int64 [2, b], rows and columns (augment.crop)
    flip: Tensor | None  # bool [b]
    operations: Operations | None  # of RandAugment
    lam: float | Tensor | None  # of mixup, the same for the whole batch
    drop_path: list[Tensor]  # float32 [b k, ...] a call: 0 where the row is dropped, else 1 / (1 - p)


def of_epoch(run: Run, task: int, phase: str, epoch: int, n: int) -> tuple[Tensor, Tensor]:
    """The order in which an epoch shows n images, int64 [n], each run.repeats times in a row; a seed for each crop [n]."""
    with randomness(run.seed, task, phase, epoch) as generator:
        order = torch.randperm(n, generator=generator).repeat_interleave(run.repeats)[:n]
        return order, torch.randint(2**62, (n,), generator=generator)


def of_step(run: Run, n: int, drop_path: Sequence[DropPathCall], generator: Generator, multiple: int = 1) -> Draws:
    """What a step on a batch of n images draws; inside parallel.batch, the rows of this process.

    multiple: operations have places for so many images, or a multiple.
    """
    return Draws(
        crop=parallel.own(crop_offsets(n, run.crop_padding, generator), dim=1) if run.crop_padding else None,
        flip=parallel.own(flips(n, generator)) if run.flip else None,
        operations=operations(n, augment.parse(run.rand_augment), generator, multiple) if run.rand_augment else None,
        lam=mixup_lambda(run.mixup, generator) if run.mixup else None,
        drop_path=[parallel.own(kept(n, *call, generator)).flatten(0, 1) for call in drop_path],
    )


def crop_offsets(n: int, padding: int, generator: Generator) -> Tensor:
    """int64 [2, n]: all (2 padding + 1)^2 offsets alike, as torchvision's RandomCrop(padding)."""
    return torch.randint(2 * padding + 1, (2, n, 1), generator=generator).squeeze(2)


def flips(n: int, generator: Generator) -> Tensor:
    """bool [n]: true with probability 1/2, as torchvision's RandomHorizontalFlip."""
    return torch.rand(n, generator=generator) < 0.5


def mixup_lambda(alpha: float, generator: Generator) -> float:
    """One draw from Beta(alpha, alpha): torch's own Beta takes no generator, so invert the distribution function."""
    uniform = torch.rand((), dtype=torch.float64, generator=generator).item()
    return float(betaincinv(alpha, alpha, uniform))


def kept(n: int, p: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """float32 [n, *shape]: 0 with probability p, else 1 / (1 - p)."""
    return torch.empty(n, *shape).bernoulli_(1 - p, generator=generator) / (1 - p)


def operations(n: int, config: RandAugment, generator: Generator, multiple: int = 1) -> Operations:
    """RandAugment's draws for n images; inside parallel.batch, for the rows of this process."""
    number, level, sign = (parallel.own(t, dim=1) for t in levels(n, config, generator))  # [layers, n] each
    chosen = number[:, None] == torch.arange(len(augment.APPLY))[:, None]  # [layers, 15, n]
    place = chosen.cumsum(2) - 1
    most = max(min(n, 1), int(chosen.sum(2).max()))
    places = -(-most // multiple) * multiple
    to_argument = augment.arguments(config.increasing).values()
    arguments = torch.stack([f(level / 10, sign).float() for f in to_argument], 1)  # [layers, 15, n]
    layer, operation, image = chosen.nonzero(as_tuple=True)
    table_entry = layer, operation, place[chosen]
    rows = torch.zeros(*chosen.shape[:2], places, dtype=torch.long)
    argument = torch.zeros(rows.shape)
    source = torch.arange(number.shape[1]).repeat(len(number), 1)
    rows[table_entry], argument[table_entry] = image, arguments[chosen]
    source[layer, image] = number.shape[1] + operation * places + place[chosen]
    return Operations(rows, argument, source)


def levels(n: int, config: RandAugment, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Per layer and image, [layers, n] each: operation number or -1 for none, level in [0, 10], sign -1 or 1."""
    shape = (config.layers, n)
    number = torch.randint(15, shape, generator=generator)
    number[torch.rand(shape, generator=generator) < 0.5] = -1
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    level = (config.magnitude + config.std * noise).clamp(0, 10)
    sign = 2 * torch.randint(2, shape, generator=generator) - 1
    return number, level, sign
