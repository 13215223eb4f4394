"""What training costs beyond the bare network, and whether two runs are faster side by side or one after the other.

    python benchmarks/training.py [--recipe paper-b10-10-baseline] [--batch 64] [--rounds 5] [--threads 2] [--bf16]
    python benchmarks/training.py --side-by-side [--recipe small-b10-10-baseline] [--seconds 20]

The first takes the network of a later task and, in turn in one process, steps on a resident float batch with nothing but
classification (bare), and with everything the recipe has: crop, flip, RandAugment, mixup, teacher, distillation, on images
of which as many are old as in training. Prints median images/s and their ratio.
The second measures images/s of two processes with one thread each at the same time, and of one with two threads, in turn.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import multiprocessing
import statistics
import time

import torch

from cil import checkpoint, losses, recipes
from cil.data import CIFAR100_MEAN, CIFAR100_STD, Dataset, ImageSet
from cil.fit import Learner, freeze, frozen_parts
from cil.schedule import plan
from cil.train import in_class_order

TASK = 5


def images(per_class: int) -> Dataset:
    """Noise under CIFAR-100's labels: what a step costs does not depend on what is in the picture."""
    labels = torch.arange(100).repeat_interleave(per_class)
    pixels = torch.randint(256, (len(labels), 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = ImageSet(pixels, labels)
    return Dataset(whole, whole, [str(c) for c in range(100)], CIFAR100_MEAN, CIFAR100_STD)


def prepare(run, batch: int, device: str = "cpu"):
    """A learner in the main phase of a later task, and batches of that phase in which old images have their share."""
    dataset = images(run.images_per_class or 500)
    directory = checkpoint.describe("run", run, dataset)
    dataset = in_class_order(dataset, directory).to(device)
    phase = next(p for p in plan(directory, dataset) if (p.name, p.task) == ("fit", TASK))
    model, teacher = (
        directory.grown_model(TASK).to(device),
        directory.grown_model(TASK - 1).eval().to(device).requires_grad_(False),
    )
    freeze(model, frozen_parts(directory, phase))
    learner = Learner(directory, dataset, model, teacher, TASK, device)
    bare = Learner(directory, dataset, copy.deepcopy(model), None, TASK, device)
    new = directory.scenario[TASK].select(dataset.train.labels)
    old = directory.scenario[:TASK].select(dataset.train.labels)
    order = torch.cat([new, old[torch.randperm(len(old))[: phase.images - len(new)]]])
    return learner, bare, lambda: order[torch.randperm(len(order))[:batch]]


def everything(learner: Learner, chosen) -> None:
    train = learner.dataset.train
    learner.step(chosen, train.labels[chosen], ("benchmark", 0))


def resident(learner: Learner, x, targets) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=learner.run.amp == "bf16"):
        logits = learner.model(x)
    learner.optimizer.zero_grad(set_to_none=True)
    losses.classification(logits, targets).backward()
    learner.optimizer.step()


def compare(run, batch: int, rounds: int) -> None:
    learner, bare, draw = prepare(run, batch)
    x, targets = torch.randn(batch, 3, 32, 32), torch.rand(batch, learner.num_classes)
    taken = {"bare": [], "everything": []}
    for turn in range(rounds + 1):
        for name, work in {
            "bare": lambda: resident(bare, x, targets),
            "everything": lambda: everything(learner, draw()),
        }.items():
            began = time.perf_counter()
            work()
            if turn:
                taken[name].append(time.perf_counter() - began)
    rates = {name: batch / statistics.median(times) for name, times in taken.items()}
    ratio = statistics.median(b / e for b, e in zip(*taken.values(), strict=True))
    print(f"{run.recipe}, {run.amp}, batch {batch}: bare {rates['bare']:.1f}, everything {rates['everything']:.1f} images/s; "
          f"everything / bare {ratio:.3f}")  # fmt: skip


def train_for(run, threads: int, seconds: float, ready, told) -> None:
    torch.set_num_threads(threads)
    learner, _, draw = prepare(run, run.batch_size)
    everything(learner, draw())
    ready.wait()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        everything(learner, draw())
        steps += 1
    told.put(steps * run.batch_size / (time.perf_counter() - began))


def rate(run, processes: int, threads: int, seconds: float) -> float:
    """Images/s of all processes together."""
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=train_for, args=(run, threads, seconds, ready, told)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    total = sum(told.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    run = recipes.find(args.recipe or ("small" if args.side_by_side else "paper") + "-b10-10-baseline")
    if args.bf16:
        run = dataclasses.replace(run, amp="bf16")
    if not args.side_by_side:
        torch.set_num_threads(args.threads)
        compare(run, args.batch, args.rounds)
        return
    ratios = []
    for _ in range(3):
        beside, alone = rate(run, 2, 1, args.seconds), rate(run, 1, 2, args.seconds)
        ratios.append(beside / alone)
        print(f"two with one thread {beside:.0f} images/s, one with two threads {alone:.0f}: {ratios[-1]:.2f}")
    print(f"{run.recipe}: side by side {statistics.median(ratios):.2f} times as fast")


if __name__ == "__main__":
    main()
