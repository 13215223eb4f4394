"""What is measured: a network, where it stands among tasks, and how it takes an image."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cil import augment, checkpoint, data, foreign, models
from cil.checkpoint import RunDir
from cil.tables import AFTER
from locality_probe.tables import INITIAL
from locality_probe.typed import LIBRARIES, Typed, split_model, typed


@dataclass(frozen=True)
class Subject:
    """One network at one task. `crop`: a Pillow image -> what the network sees of it; `normalize`: pixels -> its input."""

    run: str
    pair: str
    training: str
    task: int
    model: nn.Module
    crop: Callable[[Image.Image], Image.Image]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: str = ""  # of its run, less the seed: runs that share them are one experiment
    seed: int = 0
    at_step: int = AFTER  # of a checkpoint inside the task: the steps that the network has taken
    grid: tuple[int, ...] | None = None  # where the network does not tell
    num_prefix_tokens: int | None = None

    def preprocess(self, image: Image.Image) -> Tensor:
        """Any Pillow image -> float [3, H, W]."""
        pixels = data.to_tensor(self.crop(image.convert("RGB")))
        return augment.normalize(pixels[None], self.mean, self.std)[0]


def from_run(directory: RunDir, task: int, at_step: int = AFTER) -> Subject:
    """A checkpoint of a run: after a task, or inside it after `at_step` steps; task -1 is the run's network as initialised,
    from its seed, before task 0."""
    initial, crop = task == INITIAL, data.crop_for(directory.run.dataset)
    model = directory.new_model(directory.planned_tasks[0]).eval() if initial else directory.model(task, at_step)
    return Subject(
        directory.name, directory.twin_of or directory.name, directory.run.training, task, model,
        lambda image: crop(image, directory.image_size), directory.mean, directory.std,
        str(replace(directory.run, seed=0, data_dir="", recipe="", checkpoints="")), directory.run.seed, at_step,
    )  # fmt: skip


def from_timm(name: str, weights: Path | None = None, pretrained: bool = False, seed: int = 0) -> Subject:
    """A timm model with its own data config; from a file, from timm's hub, or untrained by `seed`.

    Raises Typed for a name that timm does not know, and ValueError for weights that do not fit.
    """
    import timm

    typed(models.check_timm, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fetched(name, lambda: timm.create_model(name, pretrained=pretrained))
    if weights is not None:
        checkpoint.load_weights(model, read_weights(weights), weights)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    crop = [
        step
        for step in transform.transforms
        if "Tensor" not in type(step).__name__ and "Normalize" not in type(step).__name__
    ]

    def cut(image: Image.Image) -> Image.Image:
        for step in crop:
            image = step(image)
        return image

    return Subject(name, name, "model", 0, model.eval(), cut, config["mean"], config["std"])


def from_torchvision(name: str, weights: Path | None = None, pretrained: bool = False, seed: int = 0) -> Subject:
    """A torchvision model with the transforms of its default weights; from a file, from the hub, or untrained by `seed`.

    Raises Typed for a name that torchvision does not know, and ValueError for weights that do not fit.
    """
    from torchvision.models import get_model, get_model_weights, list_models
    from torchvision.transforms import functional

    if name not in list_models():
        near = difflib.get_close_matches(name, list_models(), n=3)
        raise Typed(f"torchvision has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fetched(name, lambda: get_model(name, weights="DEFAULT" if pretrained else None))
    if weights is not None:
        checkpoint.load_weights(model, read_weights(weights), weights)
    preset = get_model_weights(name).DEFAULT.transforms()

    def crop(image: Image.Image) -> Image.Image:
        resized = functional.resize(image, preset.resize_size, preset.interpolation)
        return functional.center_crop(resized, preset.crop_size)

    return Subject(name, name, "model", 0, model.eval(), crop, tuple(preset.mean), tuple(preset.std))


def from_hf(place: str, weights: Path | None = None, pretrained: bool = False) -> Subject:
    """A HuggingFace vision model: a folder that save_pretrained wrote, or with `pretrained` a name on the hub.

    CLIP and SigLIP are their vision towers. Only safetensors are read, and no code that comes with a model. Images are
    scaled to config.image_size and normalised as preprocessor_config.json says, or else with ImageNet's mean and std.
    Raises ValueError where transformers is not installed, for a folder without such a model, and for `weights`.
    """
    if weights is not None:
        raise ValueError("hf/FOLDER brings its own weights: leave --weights away")
    try:
        import transformers
    except ImportError:
        raise ValueError("hf/... needs the package transformers: pip install 'locality-probe[hf]'") from None
    folder = Path(place)
    if not pretrained and not (folder / "config.json").is_file():
        raise ValueError(f"{place} is no folder with a config.json; --pretrained fetches hf/{place} from the hub")
    transformers.utils.logging.set_verbosity_error()
    model: Any = fetched(
        place, lambda: transformers.AutoModel.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
    )
    model = getattr(model, "vision_model", model).eval()
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"{place} takes {model.main_input_name}, not images: measure it in Python, Probe(model, grid=(N,))"
        )
    size, described = model.config.image_size, folder / "preprocessor_config.json"
    size = (size, size) if isinstance(size, int) else tuple(size)
    given = json.loads(described.read_text()) if described.is_file() else {}
    mean, std = given.get("image_mean", data.IMAGENET_MEAN), given.get("image_std", data.IMAGENET_STD)
    name = folder.resolve().name if folder.is_dir() else place
    return Subject(name, name, "model", 0, model, lambda image: data.cover(image, size), tuple(mean), tuple(std))


def fetched(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Returns make(). Raises ValueError, in one sentence, for a model that cannot be fetched or read."""
    try:
        return make()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} cannot be made: {reason}") from None


def from_model_option(option: str, weights: Path | None, pretrained: bool, warn: Callable[[str], None]) -> Subject:
    """The command line's --model LIBRARY/NAME. Raises Typed for another library, and for a name that it does not have."""
    library, name = split_model(option)
    subject = LIBRARIES[library].maker()(name, weights, pretrained)
    if weights is None and not pretrained and not LIBRARIES[library].trained:
        warn(f"{name} is untrained: without --weights or --pretrained its values are random (seed 0)")
    return subject


def from_file(path: Path) -> Subject:
    """A weights file: one of our runs' by the run.json beside it, else by the names of the LPA, DyTox and ConViT releases.

    Those train on CIFAR-100, or at 224 pixels on ImageNet, and images are taken as they do there.
    """
    if not path.is_file():
        raise ValueError(f"no weights file {path}")
    if is_task_of_run(path):
        directory = checkpoint.open_run(path.parent)
        for task in directory.planned_tasks:
            for at_step in [AFTER] * (task in directory.tasks) + directory.checkpoints(task):
                if directory.weights_path(task, at_step).name == path.name:
                    return from_run(directory, task, at_step)
        raise ValueError(f"{path} is none of the run's tasks {directory.tasks}, nor a checkpoint inside one")
    model, size = foreign.read(read_weights(path), path)
    mean, std, crop = data.CIFAR100_MEAN, data.CIFAR100_STD, data.cover
    if size == (224, 224):
        mean, std, crop = data.IMAGENET_MEAN, data.IMAGENET_STD, data.centre_crop
    task = len(getattr(model, "heads", [None])) - 1
    return Subject(path.stem, path.stem, "model", task, model, lambda image: crop(image, size), mean, std)


def is_task_of_run(path: Path) -> bool:
    """Whether a weights file lies in one of our run directories."""
    return path.suffix == ".safetensors" and (path.parent / "run.json").is_file()


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict, never unpickled. Raises ValueError for what is missing, empty, truncated or more than weights."""
    if not path.is_file():
        raise ValueError(f"no weights file {path}")
    return checkpoint.read_safetensors(path) if path.suffix == ".safetensors" else foreign.read_pth(path)
