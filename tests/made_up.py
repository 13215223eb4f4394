"""A made-up study, without any training: tables whose every number is a formula, so that tests know what must come out."""

import json

import numpy as np
import pandas as pd

from cil import recipes
from locality_probe.tables import INITIAL, STUDY

TASKS, LAYERS, HEADS, IMAGES, DIM = 4, 3, 2, 8, 6
GRID = (2, 2)
UNIFORM = 0.854
SYSTEMS = ("baseline", "baseline-lpa", "dytox", "dytox-lpa")


GROWTH = {"incremental": 0.01, "joint": 0.005, "joint-as-long": 0.015}  # patches a task, times layer + 1
STEPS = {"incremental": 100, "joint": 200, "joint-as-long": 99}  # in all


def d_loc(
    lpa: bool, seed: int, task: int, layer: int, head: int = 0, image: int = 0, training: str = "incremental"
) -> float:
    """Grows by GROWTH; LPA is 0.3 lower and grows twice as fast."""
    growth = GROWTH[training] * (layer + 1) * max(task, 0) * (2 if lpa else 1)
    wobble = 0.001 * ((seed * 7 + layer * 3) % 5) + 0.002 * (image % 3) + 0.01 * head
    return 0.6 - 0.3 * lpa + 0.02 * layer + growth + wobble


def accuracy(lpa: bool, joint: bool, seed: int, task: int, on_task: int) -> float:
    """Falls by 0.05 a later task, a little less with LPA; joint forgets nothing."""
    lost = 0 if joint else (0.05 - 0.01 * lpa) * (task - on_task)
    return 0.8 - lost + 0.02 * lpa + 0.001 * seed


def make(
    seeds: int = 3, joint: bool = True, lambdas=(0.002, 0.02, 1.0), layers: bool = True
) -> dict[str, pd.DataFrame]:
    """All tables of STUDY: four systems and their joint twins, both sweeps (seed by seed), on the demo's setting."""
    tables = {file: [] for file in STUDY}
    names = [(s, t) for s in SYSTEMS for t in (["incremental", "joint"] if joint else ["incremental"])]
    names += [(s, "joint-as-long") for s in SYSTEMS[:2] if joint]
    names += [(f"baseline-lambda-{v:g}", "incremental") for v in lambdas if v != 0.02]
    names += [(f"baseline-nlpa-{n}", "incremental") for n in range(1, LAYERS)] if layers else []
    for system, training in names:
        for seed in range(seeds):
            add(tables, system, training, seed)
    tables["examples.parquet"] = [{"image": "digit 3", "rows": 8, "columns": 8, "rgb": bytes(192), "credit": "made up"}]
    return {
        file: STUDY[file].check(pd.DataFrame(rows, columns=list(STUDY[file].columns))) for file, rows in tables.items()
    }


def add(tables: dict[str, list], system: str, training: str, seed: int) -> None:
    suffix = "" if training == "incremental" else f"-{training}"
    name, joint = f"demo-{system}-s{seed}{suffix}", training != "incremental"
    tasks = [TASKS - 1] if training == "joint-as-long" else range(TASKS)
    run = recipes.find(f"demo-{system}{suffix}")
    lpa, more = (
        run.n_lpa > 0,
        0.01 * (run.n_lpa - LAYERS) * (run.n_lpa > 0) - 0.01 * abs(np.log10(run.lambda_init / 0.02)),
    )
    settings = run.to_dict() | {"data_dir": "", "seed": seed}
    tables["runs.csv"].append({
        "run": name, "scale": "demo", "setting": "", "system": system, "method": run.method, "n_lpa": run.n_lpa,
        "lpa_blocks": LAYERS, "lambda_init": run.lambda_init, "training": training, "seed": seed, "tasks": len(tasks),
        "classes": 2 * TASKS, "steps": STEPS[training], "images": 3200, "seconds": 10.0, "git": "abc", "torch": "2",
        "trainer": 2, "device": "cpu",
        "settings": json.dumps(settings),
    })  # fmt: skip
    usual = system in SYSTEMS
    more_kinds = ["spectrum", "transfer"] + ["attention"] * (not seed) if training != "joint-as-long" else []
    for kind in ["accuracy"] + ["nonlocality", *more_kinds] * usual:
        tables["measurements.csv"].append({"run": name, "kind": kind, "images": IMAGES, "source": "digits, test",
                                           "sha256": "f" * 64, "git": "abc", "seconds": 1.0})  # fmt: skip
    for task in tasks:
        taken = {"joint": 20 * (task + 1), "incremental": 25 * (task + 1), "joint-as-long": STEPS[training]}
        tables["steps.csv"].append({"run": name, "task": task, "steps": taken[training]})
        for on_task in range(task + 1):
            share = accuracy(lpa, joint, seed, task, on_task) + more
            tables["accuracy.csv"].append({"run": name, "task": task, "on_task": on_task, "images": 1000,
                                           "correct": round(1000 * share), "accuracy": round(1000 * share) / 1000})  # fmt: skip
    if not usual:
        return
    key = {"run": name}
    for task in [INITIAL, *tasks]:
        for layer in range(LAYERS):
            for image in range(IMAGES):
                mean = np.mean([d_loc(lpa, seed, task, layer, h, image, training) for h in range(HEADS)])
                tables["layer_images.parquet"].append(
                    {**key, "task": task, "at_step": -1, "layer": layer, "image": image, "d_loc": mean}
                )
            for head in range(HEADS):
                mean = np.mean([d_loc(lpa, seed, task, layer, head, image, training) for image in range(IMAGES)])
                tables["nonlocality.parquet"].append({
                    **key, "task": task, "at_step": -1, "layer": layer, "head": head, "pair": name.removesuffix(suffix),
                    "training": training, "kind": "LPA" if lpa else "GPSA", "extent": "grid", "images": IMAGES,
                    "d_loc": mean, "d_loc_sd": 0.1, "d_uniform": UNIFORM, "d_ratio": mean / UNIFORM,
                })  # fmt: skip
        values = (2.0 if lpa else 1.0) * 0.5 ** np.arange(DIM) ** (0.5 if lpa else 1.0)
        place = {**key, "task": task, "layer": "token", "group": "all"}
        for rank, value in enumerate(values):
            tables["spectrum.parquet"].append(
                {**place, "rank": rank, "eigenvalue": value, "eigenvalue_normalised": value / values.sum()}
            )
        tables["spectrum_summary.parquet"].append({
            **place, "pair": name, "training": training, "images": IMAGES, "dimension": DIM, "trace": values.sum(),
            "effective_rank": 4.0 if lpa else 3.0, "participation_ratio": 2, "spectral_ratio": 2, "rankme": 3, "slope": -1,
            "slope_first_rank": 1, "slope_last_rank": 3, "mp_edge": 1, "above_edge": 1, "reliable": "true",
        })  # fmt: skip
    if training == "joint-as-long":
        return
    for task in range(TASKS - 1):
        for layer in range(LAYERS):
            for control, share in (("none", 0.6 - 0.1 * layer - 0.01 * seed), ("initial", 0.3)):
                tables["transfer.parquet"].append({
                    **key, "task": task, "layer": f"block {layer}", "group": "future", "control": control,
                    "probe": "linear", "pair": name, "training": training, "classes": 2, "train_images": 8,
                    "test_images": IMAGES, "accuracy": share, "low": share - 0.1, "high": share + 0.1, "chance": 0.5,
                })  # fmt: skip
    if seed:
        return
    n = GRID[0] * GRID[1]
    for task in range(TASKS):
        for layer in range(LAYERS):
            for head in range(HEADS):
                for query in range(n):
                    weights = np.full(n, 51, np.uint8)
                    weights[query] = 255
                    tables["attention.parquet"].append({
                        **key, "task": task, "layer": layer, "head": head, "image": "digit 3", "query": query,
                        "grid_rows": GRID[0], "grid_columns": GRID[1], "distance": 0.4 + 0.1 * task + 0.01 * query,
                        "peak": 0.5, "weights": weights.tobytes(),
                    })  # fmt: skip
