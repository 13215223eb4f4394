"""What is measured: a network, where it stands among tasks, and how it takes an image."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cil import augment, checkpoint, data, foreign, models
from cil import weights as weights_of
from cil.checkpoint import RunDir
from cil.tables import AFTER
from locality_probe.hf import preprocessing
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
    grid: tuple[int, ...] | None = None  # where it is given
    num_prefix_tokens: int | None = None
    notes: tuple[str, ...] = ()  # what was read, left out or taken for granted, in sentences

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
        str(directory.run.without({"seed"})), directory.run.seed, at_step,
    )  # fmt: skip


def from_timm(
    name: str, weights: Path | None = None, pretrained: bool = False, seed: int = 0, image_size: int | None = None
) -> Subject:
    """A timm model with its own data config; from a file, from timm's hub, or untrained by `seed`.

    image_size: pixels of the square that it takes; position embeddings are resampled as timm does.
    Raises Typed for a name that timm does not know, and ValueError for weights or a size that do not fit.
    """
    import timm

    typed(models.check_timm, name)

    def make(size: int | None) -> nn.Module:
        options: dict[str, Any] = {} if size is None else {"img_size": size}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return fetched(name, lambda: timm.create_model(name, pretrained=pretrained, **options))

    if weights is None:
        model, said = make(image_size), []
    else:
        read = weights_of.read(weights)
        classifiers = getattr(timm.get_pretrained_cfg(name), "classifier", None) or "head"
        heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        model, said = weights_of.load(make, read, (*heads, "head", "fc")), read.said
        if image_size is not None:
            model = fetched(name, lambda: _resized(model, image_size))
    config = timm.data.resolve_model_data_config(model)
    if isinstance(size := getattr(getattr(model, "patch_embed", None), "img_size", None), tuple):
        config["input_size"] = (
            config["input_size"][0],
            *size,
        )  # of a network that was made for another size than its name's
    transform = timm.data.create_transform(**config, is_training=False)
    crop = [
        step
        for step in transform.transforms
        if "Tensor" not in type(step).__name__ and "Normalize" not in type(step).__name__
    ]

    def cut(image: Image.Image) -> Image.Image:
        image = data.trimmed(image)
        for step in crop:
            image = step(image)
        return image

    return Subject(name, name, "model", 0, model.eval(), cut, config["mean"], config["std"], notes=tuple(said))


def _resized(model: nn.Module, size: int) -> nn.Module:
    """A timm model, in place, for images of another size. Raises ValueError for one that is made for one size."""
    resize: Any = getattr(model, "set_input_size", None)
    if resize is None:
        raise ValueError("it cannot be given another image size than its weights have: leave --image-size away")
    resize(img_size=(size, size))
    return model


def from_torchvision(
    name: str, weights: Path | None = None, pretrained: bool = False, seed: int = 0, image_size: int | None = None
) -> Subject:
    """A torchvision model with the transforms of its default weights; from a file, from the hub, or untrained by `seed`.

    image_size: pixels of the square that it takes, of models that are made for one, with weights of that size.
    Raises Typed for a name that torchvision does not know, and ValueError for weights or a size that do not fit.
    """
    from torchvision.models import get_model, get_model_weights, list_models
    from torchvision.transforms import functional

    if name not in list_models():
        near = difflib.get_close_matches(name, list_models(), n=3)
        raise Typed(f"torchvision has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))

    def make(size: int | None) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            options = {} if image_size is None else {"image_size": image_size}
            return fetched(name, lambda: get_model(name, weights="DEFAULT" if pretrained else None, **options))

    read = None if weights is None else weights_of.read(weights)
    model = make(None) if read is None else weights_of.load(make, read, ("heads", "head", "fc", "classifier"))
    preset = get_model_weights(name).DEFAULT.transforms()
    if not hasattr(preset, "crop_size") or len(preset.crop_size) != 1 or len(preset.resize_size) != 1:
        raise ValueError(
            f"{name} takes videos, pairs or whole scenes, not images cut to a square: measure it in Python"
        )
    side, around = preset.crop_size[0], preset.resize_size[0]
    size = image_size or side

    def crop(image: Image.Image) -> Image.Image:
        resized = functional.resize(data.trimmed(image), [round(around * size / side)], preset.interpolation)
        return functional.center_crop(resized, [size])

    notes = () if read is None else tuple(read.said)
    return Subject(name, name, "model", 0, model.eval(), crop, tuple(preset.mean), tuple(preset.std), notes=notes)


def from_hf(place: str, weights: Path | None = None, pretrained: bool = False) -> Subject:
    """A HuggingFace vision model: a folder that save_pretrained wrote, or with `pretrained` a name on the hub.

    CLIP and SigLIP are their vision towers. Only safetensors are read, and no code that comes with a model. Images are scaled,
    cut and normalised as processor_config.json or preprocessor_config.json says; without one `notes` says what is done.
    Raises ValueError where transformers is not installed, for a folder without such a model or with tensors missing or not
    finite, and for `weights`.
    """
    if weights is not None:
        raise ValueError("hf/FOLDER brings its own weights: leave --weights away")
    try:
        import transformers
    except ImportError:
        raise ValueError("hf/... needs the package transformers: pip install 'locality-probe[hf]'") from None
    folder = Path(place)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _with_adapter(folder, pretrained)
    if not pretrained and not (folder / "config.json").is_file():
        raise ValueError(f"{place} is no folder with a config.json; --pretrained fetches hf/{place} from the hub")
    transformers.utils.logging.set_verbosity_error()
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    loaded: Any = fetched(place, lambda: transformers.AutoModel.from_pretrained(place, **options))
    model, info = loaded
    missing = sorted(name for name in info["missing_keys"] if not weights_of.HEADS.match(name.split(".", 1)[-1])
                     and not weights_of.HEADS.match(name))  # fmt: skip
    if missing:
        raise ValueError(f"{place} lacks {len(missing)} tensors of its model, like {missing[0]}, which would be random")
    bad = next(
        (name for name, p in model.state_dict().items() if p.is_floating_point() and not p.isfinite().all()), None
    )
    if bad is not None:
        raise ValueError(f"{place} holds NaN or infinite values in {bad}")
    model = getattr(model, "vision_model", model).eval()
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"{place} takes {model.main_input_name}, not images: measure it in Python, Probe(model, grid=(N,))"
        )
    frames = getattr(model.config, "num_frames", None) or getattr(model.config, "frames_per_clip", None)
    if frames:
        raise ValueError(f"{place} takes videos of {frames} frames: measure it in Python, Probe(model, grid=(T, H, W))")
    needs = [
        name for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name != "pixel_values"
    ]  # fmt: skip
    if needs:
        raise ValueError(f"{place} needs {' and '.join(needs)} besides images: measure it in Python, with a Probe")
    how = preprocessing(folder, model.config)
    name = folder.resolve().name if folder.is_dir() else place
    return Subject(name, name, "model", 0, model, how.crop, how.mean, how.std, notes=how.notes)


def _with_adapter(folder: Path, pretrained: bool) -> Subject:
    """The base model that a peft adapter's folder names, with the adapter in it, not merged.

    Raises ValueError where peft is not installed, and for a base or an adapter that is not there or does not fit.
    """
    try:
        import peft
    except ImportError:
        raise ValueError(f"{folder} holds an adapter, which needs the package peft: pip install peft") from None
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'adapter_config.json'} names no base_model_name_or_path") from None
    subject = from_hf(str(base), None, pretrained)
    model = fetched(str(folder), lambda: peft.PeftModel.from_pretrained(subject.model, str(folder)))
    name = folder.resolve().name
    notes = (*subject.notes, f"{name} is an adapter of {base}, whose weights are read too")
    return replace(subject, run=name, pair=name, model=model.eval(), notes=notes)


def from_open_clip(
    name: str, weights: Path | None = None, pretrained: bool = False, seed: int = 0, image_size: int | None = None
) -> Subject:
    """The image tower of an open_clip model, with its own preprocessing; from a file, from the hub, or untrained by `seed`.

    name: NAME, or NAME:FILE with a weights file. image_size: pixels of the square that it takes.
    Raises Typed for a name that open_clip does not know, and ValueError where it is not installed and for weights that do not
    fit.
    """
    try:
        import open_clip
    except ImportError:
        raise ValueError("open_clip/... needs the package open_clip_torch: pip install open_clip_torch") from None
    name, _, file = name.partition(":")
    if file and weights is not None:
        raise Typed(f"open_clip/{name}:{file} has its weights: leave --weights away")
    weights = Path(file) if file else weights
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise Typed(f"open_clip has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and not tags:
        raise ValueError(f"open_clip has no pretrained weights of {name}: leave --pretrained away, or give --weights")

    def make(size: int | None) -> nn.Module:
        size = size or image_size
        options = {} if size is None else {"force_image_size": size}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return fetched(
                name, lambda: open_clip.create_model(name, pretrained=tags[0] if pretrained else None, **options).visual
            )

    read = None if weights is None else weights_of.read(weights)
    model: Any = make(None) if read is None else weights_of.load(make, read, ("proj", "head"))
    size = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
    mean = getattr(model, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(model, "image_std", None) or open_clip.OPENAI_DATASET_STD
    notes = () if read is None else tuple(read.said)
    return Subject(name, name, "model", 0, model.eval(), lambda image: data.cover(image, size), mean, std, notes=notes)


def fetched(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Returns make(). Raises ValueError, in one sentence, for a model that cannot be fetched or read."""
    try:
        return make()
    except Exception as error:  # each library has classes of its own for what is wrong with a model's files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = "its weights cannot be fetched from here" if "urlopen" in reason else reason
        raise ValueError(f"{name} cannot be made: {reason}") from None


def from_model_option(
    option: str, weights: Path | None, pretrained: bool, warn: Callable[[str], None], image_size: int | None = None
) -> Subject:
    """The command line's --model LIBRARY/NAME. Raises Typed for another library, and for a name that it does not have."""
    library, name = split_model(option)
    if image_size is not None and not LIBRARIES[library].sized:
        raise Typed(f"--image-size does not go with {library}/, whose models say themselves how large their images are")
    size = {} if image_size is None else {"image_size": image_size}
    subject = LIBRARIES[library].maker()(name, weights, pretrained, **size)
    for sentence in subject.notes:
        warn(sentence)
    if weights is None and not pretrained and not LIBRARIES[library].trained and ":" not in name:
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
    return weights_of.read(path).state
