"""Image sets: resident ones (resident.py), decoded ones (decoded.py), image files (images.py), data sets (sources.py)."""

from cil.data.decoded import FileSet
from cil.data.images import (
    IMAGE_SUFFIXES,
    centre_crop,
    cover,
    image_files,
    open_image,
    passed_over,
    random_crop,
    read_images,
    to_pil,
    to_tensor,
    trimmed,
)
from cil.data.resident import ImageSet
from cil.data.sources import (
    CIFAR100_MEAN,
    CIFAR100_STD,
    DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Dataset,
    Source,
    cifar100,
    crop_for,
    digits,
    download_cifar100,
    folder,
    imagenet100,
    load,
    names,
)

__all__ = [
    "CIFAR100_MEAN", "CIFAR100_STD", "DATASETS", "IMAGENET_MEAN", "IMAGENET_STD", "IMAGE_SUFFIXES", "Dataset", "FileSet",
    "ImageSet", "Source", "centre_crop", "cifar100", "cover", "crop_for", "digits", "download_cifar100", "folder",
    "image_files", "imagenet100", "load", "names", "open_image", "passed_over", "random_crop", "read_images", "to_pil",
    "to_tensor", "trimmed",
]  # fmt: skip
