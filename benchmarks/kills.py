"""Kill -9 at random moments, the same command again, and whether what comes out is the undisturbed run, bit by bit.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--workers 2]

Small runs of every kind: the four systems with mixup, RandAugment and stochastic depth, a memory for each process, timm
backbones, LPA in one, one that starts from weights. Each is trained undisturbed, then by a process that is killed after a
random time, started again, and so on, until it is finished and there were enough kills. Weights, exemplars, accuracy and the
numbers of training are compared byte by byte. Prints one row per run; exits with 1 where a run differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from cil import fit, recipes
from cil.checkpoint import open_run
from cil.run import Run
from cil.train import train

CUT = {"epochs_first": 4, "epochs": 4, "finetune_epochs": 3, "images_per_class": 30, "num_classes": 6, "memory": 24}
HARD = CUT | {"rand_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "drop_path": 0.3, "flip": True}
TIMM = {"model": "timm/test_vit", "patch_size": 2}
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "baseline": ("demo-baseline", HARD),
    "baseline + LPA": ("demo-baseline-lpa", HARD),
    "DyTox": ("demo-dytox", HARD),
    "DyTox + LPA": ("demo-dytox-lpa", HARD | {"kd_rows": "all"}),
    "a memory for each process": ("demo-baseline-lpa", HARD | {"memory_mode": "per-process:2", "herding_crop": True}),
    "joint": ("demo-baseline-joint", HARD),
    "timm": ("demo-baseline", HARD | TIMM),
    "LPA in timm": ("demo-baseline", HARD | TIMM | {"n_lpa": 6}),
    "from weights": ("finetune-demo-baseline-lpa", {"epochs_first": 3, "epochs": 3, "finetune_epochs": 2}),
}


def child(run: Run, out: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    fit.SAVE_EVERY = 0.0
    train(run, out)


def start(run: Run, out: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=child, args=(run, out))
    process.start()
    return process


def contents(out: Path) -> dict[str, bytes]:
    """What has to be equal: files by name, and of training.csv all but the seconds."""
    found = {p.name: p.read_bytes() for p in (*out.glob("task_*"), *out.glob("memory/*"), out / "accuracy.csv")}
    training = open_run(out).table("training")
    assert training is not None
    return found | {"training.csv": training.drop(columns="seconds").to_csv().encode()}


def kill_often(name: str, kills: int, chance: random.Random, folder: Path) -> tuple[str, int, float, list[str]]:
    """The name, how often it was killed, seconds undisturbed, and the files that differ."""
    recipe, changes = KINDS[name]
    run = dataclasses.replace(recipes.find(recipe), **changes)
    began = time.monotonic()
    start(run, folder / "whole" / "run").join()
    seconds, done, turn = time.monotonic() - began, 0, 0
    differ: list[str] = []
    while done < kills:
        out, turn = folder / f"turn{turn}" / "run", turn + 1
        while True:
            process = start(run, out)
            process.join(chance.uniform(0, seconds) if done < kills else None)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            done += 1
        if process.exitcode:
            return name, done, seconds, [f"exit code {process.exitcode}"]
        first, second = contents(folder / "whole" / "run"), contents(out)
        differ += sorted(file for file in first.keys() | second.keys() if first.get(file) != second.get(file))
    return name, done, seconds, differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    each, wrong = -(-args.kills // len(KINDS)), 0
    print("run,kills,seconds undisturbed,differs")
    waiting, told = queue.SimpleQueue(), queue.SimpleQueue()
    for number, name in enumerate(KINDS):
        waiting.put((number, name))

    def work(folder: Path) -> None:
        while not waiting.empty():
            number, name = waiting.get()
            told.put(kill_often(name, each, random.Random(f"{args.seed} {name}"), folder / str(number)))

    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.workers):
            threading.Thread(target=work, args=(Path(folder),), daemon=True).start()
        for _ in KINDS:
            name, done, seconds, differ = told.get()
            wrong += bool(differ)
            print(f"{name},{done},{seconds:.1f},{' '.join(differ) or 'nothing'}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
