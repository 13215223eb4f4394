"""Runs the experiment of experiment.py on a model's own inputs, and keeps where the tokens of each layer are."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from locality_probe.record.experiment import Experiment, Seen, along, changed, sum_of
from locality_probe.record.links import Inputs, Links
from locality_probe.record.packs import Pack, pack_of
from locality_probe.record.places import BLURRED, Declared, Placed, declared_by, place, place_unseen
from locality_probe.record.sighting import Sighting

PASSES = (
    8,
    50,
)  # at most, for layers whose tokens are not clear after two: few channels need many draws of noise, and have
PIXELS = 25 * 224 * 224  # small images mostly; of larger ones as many passes as make up these pixels, and 8 at least
CLEAR = 0.03  # of the usual spacing: what is seen this sharply and is still not regular will not become so
HALF = (torch.float16, torch.bfloat16)
NAMES = (
    "pixel_values",
    "images",
    "image",
    "pixel_values_videos",
    "video",
)  # of inputs that are images before any other

Grids = dict[str, tuple[int, ...]]  # prefix of a module's name -> grid


class Observer:
    """Where the tokens of each layer are, for inputs like these: `places[name]`, or the reason why that is not known."""

    def __init__(self, model: nn.Module, grid: tuple[int, ...] | Grids | None, num_prefix_tokens: int | None):
        self.model, self.grid, self.num_prefix_tokens = model, grid, num_prefix_tokens
        self.places: dict[str, Placed | str] = {}
        self.why = ""  # why no experiment could be made
        self.key: object = None

    def given(self, name: str) -> Declared:
        """What was given by hand for a layer: for all, or for the tower whose name its own begins with."""
        if not isinstance(self.grid, dict):
            return Declared(self.grid and tuple(self.grid), self.num_prefix_tokens)
        towers = [tower for tower in self.grid if name == tower or name.startswith(tower + ".")]
        grid = tuple(self.grid[max(towers, key=len)]) if towers else None
        return Declared(grid, self.num_prefix_tokens if towers else None)

    def observe(self, inputs: tuple, named: dict, watch: Callable[[nn.Module, Experiment], Any]) -> None:
        """Make the experiment, unless it was made for inputs of this size: watch(model, experiment) is a watch on the model.

        Raises ValueError for packed patches that are not of the grids beside them.
        """
        pack = pack_of(self.model, inputs, named)
        image = image_of(inputs, named) if pack is None else pack.patches
        tensors = [] if image is None else [x for x in tensors_of(inputs, named) if x is not image and x.ndim]
        companions = [x for x in tensors if image is not None and len(x) == len(image)]
        key = None if image is None else (image.shape[1:], image.dtype, len(image) if companions else None)
        if key == self.key and key is not None and not companions and pack is None:
            return
        self.key, self.image, self.places, self.why = key, image, {}, ""
        if image is None:
            self.why = "there is no image among its inputs"
        elif not image.is_floating_point():
            self.why = "its image is of whole numbers, which cannot be changed a little"
        elif pack is not None and pack.flat:
            for row in range(len(pack)):
                self._experiment(_Call(image, inputs, named, watch, [row], pack))
        else:
            rows = list(range(len(image))) if companions or pack is not None else sorted({0, len(image) - 1})
            self._experiment(_Call(image, inputs, named, watch, rows, pack))

    def _experiment(self, call: _Call) -> None:
        """Add what is found of each layer to `places`: the calls of an image after those of the images before it."""
        try:
            with untouched(self.model) as model:
                if call.pack is not None and call.pack.flat:
                    found = self._passes(model, call, 1)
                else:
                    try:
                        found = self._passes(model, call, 0)
                    except Exception:
                        found = self._passes(model, call, len(call.image))
        except Exception as error:
            text = str(error).strip().splitlines()
            said = f" ({text[0][:120]})" if text else ""
            self.why = f"the experiment that finds its tokens stops in {type(error).__name__}{said}"
            return
        before = Counter(name.partition("#")[0] for name in self.places)
        for name, placed in found.items():
            module, _, number = name.partition("#")
            turn = int(number or 1) + before[module]
            self.places[module if turn == 1 else f"{module}#{turn}"] = placed

    def _passes(self, model: nn.Module, call: _Call, at_once: int) -> dict[str, Placed | str]:
        """Pass after pass, until it is clear where the tokens of each layer are, or will not become so."""
        first = call.run(model, Experiment(call.axes, at_once), 0)
        silent = [name for name, seen in first.items() if isinstance(seen, Seen) and seen.silent]
        linked = self._links(model, call, silent) if silent and not at_once else {}
        entered = {module for module, *_ in linked.values()}
        passes: list[dict[str, Seen | str]] = [] if linked else [first]

        def once_more() -> None:
            experiment = Inputs(call.axes, at_once, linked=linked) if linked else Experiment(call.axes, at_once)
            passes.append(call.run(model, experiment, len(passes), entered))

        while True:
            while len(passes) < max(2, len(call.rows)) or len(passes) % len(call.rows):
                once_more()
            places = self._place(passes, call)
            blurred = [name for name, placed in places.items() if placed in BLURRED and blur(passes, name) > CLEAR]
            fewest, most = PASSES
            if len(passes) >= max(fewest, min(most, PIXELS // call.pixels)) or not blurred:
                return places
            once_more()

    def _links(self, model: nn.Module, call: _Call, silent: list[str]) -> dict:
        """By layer: its module, and which of the module's input tokens its queries and its keys are of."""
        modules = {name or type(module).__name__: module for name, module in model.named_modules()}
        wanted = {modules[name.partition("#")[0]] for name in silent}
        links = Links()
        seen = call.run(model, links, 0, wanted)
        found = {}
        for name in silent:
            module, its = modules[name.partition("#")[0]], seen.get(name)
            if isinstance(its, Seen):
                found[name] = (module, links.tokens_of(its.query, module), links.tokens_of(its.key, module))
        return found

    def _place(self, passes: list[dict[str, Seen | str]], call: _Call) -> dict[str, Placed | str]:
        declared = declared_by(self.model, call.image)
        return {
            name: first
            if isinstance(first, str)
            else place(answers_of(passes, name), self.given(name), declared, call.sides)
            for name, first in passes[0].items()
        }

    def of(self, name: str, sighting: Sighting, images: int) -> Placed | str:
        """Where the tokens of a layer are."""
        if name in self.places:
            return self.places[name]
        why = self.why or "it did not attend when places were observed"
        given = self.given(name)
        said, how = (given, "given") if given.grid else (declared_by(self.model, self.image), "declared")
        said = Declared(
            said.grid, said.num_prefix_tokens if given.num_prefix_tokens is None else given.num_prefix_tokens
        )
        return place_unseen(sighting.shape, images, said, how, why)


@dataclass(frozen=True)
class _Call:
    """What the user gave to the model, and how the experiment calls it instead. rows: the images that it is made with; pack:
    what is known of them where `image` holds packed patches."""

    image: Tensor
    inputs: tuple
    named: dict
    watch: Callable[[nn.Module, Experiment], Any]
    rows: list[int]
    pack: Pack | None = None

    @property
    def axes(self) -> int:
        return 2 if self.pack is not None else len(axes_of(self.image))

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the input, in pixels, along the axes that noise grows along; 0 where that is not known."""
        return (0, 0) if self.pack is not None else tuple(self.image.shape[1 + axis] for axis in axes_of(self.image))

    @property
    def pixels(self) -> int:
        return self.image[0].numel() if self.pack is not None else self.image.shape[-2] * self.image.shape[-1]

    def run(
        self, model: nn.Module, experiment: Experiment, number: int, entered: Iterable[nn.Module] = ()
    ) -> dict[str, Seen | str]:
        """One pass over an image and its changed copies; `entered`: modules whose inputs the experiment is shown."""
        row = self.rows[number % len(self.rows)]
        image = self.image[row] if self.pack is None else self.pack.image(row)
        image = image.float() if image.dtype in HALF else image  # which could not hold so small a change
        if isinstance(experiment, Links):
            images = image[None].expand(experiment.batch, *image.shape)
        else:
            images = changed(image, self._parts(image, row), torch.Generator().manual_seed(number))

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            return experiment.enter(module, args, kwargs) if isinstance(experiment, (Links, Inputs)) else None

        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in entered]
        try:
            for some in images.split(experiment.at_once):
                torch.manual_seed(number)
                short = experiment.at_once - len(some)
                args, kwargs = self._instead(model, torch.cat([some, some[-1:].expand(short, *image.shape)]), row)
                with self.watch(model, experiment).watching(), torch.autocast(image.device.type, enabled=False):
                    model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return experiment.finish() if isinstance(experiment, Inputs) else experiment.seen

    def _parts(self, image: Tensor, row: int) -> list[Tensor]:
        """Along each axis, where what an input holds is, 0 to 1; NaN for padding. Each fits an image, [C, H, W] or [N, ...]."""
        if self.pack is not None:
            places = self.pack.places[row].to(image.device, image.dtype)
            return [places[:, d].view(-1, *[1] * (image.ndim - 1)) for d in range(2)]
        return [along(image, axis) for axis in axes_of(self.image)]

    def _instead(self, model: nn.Module, images: Tensor, row: int) -> tuple[tuple, dict]:
        """The inputs with these images; what else goes with image `row` is repeated."""
        flat = self.pack is not None and self.pack.flat
        count = len(self.image) if self.pack is None else len(self.pack)

        def instead(x: object) -> object:
            if isinstance(x, Tensor) and x is not self.image and x.ndim and len(x) == count:
                x = x[row : row + 1].expand(len(images), *x.shape[1:])
            if x is self.image:
                x = images.flatten(0, 1) if flat else images
            return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x

        return pytree.tree_map(instead, (self.inputs, self.named))


def tensors_of(inputs: tuple, named: dict) -> list[Tensor]:
    return [x for x in pytree.tree_leaves((inputs, named)) if isinstance(x, Tensor)]


def image_of(inputs: tuple, named: dict) -> Tensor | None:
    """The image or video among the inputs: by the usual names, else the first float tensor [B, C, H, W] or [B, ., ., H, W]."""
    candidates = [named[name] for name in NAMES if name in named] + tensors_of(inputs, named)
    for x in candidates:
        if isinstance(x, Tensor) and x.ndim in (4, 5) and (x.is_floating_point() or x.dtype == torch.uint8):
            return x
    return None


def axes_of(image: Tensor) -> tuple[int, ...]:
    """Along which dimensions of one input, without the batch, tokens may lie: rows and columns, of a video all four."""
    return (1, 2) if image.ndim == 4 else (0, 1, 2, 3)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """The model, or a copy in float32 of one in half precision; buffers and random numbers come back as they were."""
    half = any(p.dtype in HALF for p in model.parameters())
    used = copy.deepcopy(model).float() if half else model
    before = {} if half else {name: b.clone() for name, b in model.named_buffers()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield used
        finally:
            for name, b in {} if half else dict(model.named_buffers()).items():
                if name in before and b.shape == before[name].shape and not torch.equal(b, before[name]):
                    b.copy_(before[name])


def answers_of(passes: list[dict[str, Seen | str]], name: str) -> list[Seen]:
    """What a layer answered in each pass in which it attended."""
    return [seen for found in passes if isinstance(seen := found.get(name), Seen)]


def blur(passes: list[dict[str, Seen | str]], name: str) -> float:
    """The usual error of where a layer's tokens are seen, in spacings of as many in a square: half of the passes against
    the other half."""
    seen = answers_of(passes, name)
    halves = [[sum_of([getattr(s, side) for s in seen[start::2]]) for start in (0, 1)] for side in ("key", "query")]
    errors = [0.0]
    for one, other in halves:
        away = (one.places - other.places).abs()[one.answered & other.answered] / 2
        errors.append(
            away.median().item() * (one.strength.numel() / max(1, seen[0].shape[1])) ** 0.5 if len(away) else 0.0
        )
    return max(errors)
