"""What a training step of paper size costs on a GPU, by precision, and what CUDA graphs and torch.compile would save.

    python benchmarks/gpu.py [--recipe paper-b10-10-baseline ...] [--variants float32 tf32 bf16 "bf16 launched" ...] > gpu.csv

The network of a later task on noise under CIFAR-100's labels, with everything that the recipe does to a batch. Variants run
in turn in one process, a round of so many steps each. One row per recipe and variant: median ms per step, images/s, and of one
step the kernels that run and their time, the times that the host waited and how long it was busy; memory at its largest. A
step is a CUDA graph, as in training; in variants with `launched` its kernels are launched one by one, and in those with
`compile` the network's passes are compiled by torch.compile. The last column is the loss after all steps, of one batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
import warnings

import torch
from training import prepare

from cil import recipes
from cil.device import processor, repeatable

PRECISIONS = {"float32": {}, "tf32": {"matmul": "tf32"}, "bf16": {"amp": "bf16"}}


def launched(learner) -> None:
    learner.replay.possible = False


def compiled(learner) -> None:
    learner.outputs = torch.compile(learner.outputs)


def step(learner, chosen) -> None:
    learner.step(chosen, learner.dataset.train.labels[chosen], ("benchmark", 0))


def seconds(work, steps: int) -> float:
    """Of a step, with the host's part: from an idle GPU to an idle GPU."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def kernels(work) -> tuple[int, str]:
    """How many, and their milliseconds together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_type == torch.profiler.DeviceType.CUDA]
    return sum(e.count for e in events), f"{sum(e.self_device_time_total for e in events) / 1e3:.2f}"


def host(work, steps: int = 10) -> float:
    """Milliseconds of the host for a step, while the GPU is behind."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    taken = time.perf_counter() - began
    torch.cuda.synchronize()
    return 1e3 * taken / steps


def gigabytes() -> float:
    return torch.cuda.max_memory_reserved() / 2**30


def waits(work) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["paper-b10-10-baseline"])
    parser.add_argument(
        "--variants", nargs="+", default=["float32", "tf32", "bf16", "float32 launched", "bf16 launched"]
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{processor('cuda')}, torch {torch.__version__}", file=sys.stderr)
    print("recipe,variant,ms per step,images/s,kernels,their ms,waits,host ms,GiB,loss", flush=True)
    for name in args.recipe:
        ready, taken, facts = {}, {}, {}
        for variant in args.variants:
            precision, *changes = variant.split()
            run = dataclasses.replace(recipes.find(name), **PRECISIONS[precision])
            torch.manual_seed(0)
            with repeatable("cuda", run.matmul):
                learner, _, draw = prepare(run, args.batch, "cuda")
                work = functools.partial(step, learner, draw())
                try:
                    for change in changes:
                        {"launched": launched, "compile": compiled}[change](learner)
                    seconds(work, 5)
                    torch.cuda.reset_peak_memory_stats()
                    facts[variant] = *kernels(work), waits(work), f"{host(work):.2f}", f"{gigabytes():.2f}"
                except Exception as error:  # what cannot be captured is reported, and the others are measured
                    print(f"{name}, {variant}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
            ready[variant], taken[variant] = (work, run.matmul, learner), []
        for _ in range(args.rounds):
            for variant, (work, matmul, _) in ready.items():
                with repeatable("cuda", matmul):
                    taken[variant].append(seconds(work, args.steps))
        for variant, (work, matmul, learner) in ready.items():
            median, before = statistics.median(taken[variant]), learner.sums.clone()
            with repeatable("cuda", matmul):
                work()
            loss = (learner.sums - before)[0].item()
            row = (name, variant, f"{1e3 * median:.2f}", f"{args.batch / median:.0f}", *facts[variant], f"{loss:.5f}")
            print(",".join(map(str, row)), flush=True)


if __name__ == "__main__":
    main()
