"""The first steps of every CIFAR-100 recipe that `reproduce --scale paper` trains, at full size: batch 256, all images.

    python benchmarks/first_steps.py --data data [--steps 20] [--only dytox] [--workers 2] [--device cpu] > first_steps.csv

Each goes through cil.train.train as a whole run would, in a process of its own, and is stopped after so many steps. A row a
recipe: parameters, images/s (without the first step, which warms up), the loss at the first and the last step, peak memory
of the process. A loss that is not finite ends with what train says. ImageNet-100 is left out: it needs the user's images.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from cil import checkpoint, recipes
from cil.session import Progress
from cil.train import train
from figures.paper.plan import jobs_of, needs


class Enough(Exception):
    """So many steps were asked for."""


def first_steps(recipe: str, steps: int, data_dir: str, device: str, threads: int) -> str:
    torch.set_num_threads(threads)
    run, seen, times = replace(recipes.find(recipe), data_dir=data_dir), [], []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        times.append(time.perf_counter())
        if len(seen) == steps:
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Enough):
            train(run, Path(folder) / "run", device, stop)
        if [progress.done for progress in seen] != list(range(1, steps + 1)):
            raise RuntimeError(f"{recipe}: {len(seen)} of {steps} steps were taken")
        parameters = sum(p.numel() for p in checkpoint.open_run(Path(folder) / "run").new_model(0).parameters())
    rate = sum(progress.images for progress in seen[1:]) / (times[-1] - times[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    return f"{recipe},{steps},{seen[0].total},{parameters},{rate:.1f},{seen[0].loss:.4f},{seen[-1].loss:.4f},{peak:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="recipes with this in their name")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    jobs = jobs_of(needs("paper")["report"], Path("runs"), args.data)
    names = dict.fromkeys(job.run.recipe for job in jobs.values() if job.run.dataset == "cifar100")
    names = [name for name in names if args.only in name]
    print("recipe,steps,steps_of_the_run,parameters,images_per_second,first_loss,last_loss,peak_gib", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, max_tasks_per_child=1) as pool:
        waiting = [pool.submit(first_steps, name, args.steps, args.data, args.device, args.threads) for name in names]
        for done, future in enumerate(as_completed(waiting), 1):
            print(future.result(), flush=True)
            print(f"{done} of {len(names)}", file=sys.stderr)


if __name__ == "__main__":
    main()
