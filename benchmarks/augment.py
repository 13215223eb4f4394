"""How fast are cil.draws and cil.augment, in images a second on one thread, next to timm and torchvision on one
PIL image at a time?

    OMP_NUM_THREADS=1 python benchmarks/augment.py [--rounds 21] [--batch 256]

All variants run in this process, in turn within each round; the table holds medians over the rounds and, for each
batched variant, the median over rounds of its ratio to the PIL variant that does the same. Images are 32 x 32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cil import augment, draws

SPEC = "rand-m9-mstd0.5-inc1"
MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)


def smooth_images(count: int) -> torch.Tensor:
    """uint8 [count, 3, 32, 32], as smooth as photographs."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, 32, mode="bilinear").to(torch.uint8)


def variants(batch: int) -> dict[str, Callable[[], object]]:
    images, labels = smooth_images(batch), torch.arange(batch) % 100
    generator = torch.Generator().manual_seed(0)

    def crop_flip() -> torch.Tensor:
        x = augment.crop(images, draws.crop_offsets(batch, 4, generator), 4)
        return augment.flip(x, draws.flips(batch, generator))

    def rand_augment_of(x: torch.Tensor) -> torch.Tensor:
        return augment.rand_augment(x, draws.operations(batch, augment.parse(SPEC), generator))

    def full() -> tuple[torch.Tensor, torch.Tensor]:
        x = augment.normalize(rand_augment_of(crop_flip()), MEAN, STD)
        return augment.mixup(x, labels, 100, draws.mixup_lambda(0.8, generator), 0.1)

    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pil_crop_flip = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
    training = create_transform(32, is_training=True, auto_augment=SPEC, interpolation="bicubic")
    rand_augment = next(t for t in training.transforms if isinstance(t, auto_augment.RandAugment))
    for op in rand_augment.ops:
        if op.name == "PosterizeIncreasing":  # newer Pillows refuse timm's 0 bits
            op.aug_fn = lambda image, bits, **_: auto_augment.posterize(image, max(bits, 1))
    pil_full = transforms.Compose(
        [pil_crop_flip, rand_augment, transforms.ToTensor(), transforms.Normalize(MEAN, STD)],
    )
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=100)
    return {
        "crop, flip: batched": crop_flip,
        "crop, flip: PIL": lambda: [np.asarray(pil_crop_flip(image)) for image in pil],
        "all: batched": full,
        "all: PIL": lambda: mixup(torch.stack([pil_full(image) for image in pil]), labels),
        "rand_augment: batched": lambda: rand_augment_of(images),
        "rand_augment: PIL": lambda: [rand_augment(image) for image in pil],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)

    runs = variants(arguments.batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for counted in [False] * 2 + [True] * arguments.rounds:  # two rounds to warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if counted:
                seconds[name].append(time.perf_counter() - start)

    print(f"{'':24}{'ms a batch':>12}{'images / s':>12}{'x PIL':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        reference = seconds[name.replace("batched", "PIL")]
        ratio = statistics.median(r / t for r, t in zip(reference, times, strict=True))
        print(f"{name:24}{1000 * median:12.2f}{arguments.batch / median:12.0f}{ratio:8.1f}")


if __name__ == "__main__":
    main()
