"""The runs of the paper by name: functions that return a Run. Docstring: cost, expected number.

Train one with `locality-probe train NAME --out DIR`; its joint counterpart is NAME-joint (a model per step) or
NAME-joint-terminal (one model on all classes). A new recipe is a function here with @recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from cil.run import Run

RECIPES: dict[str, Callable[[], Run]] = {}


def recipe(function: Callable[[], Run]) -> Callable[[], Run]:
    """Enter a function under its name, with hyphens."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def find(name: str) -> Run:
    """The run of a recipe, with its name in it. Raises ValueError that lists near names, or all."""
    base, training = name, "incremental"
    for kind in ("joint-terminal", "joint"):
        if training == "incremental" and name.endswith("-" + kind):
            base, training = name.removesuffix("-" + kind), kind
    if base not in RECIPES:
        near = difflib.get_close_matches(base, RECIPES, n=3) or sorted(RECIPES)
        raise ValueError(f"no recipe {name!r}; there: {', '.join(near)} (each also with -joint, -joint-terminal)")
    return dataclasses.replace(RECIPES[base](), recipe=name, training=training)


def with_lpa(run: Run) -> Run:
    """The same run with all its self-attention blocks LPA."""
    return dataclasses.replace(run, n_lpa=run.depth - 1)


@recipe
def demo_baseline() -> Run:
    """scikit-learn's digits, 5 tasks of 2 classes, 50 images each, 3 self-attention blocks of dimension 36: under a
    minute on one core. Measured: Last 71.3, Avg 85.0, Fgt 19.1."""
    return Run(
        dataset="digits", class_order="alphabetical", scenario="B2-2", images_per_class=50,
        dim=36, num_heads=9, depth=4, patch_size=1, init_std=0.1,
        epochs_first=28, epochs=28, batch_size=32, lr_first=2e-3, lr=2e-3, warmup_epochs=3, finetune_epochs=10,
        finetune_lr=2e-4, crop_padding=1, flip=False, rand_augment="", mixup=0.0, memory=100,
    )  # fmt: skip


@recipe
def demo_baseline_lpa() -> Run:
    """As demo-baseline, with LPA in every self-attention block. Measured: Last 85.1, Avg 90.5, Fgt 8.8."""
    return with_lpa(demo_baseline())


@recipe
def paper_b10_10_baseline() -> Run:
    """Table 1, CIFAR-100 B10-10, baseline at full size: 156 560 steps at batch 256, which needs a GPU. Published: Last
    63.11, Avg 74.74, Fgt 12.52."""
    return Run()


@recipe
def paper_b10_10_baseline_lpa() -> Run:
    """Table 1, CIFAR-100 B10-10, baseline + LPA, cost as paper-b10-10-baseline. Published: Last 65.27, Avg 76.50,
    Fgt 11.20."""
    return with_lpa(paper_b10_10_baseline())


@recipe
def reduced_b10_10_baseline() -> Run:
    """Real CIFAR-100 cut down to a lunch break: the first 50 classes of the usual order, 100 images each, in 5 tasks of 10;
    a quarter of an hour on one core, its joint twin 25 minutes. Measured: Last 23.7, Avg 36.5, Fgt 26.3."""
    return Run(
        num_classes=50, images_per_class=100,
        dim=108, num_heads=9, depth=5,
        epochs_first=30, epochs=30, batch_size=64, lr_first=1e-3, lr=1e-3, warmup_epochs=3, finetune_epochs=10,
        finetune_lr=1e-4, rand_augment="", mixup=0.0, memory=500, amp="bf16",
    )  # fmt: skip


@recipe
def reduced_b10_10_baseline_lpa() -> Run:
    """As reduced-b10-10-baseline, with LPA in every self-attention block. Measured: Last 24.4, Avg 38.3, Fgt 27.0."""
    return with_lpa(reduced_b10_10_baseline())
