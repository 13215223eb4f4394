"""What measuring costs over the plain forward pass: justifies the blocks of `locality_probe.record.Scores.visit`.

    python benchmarks/probe.py [--table time|memory] [--rounds 7] [--threads 1] [--bf16] [--only NAME]

plain: the model as it is, fused. d_loc: a Probe for D_loc and the prefix mass; all: for every measure. extract: timm's
AttentionExtract on a model that is not fused, and one einsum a layer, which is what there was. first: the first batch of a
Probe, with the passes that find where tokens are.
time: variants in turn in one process; median milliseconds, and medians of the ratios within a round.
memory: peak of a fresh process over its peak with the plain forward pass, which holds the weights too.
How exact it is, is in tests/test_probe.py.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from timm.utils import AttentionExtract

from locality_probe.measures import MEASURES, distances
from locality_probe.probe import Probe

MODELS = {  # name: (pixels, images)
    "vit_tiny_patch16_224": (224, 16),
    "vit_small_patch16_224": (224, 16),
    "vit_base_patch16_224": (224, 16),
    "vit_small_patch14_reg4_dinov2": (518, 4),
}
GOALS = {224: {"d_loc": 1.08, "all": 1.2}, 518: {"d_loc": 1.15, "all": 1.3}}  # times plain; ViT-B: 1.05 and 1.15


def make(name: str, fused: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    return model


def probed(model, images, measures):
    """A batch measured by a Probe that has seen such a batch before: places are observed once for each size of input."""
    probe = Probe(model, measures=measures).__enter__()
    probe.update(images)

    def run():
        probe._seen.clear()
        probe.update(images)
        probe.result()

    return run


def observed(model, images, measures) -> None:
    """The first batch, with the experiment that finds where tokens are."""
    with Probe(model, measures=measures) as probe:
        probe.update(images)


def variants(name: str, images: torch.Tensor, wanted: list[str]) -> dict:
    def extract(model=None):
        unfused = make(name, fused=False)
        maps = AttentionExtract(unfused, method="fx")
        grid, prefix = unfused.patch_embed.grid_size, unfused.num_prefix_tokens
        distance = distances(tuple(grid)).float()

        def run():
            for attention in maps(images).values():
                patches = attention[:, :, prefix:, prefix:]
                torch.einsum("bhqk,qk->bh", patches / patches.sum(-1, keepdim=True), distance) / math.prod(grid)

        return run

    model = make(name)
    every = {
        "plain": lambda: lambda: model(images),
        "d_loc": lambda: probed(model, images, ("d_loc", "prefix_mass")),
        "all": lambda: probed(model, images, MEASURES),
        "first": lambda: lambda: observed(model, images, ("d_loc", "prefix_mass")),
        "extract": extract,
    }
    return {key: every[key]() for key in wanted}


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def times(names: list[str], args) -> None:
    print(f"{'ms, then times plain; ! misses its goal':42}{'plain':>9}{'d_loc':>9}{'all':>9}{'extract':>9}{'first':>9}")
    for name in names:
        size, batch = MODELS[name]
        images = torch.randn(batch, 3, size, size)
        runs = variants(name, images, ["plain", "d_loc", "all", "extract", "first"])
        spent = {key: [] for key in runs}
        for turn in range(args.rounds + 1):
            for key, run in runs.items():
                began = time.perf_counter()
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                    run()
                if turn:
                    spent[key].append(1000 * (time.perf_counter() - began))
        cells = "".join(f"{statistics.median(t):>9.0f}" for t in spent.values())
        over = {key: ratio(t, spent["plain"]) for key, t in spent.items() if key != "plain"}
        marks = "  ".join(
            f"{key} {value:.2f}{'!' * (value > GOALS[size].get(key, math.inf))}" for key, value in over.items()
        )
        print(f"{name} {size} x {batch}".ljust(42) + cells, f" {marks}  extract / d_loc {over['extract'] / over['d_loc']:.2f}",
              flush=True)  # fmt: skip


def peak() -> float:
    """MiB (Linux)"""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak_of(name: str, variant: str) -> float:
    size, batch = MODELS[name]
    with torch.no_grad():
        (run,) = variants(name, torch.randn(batch, 3, size, size), [variant]).values()
        run()
        run()
    return peak()


def memory(names: list[str], args) -> None:
    print(f"{'MiB, then times plain':42}" + "".join(f"{key:>16}" for key in ("plain", "d_loc", "all", "extract")))
    for name in names:
        command = [sys.executable, __file__, "--threads", str(args.threads), "--peak", name]
        found = [float(subprocess.check_output([*command, v])) for v in ("plain", "d_loc", "all", "extract")]
        print(f"{name:42}" + "".join(f"{m:>9.0f} {m / found[0]:.2f}x " for m in found), flush=True)


TABLES = {"time": times, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_of(*args.peak))
        return
    for table in [args.table] if args.table else TABLES:
        TABLES[table](args.only or list(MODELS), args)
        print()


if __name__ == "__main__":
    main()
