"""One run on several processes: gradients summed in one piece after the backward pass, and by torch's buckets.

    python benchmarks/processes.py [--recipe paper-b10-10-baseline] [--batch 64] [--processes 2] [--rounds 7] [--steps 3]

The buckets are DistributedDataParallel's, which sums while the backward pass goes on, as training does. Both in turn in the
same processes (gloo, one thread each), a round of so many steps each, on noise under CIFAR-100's labels. Prints the median
seconds of a step, their ratio, and what the backward pass and the sum after it take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from training import TASK, prepare

from cil import parallel, recipes
from cil.device import processor


def sum_in_one_piece(model: torch.nn.Module) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def in_one_piece(learner, waited: list[float]) -> None:
    """From now on gradients are summed after the backward pass, before the optimiser's step."""

    def timed(*_) -> None:
        began = time.perf_counter()
        sum_in_one_piece(learner.model)
        waited.append(time.perf_counter() - began)

    learner.outputs = learner.outputs.module
    learner.optimizer.register_step_pre_hook(timed)


def work(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    torch.manual_seed(0)
    variants, waited = {}, []
    for name in ("buckets", "one piece"):
        torch.manual_seed(0)
        learner, _, draw = prepare(recipes.find(args.recipe), args.batch)
        if name == "one piece":
            in_one_piece(learner, waited)
        variants[name] = learner, draw()
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(args.rounds + 1):
        for name, (learner, batch) in variants.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(args.steps):
                mine = batch[parallel.rows(len(batch))]
                learner.step(mine, learner.dataset.train.labels[batch], ("benchmark", TASK))
            dist.barrier()
            if turn:
                taken[name].append((time.perf_counter() - began) / args.steps)
    if rank == 0:
        weights = [next(learner.model.parameters()).sum().item() for learner, _ in variants.values()]
        medians = {name: statistics.median(times) for name, times in taken.items()}
        print(f"{processor('cpu')}, {args.processes} processes, {args.recipe}, batch {args.batch}")
        for name, seconds in medians.items():
            print(f"{name}: {seconds:.3f} s a step")
        print(f"buckets over one piece: {medians['buckets'] / medians['one piece']:.3f}")
        print(
            f"the sum in one piece takes {statistics.median(waited):.4f} s; weights apart by {abs(weights[0] - weights[1]):.1e}"
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper-b10-10-baseline")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--port", type=int, default=29617)
    args = parser.parse_args()
    multiprocessing.spawn(work, args=(args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
