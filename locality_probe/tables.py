"""The instrument's tables: columns, dtypes, units. Counting starts at 0; figures add 1 where the paper does."""

from __future__ import annotations

from cil.tables import Table

INITIAL = -1  # the task of the rows that describe a network as initialised, before task 0

_MODEL = {
    "run": ("str", "name of the run directory, or of the model"),
    "task": ("int64", "the last task trained, from 0; -1: as initialised, before task 0"),
    "layer": ("int64", "attention layer, from the shallow end, from 0"),
}
_HEAD = _MODEL | {"head": ("int64", "from 0; heads pair only along one training lineage")}

NONLOCALITY = Table(
    "nonlocality",
    keys=_HEAD,
    values={
        "pair": ("str", "name that an incremental run shares with its joint twins: the incremental run's"),
        "training": (
            "str",
            "incremental | joint (a fresh model a task) | joint-terminal | model (not one of our runs)",
        ),
        "kind": ("str", "class of the attention layer"),
        "images": ("int64", "number of images measured"),
        "d_loc": ("float64", "nonlocality: mean over images and query patches of the attended distance, patches"),
        "d_loc_sd": ("float64", "standard deviation over images of the per-image value, patches"),
        "d_uniform": ("float64", "d_loc of uniform attention on the same grid, patches"),
        "d_ratio": ("float64", "d_loc / d_uniform"),
        "prefix_mass": ("float64", "attention of patches on class, register and distillation tokens, 0 to 1"),
    },
)

NONLOCALITY_IMAGES = Table(
    "nonlocality_images",
    keys=_HEAD | {"image": ("int64", "index of the image in its source: see measurement.json")},
    values={
        "d_loc": ("float32", "nonlocality of this image, patches"),
        "prefix_mass": ("float32", "attention of patches on prefix tokens, 0 to 1"),
    },
)

LAYERS = Table(
    "layers",
    keys=_MODEL,
    values={
        "name": ("str", "module path in the model"),
        "kind": ("str", "class of the attention layer"),
        "num_heads": ("int64", "0 where the layer was not seen"),
        "grid_rows": ("int64", "patches"),
        "grid_columns": ("int64", "patches"),
        "num_prefix_tokens": ("int64", "class, register and distillation tokens before the patches"),
        "status": ("str", "ok | skipped"),
        "reason": ("str", "why it was skipped; empty if ok"),
    },
)

SWEEP = Table(
    "sweep",
    keys={"run": ("str", "name of the run directory")},
    values={
        "recipe": ("str", "recipe that it was made from, with -joint or -joint-terminal"),
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
