"""Pictures on disk, as data sets of files have them."""

import numpy as np
from PIL import Image

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331"]


def picture(path, random):
    """A JPEG of 60 to 90 pixels a side with something on it at every scale."""
    w, h = random.integers(60, 91, 2)
    image = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=95)


def imagenet_like(root, per_class):
    """Files as ILSVRC2012 has them: {split: images of each of the 6 classes}."""
    random = np.random.default_rng(0)
    for split, n in per_class.items():
        for wnid in reversed(WNIDS):  # so that nothing is in order by chance
            for i in reversed(range(n)):
                picture(root / split / wnid / f"{wnid}_{i}.JPEG", random)
