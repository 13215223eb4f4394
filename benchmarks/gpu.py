"""What a training step of paper size costs on a GPU, by precision, and what CUDA graphs and torch.compile would save.

    python benchmarks/gpu.py [--recipe paper-b10-10-baseline ...] [--variants float32 tf32 bf16 "bf16 graphs" ...] > gpu.csv

The network of a later task on noise under CIFAR-100's labels, with everything that the recipe does to a batch. Variants run
in turn in one process, a round of so many steps each. A row a recipe and variant: median ms a step, images/s, and of one
step the kernels that were launched and the times that the host waited; memory at its largest. In variants with `graphs` the
network's and the teacher's passes are CUDA graphs; with `compile` they are compiled, without stochastic depth, whose draws
torch.compile cannot be handed. Everything else stays as it is. The last column is the loss after all steps, of one batch.
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


class Kept(list):
    """What stochastic depth draws, in tensors that stay where they are, for a graph reads the same memory at every step."""

    def __init__(self, buffers):
        super().__init__(buffers)
        self.written = self.read = 0

    def append(self, kept):
        self[self.written % len(self)].copy_(kept)
        self.written += 1

    def pop(self, _):
        self.read += 1
        return self[(self.read - 1) % len(self)]


def graphed(learner, batch) -> None:
    """The passes of network and teacher as CUDA graphs. The teacher then sees all images, and the rows to distil are taken."""
    x = torch.randn(len(batch), 3, 32, 32, device="cuda")
    for path in {path for path, _ in learner.drop_paths}:
        shapes = [shape for its, shape in learner.drop_paths if its is path]
        path.kept = Kept([torch.ones(len(batch) * shape[0], *shape[1:], device="cuda") for shape in shapes])
    with torch.autocast("cuda", torch.bfloat16, enabled=learner.run.amp == "bf16", cache_enabled=False):
        learner.outputs = torch.cuda.make_graphed_callables(learner.outputs, (x,))
        learner.teacher = Whole(torch.cuda.make_graphed_callables(learner.teacher, (x.clone(),)), len(x))


class Whole(torch.nn.Module):
    """A network that is shown batches of one size: fewer rows are padded."""

    def __init__(self, model, rows: int):
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self, x):
        return self.model(torch.nn.functional.pad(x, (0,) * 7 + (self.rows - len(x),)))[: len(x)]


def compiled(learner, batch) -> None:
    for path, _ in learner.drop_paths:
        path.p = 0.0
    learner.drop_paths = []
    learner.outputs, learner.teacher = torch.compile(learner.outputs), Whole(torch.compile(learner.teacher), len(batch))


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


def kernels(work) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.profiler.DeviceType.CUDA)


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
    parser.add_argument("--variants", nargs="+", default=["float32", "tf32", "bf16", "float32 graphs", "bf16 graphs"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{processor('cuda')}, torch {torch.__version__}", file=sys.stderr)
    print("recipe,variant,ms a step,images/s,kernels,waits,GiB,loss", flush=True)
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
                        {"graphs": graphed, "compile": compiled}[change](learner, work.args[1])
                    seconds(work, 5)
                    torch.cuda.reset_peak_memory_stats()
                    facts[variant] = kernels(work), waits(work), f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
                except Exception as error:  # what cannot be captured is reported, and the others are measured
                    print(f"{name}, {variant}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
            ready[variant], taken[variant] = (work, run.matmul, learner), []
        for _ in range(args.rounds):
            for variant, (work, matmul, _) in ready.items():
                with repeatable("cuda", matmul):
                    taken[variant].append(seconds(work, args.steps))
        for variant, (work, _, learner) in ready.items():
            median, before = statistics.median(taken[variant]), learner.sums.clone()
            work()
            loss = (learner.sums - before)[0].item()
            row = (name, variant, f"{1e3 * median:.2f}", f"{args.batch / median:.0f}", *facts[variant], f"{loss:.5f}")
            print(",".join(map(str, row)), flush=True)


if __name__ == "__main__":
    main()
