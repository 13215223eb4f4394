"""The instrument's tables: columns, dtypes, units. Counting starts at 0; figures add 1 where the paper does."""

from __future__ import annotations

import math

import pandas as pd

from cil.tables import ACCURACY, AFTER, Table
from cil.tables import SWEEP as SWEEP  # the trainer's, with its other tables

INITIAL = -1  # the task of the rows that describe a network as initialised, before task 0

_MODEL = {
    "run": ("str", "name of the run directory, or of the model"),
    "task": ("int64", "the last task trained, from 0; -1: as initialised, before task 0"),
    "layer": ("int64", "attention layer, from the shallow end, from 0"),
}
_AT_STEP = {"at_step": ("int64", "-1: after the task; else inside it, optimiser steps that the network has taken")}
_HEAD = _MODEL | {"head": ("int64", "from 0; heads pair only along one training lineage")}


def after_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of networks after a task, without those of checkpoints inside one; a frame without at_step as it is."""
    return frame[frame["at_step"] == AFTER] if "at_step" in frame else frame


_SHARES = {  # of locality_probe.measures.measure_attention, which has the equations; empty where a measure was not asked for
    "rms_distance": ("float64", "root mean square of the attended distance, patches"),
    "prefix_mass": ("float64", "attention of patches on class, register and distillation tokens, 0 to 1"),
    "entropy": (
        "float64",
        "of a patch's attention over patches, over that of uniform attention, 0 to 1; of patches that have a choice",
    ),
    "self_mass": ("float64", "attention of a patch on itself, among patches, 0 to 1"),
    "centroid_shift": ("float64", "distance of a patch to the mean place that it attends to, patches"),
    "sink_mass": ("float64", "attention of patches on the ceil(N / 100) patches that get most, among patches, 0 to 1"),
    "d_loc_no_sinks": ("float64", "d_loc with those patches left out as keys, patches"),
    "d_time": ("float64", "of a video: attended distance between frames, frames; empty for images"),
    "d_space": ("float64", "of a video: attended distance over rows and columns, patches; empty for images"),
}
_NEW_SHARES: dict[str, object] = {name: math.nan for name in ("sink_mass", "d_loc_no_sinks", "d_time", "d_space")}

NONLOCALITY = Table(
    "nonlocality",
    keys=_HEAD | _AT_STEP,
    added=_NEW_SHARES | {"at_step": AFTER, "d_loc_pixels": math.nan, "d_loc_side": math.nan},
    values={
        "pair": ("str", "name that an incremental run shares with its joint twins: the incremental run's"),
        "training": ("str", "incremental | joint (a model a task) | joint-terminal | joint-as-long | model (no run)"),
        "kind": ("str", "class of the attention layer"),
        "extent": ("str", "grid: over the whole image | window: inside each window, as in Swin"),
        "images": ("int64", "number of images measured"),
        "d_loc": ("float64", "nonlocality: mean over images and query patches of the attended distance, patches"),
        "d_loc_sd": ("float64", "standard deviation over images of the per-image value, patches"),
        "d_uniform": ("float64", "d_loc of uniform attention on the same grid, patches; causal: over earlier keys"),
        "d_ratio": ("float64", "d_loc / d_uniform"),
        "d_loc_pixels": ("float64", "d_loc in pixels of the network's input; empty where a patch's size is not known"),
        "d_loc_side": (
            "float64",
            "d_loc in parts of the input's side (the geometric mean of height and width), 0 to about 1",
        ),
        **_SHARES,
        "gate": ("float64", "GPSA: share of positional attention, 0 to 1; empty for other layers"),
        "content_scale": ("float64", "LPA: lambda; empty for other layers"),
    },
)

NONLOCALITY_IMAGES = Table(
    "nonlocality_images",
    keys=_HEAD | _AT_STEP | {"image": ("int64", "index of the image in its source: see measurement.json")},
    added=_NEW_SHARES | {"at_step": AFTER},
    values={"d_loc": ("float32", "nonlocality of this image, patches")}
    | {name: ("float32", meaning) for name, (_, meaning) in _SHARES.items()},
)

_INTERVAL = {
    "low": ("float64", "lower end of the 95 % interval"),
    "high": ("float64", "upper end of the 95 % interval"),
}

INTERVALS = Table(
    "intervals",
    keys={"measure": ("str", "a value column of nonlocality_images"), **_MODEL}
    | {
        "other": ("str", "empty, or RUN:TASK, from which the row is the difference"),
        "over": ("str", "what the interval is over: images | images, paired | seeds | seeds, paired"),
    },
    values={
        "mean": ("float64", "mean over heads, and over images or seeds, of the measure or the difference; its unit"),
        **_INTERVAL,
        "n": ("int64", "number of images or seeds"),
    },
)

ALL_TASKS = -2  # the task of the rows that are a mean over tasks

COMPARISON = Table(
    "comparison",
    keys={
        "run": ("str", "name of the first run, model or group of seeds"),
        "other": ("str", "of the second"),
        "task": ("int64", "of the first, from 0; -2: the mean over their common tasks"),
        "other_task": ("int64", "of the second: the same, but where two single checkpoints are compared"),
        "layer": ("int64", "attention layer, from the shallow end, from 0"),
    },
    values={
        "d_loc": ("float64", "of the first, mean over heads and images, patches"),
        "d_loc_other": ("float64", "of the second, patches"),
        "difference": ("float64", "first minus second, paired, patches"),
        **_INTERVAL,
        "low_all": ("float64", "lower end of a 95 % interval at once for all rows (images) or a task's layers (seeds)"),
        "high_all": ("float64", "its upper end"),
        "d_uniform": ("float64", "d_loc of uniform attention, patches"),
        "over": ("str", "what the intervals are over: images, paired | seeds, paired"),
        "n": ("int64", "number of images or seeds"),
        "verdict": ("str", "farther | closer (low_all..high_all excludes 0) | equal (within the margin) | undecided"),
    },
)


def compared(comparison: pd.DataFrame) -> tuple[str, str]:
    """What the sides of one COMPARISON are called: their runs, and run:task where they are not of the same task."""
    first = comparison.iloc[0]
    if first["task"] == first["other_task"]:
        return first["run"], first["other"]

    def name(runs: str, task: int) -> str:
        return " + ".join(f"{run}:{task}" for run in runs.split(" + "))

    return name(first["run"], first["task"]), name(first["other"], first["other_task"])


_FEATURES = {
    "run": _MODEL["run"],
    "task": _MODEL["task"],
    "layer": (
        "str",
        "block 0 ...: mean patch token after it | token: what the newest head is fed | tokens: all of them",
    ),
    "group": (
        "str",
        "whose images: all | seen (classes of tasks 0 to `task`) | new (of `task`) | future (of later ones)",
    ),
}

SPECTRUM = Table(
    "spectrum",
    keys=_FEATURES | {"rank": ("int64", "from 0, the largest eigenvalue first")},
    values={
        "eigenvalue": ("float64", "of the features' centred covariance, over n - 1; grows with their norm squared"),
        "eigenvalue_normalised": ("float64", "over their sum, 0 to 1"),
    },
)

SPECTRUM_SUMMARY = Table(
    "spectrum_summary",
    keys=_FEATURES,
    values={
        "pair": ("str", "name that an incremental run shares with its joint twins: the incremental run's"),
        "training": ("str", "incremental | joint | joint-terminal | joint-as-long"),
        "images": ("int64", "images of the group"),
        "dimension": ("int64", "of the features"),
        "trace": ("float64", "sum of the eigenvalues"),
        "effective_rank": ("float64", "exp of the entropy of the normalised eigenvalues, 1 to dimension"),
        "participation_ratio": ("float64", "(sum l)^2 / sum l^2, 1 to dimension"),
        "spectral_ratio": ("float64", "sum l / largest l, 1 to dimension"),
        "rankme": ("float64", "exp of the entropy of the normalised singular values of uncentred features"),
        "slope": ("float64", "of log eigenvalue against log rank in the window"),
        "slope_first_rank": ("int64", "start of the window, counted from 1"),
        "slope_last_rank": ("int64", "its end, included"),
        "mp_edge": ("float64", "largest eigenvalue of as many isotropic features of this trace (Marchenko-Pastur)"),
        "above_edge": ("int64", "eigenvalues above it"),
        "reliable": ("str", "true | false: fewer than 10 images a dimension"),
    },
)

TRANSFER = Table(
    "transfer",
    keys={key: _FEATURES[key] for key in ("run", "task", "layer")}
    | {
        "group": ("str", "the classes: seen (of tasks 0 to `task`) | future (of later tasks)"),
        "control": ("str", "none | initial: the network as initialised, same images | shuffled: training labels"),
        "probe": ("str", "knn (cosine, 20 neighbours) | linear (ridge on standardised features)"),
    },
    values={
        "pair": ("str", "name that an incremental run shares with its joint twins: the incremental run's"),
        "training": ("str", "incremental | joint | joint-terminal | joint-as-long"),
        "classes": ("int64", "in the group"),
        "train_images": ("int64", "that the probe was trained on"),
        "test_images": ("int64", "that it was tested on"),
        "accuracy": ("float64", "of them classified rightly, 0 to 1"),
        "low": ("float64", "lower end of the 95 % interval over test images (Wilson)"),
        "high": ("float64", "its upper end"),
        "chance": ("float64", "1 / classes"),
    },
)

CKA = Table(
    "cka",
    keys={key: _FEATURES[key] for key in ("run", "task", "layer")}
    | {
        "other_run": ("str", "the joint twin, or the run itself"),
        "other_task": ("int64", "the same task of the twin, or task 0 of the run"),
    },
    values={
        "cka": ("float64", "debiased linear CKA of the layer's features, at most 1; about 0: unrelated"),
        "images": ("int64", "test images that both saw"),
    },
)

TRANSFER_LOCALITY = Table(
    "transfer_locality",
    keys={
        "run": _MODEL["run"],
        "task": ("int64", "from 0; -2: the mean over tasks"),
        "probe": ("str", "knn | linear"),
    },
    values={
        "rho": ("float64", "Spearman's rank correlation over layers of D_loc and accuracy on future classes, -1 to 1"),
        **_INTERVAL,
        "over": ("str", "what the interval is over: images (bootstrap), or tasks (Student's t)"),
        "layers": ("int64", "number of layers"),
        "n": ("int64", "test images, or tasks"),
    },
)

HISTORY = Table(
    "history",
    keys={
        "epoch": ("int64", "as the training loop counts"),
        "layer": ("int64", "attention layer, from the shallow end, from 0"),
    },
    values={
        "name": ("str", "module path in the model"),
        "d_loc": ("float64", "nonlocality, mean over heads and images, patches"),
        "d_uniform": ("float64", "d_loc of uniform attention, patches"),
        "d_ratio": ("float64", "d_loc / d_uniform"),
        "prefix_mass": ("float64", "attention of patches on class, register and distillation tokens, 0 to 1"),
    },
)

LAYERS = Table(
    "layers",
    keys=_MODEL | _AT_STEP,
    added={"at_step": AFTER, "places": "", "grid": ""},
    renamed={"how": {"fused": "sdpa", "written out": "eager", "multihead": "sdpa"}},
    values={
        "name": ("str", "module path in the model"),
        "kind": ("str", "class of the attention layer"),
        "how": (
            "str",
            "sdpa: scaled_dot_product_attention | eager: products of queries, keys and values | "
            "kernel: another library's kernel | asked: the layer gives its map; empty if skipped",
        ),
        "places": ("str", "how it is known where tokens are: declared | given | observed; empty if skipped"),
        "grid": ("str", "places along each axis, like 14x14; frames first in a video"),
        "num_heads": ("int64", "0 where the layer was not seen"),
        "grid_rows": ("int64", "patches; 1 for a sequence"),
        "grid_columns": ("int64", "patches, or positions of a sequence"),
        "extent": ("str", "grid: the whole image | window: the grid is that of a window"),
        "num_prefix_tokens": ("int64", "keys without a place: class, register and prompt tokens"),
        "status": ("str", "ok | skipped"),
        "reason": ("str", "why it was skipped; empty if ok"),
    },
)

# Of a study: many runs in one folder of tables, each table with the rows of all of them.

RUNS = Table(
    "runs",
    keys={"run": ("str", "name of the run directory")},
    values={
        "scale": ("str", "paper | learned | small | demo"),
        "setting": ("str", "scenario in small letters, b10-10, with imagenet- before it; empty: the demo's only one"),
        "system": ("str", "name of the recipe, less scale and setting: baseline, dytox-lpa, baseline-nlpa-3"),
        "method": ("str", "baseline | dytox"),
        "n_lpa": ("int64", "LPA blocks, from the shallow end"),
        "lpa_blocks": ("int64", "blocks that could be LPA"),
        "lambda_init": ("float64", "of LPA"),
        "training": (
            "str",
            "incremental | joint (a fresh model a task) | joint-as-long (one, with as many steps as CIL)",
        ),
        "seed": ("int64", "of every random draw"),
        "tasks": ("int64", "trained"),
        "classes": ("int64", "in all tasks"),
        "steps": ("int64", "optimiser steps"),
        "images": ("int64", "that those steps saw, each as often as it was seen"),
        "seconds": ("float64", "wall-clock time of the epochs"),
        "git": ("str", "commit that trained it"),
        "trainer": ("int64", "number of the trainer (cil.checkpoint): runs of different ones are never compared"),
        "torch": ("str", "version that trained it"),
        "device": ("str", "model name of the processor that it was begun on; empty: not known"),
        "settings": ("str", "all settings of run.json, as JSON"),
    },
    added={"trainer": 1, "device": ""},
)

MEASUREMENTS = Table(
    "measurements",
    keys={"run": RUNS.keys["run"], "kind": ("str", "accuracy | nonlocality | spectrum | transfer | attention")},
    values={
        "images": ("int64", "that the networks were shown"),
        "source": ("str", "where they are from"),
        "sha256": ("str", "of which images: equal ones were measured on the same"),
        "git": ("str", "commit that measured"),
        "seconds": ("float64", "that it took"),
    },
)

STEPS = Table(
    "steps",
    keys={"run": RUNS.keys["run"], "task": ("int64", "finished task")},
    values={
        "steps": (
            "int64",
            "optimiser steps that its network has taken by then, since it was initialised: a joint twin starts afresh at "
            "each task",
        )
    },
)

STUDY_ACCURACY = Table("accuracy", keys=RUNS.keys | ACCURACY.keys, values=ACCURACY.values, ranges=ACCURACY.ranges)

LAYER_IMAGES = Table(
    "layer_images",
    keys=_MODEL | _AT_STEP | {"image": ("int64", "index of the image in its source")},
    values={"d_loc": ("float32", "nonlocality of this image, mean over heads, patches")},
    added={"at_step": AFTER},
)

EXAMPLES = Table(
    "examples",
    keys={"image": ("str", "name of the example")},
    values={
        "rows": ("int64", "pixels, as the networks see it"),
        "columns": ("int64", "pixels"),
        "rgb": ("object", "uint8 [rows, columns, 3] as bytes"),
        "credit": ("str", "who made it, and its licence"),
    },
)

ATTENTION = Table(
    "attention",
    keys=_HEAD
    | {"image": EXAMPLES.keys["image"], "query": ("int64", "patch that looks, row by row from the top left, from 0")},
    values={
        "grid_rows": ("int64", "patches"),
        "grid_columns": ("int64", "patches"),
        "distance": ("float32", "nonlocality of this query: attended distance, patches"),
        "peak": ("float32", "its largest attention on a patch"),
        "weights": ("object", "its attention on each patch, over the largest, in 255ths: uint8 [patches] as bytes"),
    },
)

# The files of a study's folder.
STUDY = {
    "runs.csv": RUNS,
    "measurements.csv": MEASUREMENTS,
    "accuracy.csv": STUDY_ACCURACY,
    "steps.csv": STEPS,
    "nonlocality.parquet": NONLOCALITY,
    "layer_images.parquet": LAYER_IMAGES,
    "spectrum.parquet": SPECTRUM,
    "spectrum_summary.parquet": SPECTRUM_SUMMARY,
    "transfer.parquet": TRANSFER,
    "transfer_locality.csv": TRANSFER_LOCALITY,
    "attention.parquet": ATTENTION,
    "examples.parquet": EXAMPLES,
}

CLAIMS = Table(
    "claims",
    keys={
        "claim": ("str", "C1 to C8; C2*, a control"),
        "part": ("str", "what of it; empty: the claim as a whole"),
    },
    values={
        "statistic": ("str", "what was computed, decided before looking; positive is what the paper says"),
        "unit": ("str", "of value and intervals"),
        "value": ("float64", "mean over seeds"),
        "low": ("float64", "lower end of the 95 % interval over seeds, for all parts of the claim at once"),
        "high": ("float64", "its upper end"),
        "low_images": ("float64", "lower end of the 95 % interval over images; empty where there is none"),
        "high_images": ("float64", "its upper end"),
        "margin": ("float64", "smallest effect that matters, unit of value; empty where the rule has none"),
        "power": ("float64", "chance that so many seeds of this spread show an effect twice the margin, 0 to 1"),
        "seeds": ("int64", "pairs or runs that the interval is over"),
        "images": ("int64", "test images of each network"),
        "scale": ("str", "paper | learned | small | demo"),
        "verdict": ("str", "holds | does not hold | no effect that matters | undecided at this scale"),
        "reason": ("str", "what the verdict rests on, or what was left out"),
    },
    added={"margin": math.nan, "power": math.nan},
)
