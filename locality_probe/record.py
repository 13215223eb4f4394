"""Run a model once and see the attention of each layer at its real input, whatever the model, one layer at a time.

Layers that offer `attention_map` (ours) are asked. In any other model a TorchFunctionMode sees
`F.scaled_dot_product_attention` while it stays fused, nn.MultiheadAttention, and where a layer writes attention out, the
softmax that is then multiplied with the values.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from locality_probe.measures import uniform_nonlocality

CHUNK_BYTES = 64 * 2**20  # of attention in float32 that a measure sees at a time: whole images, at least one
BLOCK = 1_200_000  # numbers of attention at once where it is added up block by block: about a core's cache
BLOCK_ROWS = 128  # queries of a block, where all of them are too many
MAX_PREFIX = 16  # more tokens than this in front of the patches are not taken for class and register tokens


@runtime_checkable
class AttentionLayer(Protocol):
    """A layer that says what it attends to. K = num_prefix_tokens + the patches of grid, Q = K or tokens only."""

    grid: tuple[int, int]
    num_prefix_tokens: int

    def attention_map(self, *inputs: Tensor) -> Tensor:
        """The layer's own inputs, each [B, N, dim] -> [B, H, Q, K]"""


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model and what became of it: `status` is ok, or skipped with a `reason`.

    how: asked (by attention_map) | fused (scaled_dot_product_attention) | multihead (nn.MultiheadAttention) | written out
    extent: grid, of the whole image, or window: the grid is that of one window, and maps are [B * windows, H, Q, K]
    """

    index: int
    name: str
    kind: str
    num_heads: int
    queries: int
    grid: tuple[int, ...]
    num_prefix_tokens: int
    status: str = "ok"
    reason: str = ""
    how: str = ""
    extent: str = "grid"
    causal: bool = False

    @property
    def keys(self) -> int:
        return self.num_prefix_tokens + math.prod(self.grid)

    @property
    def between_patches(self) -> bool:
        """Whether patches are among the queries; not so where a class or task token alone looks at them."""
        return self.queries == self.keys

    @property
    def d_uniform(self) -> float:
        """D_loc of uniform attention here, in patches; under a causal mask, over the keys that it leaves."""
        return uniform_nonlocality(self.grid, self.causal)

    def skipped(self, reason: str) -> Layer:
        return replace(self, status="skipped", reason=reason)


@dataclass
class Recorded:
    """A layer, and the values that were read off it: tensors [B, ...], empty if the layer was skipped."""

    layer: Layer
    values: dict[str, Tensor] = field(default_factory=dict)


class Maps:
    """The attention of a layer in one forward pass, [B, H, Q, K], as part(images) -> float32 [b, H, Q, K]."""

    def __init__(self, part: Callable[[slice], Tensor], shape: tuple[int, ...]):
        self._part, self.shape = part, tuple(shape)

    def part(self, images: slice) -> Tensor:
        return self._part(images)

    def visit(self, visitor: Visitor) -> None:
        """Show all of it, block by block: whole images at a time are made, a block of queries at a time is shown."""
        batch, heads, queries, keys = self.shape
        step, rows = max(1, BLOCK // (heads * queries * keys)), _rows(queries, keys)
        for images in _slices(batch, step):
            attention = self.part(images)
            for some in _slices(queries, rows):
                visitor(attention[:, :, some].contiguous(), images, slice(0, heads), some.start)


class Scores(Maps):
    """The attention that F.scaled_dot_product_attention(query, key, value, ...) applies; scores are float32 at least."""

    def __init__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **_):
        self.query, self.key, self.value = query, key, value
        self.mask, self.causal = attn_mask, is_causal
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.shape = (*query.shape[:-1], key.shape[-2])
        # Where attention is worked out anyway, in the model's own precision, the kernel need not run too.
        own = query.dtype in (torch.float32, torch.float64) and query.device.type == "cpu" and dropout_p == 0
        self.replaces = own and len(query) == len(value) and query.ndim == 4 and not torch.is_grad_enabled()
        self.out: Tensor | None = None  # what the kernel would return, once `visit` has worked it out

    def part(self, images: slice) -> Tensor:
        return fused_map(self.query, self.key, self.mask, self.causal, self.scale, images)

    def visit(self, visitor: Visitor) -> None:
        """Attention and, where it `replaces` the kernel, its output, a block of images, heads and queries at a time.

        A block fits a core's cache, so that this costs little more than the fused kernel, and no more memory.
        """
        batch, heads, queries, keys = self.shape
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        rows = _rows(queries, keys)
        maps = max(1, min(BLOCK // (rows * keys), max(8, BLOCK // (4 * rows * keys))))
        step, together = -(-heads // -(-heads // maps)), max(1, maps // heads)  # heads in equal parts, or whole images
        scratch = self.query.new_empty(min(maps, batch * heads) * rows * keys, dtype=dtype)
        mask = None if self.mask is None else self.mask.expand(self.shape)
        if self.replaces:  # laid out as models want it next: heads side by side
            self.out = self.value.new_empty(batch, queries, heads, self.value.shape[-1]).transpose(1, 2)
        for images in _slices(batch, together):
            q, k, v = (self._of(x, images, dtype) for x in (self.query, self.key, self.value))
            q, k = q * self.scale, k.mT.contiguous()
            for some in _slices(queries, rows):
                for these in _slices(heads, step):
                    b, h, n = len(q), these.stop - these.start, some.stop - some.start
                    a = scratch[: b * h * n * keys].view(b * h, n, keys)
                    torch.bmm(q[:, these, some].flatten(0, 1), k[:, these].flatten(0, 1), out=a)
                    block = a.view(b, h, n, keys)
                    _softmax(block, None if mask is None else mask[images, these, some], self.causal * (some.start + 1))
                    if self.replaces:
                        self.out[images, these, some] = torch.bmm(a, v[:, these].flatten(0, 1)).view(b, h, n, -1)
                    visitor(block, images, these, some.start)

    def _of(self, x: Tensor, images: slice, dtype: torch.dtype) -> Tensor:
        """[B, H, N, d], perhaps of fewer heads or of one image for all -> [b, H, N, d]"""
        if x.shape[1] != self.shape[1]:  # grouped queries
            x = x.repeat_interleave(self.shape[1] // x.shape[1], dim=1)
        return x.expand(self.shape[0], -1, -1, -1)[images].to(dtype)


Visitor = Callable[[Tensor, slice, slice, int], None]  # attention [b, h, q, K], contiguous; images, heads, first query
Reader = Callable[[Layer, Maps], dict[str, Tensor]]  # -> values [B, ...]
Measure = Callable[[Tensor, Layer], dict[str, Tensor]]


def record(
    model: nn.Module,
    images: Tensor,
    measure: Measure,
    grid: tuple[int, ...] | None = None,
    num_prefix_tokens: int | None = None,
) -> list[Recorded]:
    """Forward `images` [B, 3, H, W] in eval mode and apply `measure` to the attention [b, H, Q, K] of every layer.

    The measure gets a few images at a time in float32 and returns tensors [b, ...]; no more than one chunk of one layer's
    attention is alive. Grid and prefix tokens are told from the model's parts and feature maps where they are not given.
    The model comes back as it was: hooks, training mode of each module, gradient mode.

    Raises ValueError for a model without attention, and for one with compiled parts.
    """

    def read(layer: Layer, attention: Maps) -> dict[str, Tensor]:
        batch, *per_image = attention.shape
        chunks = [
            measure(attention.part(rows), layer)
            for rows in _slices(batch, max(1, CHUNK_BYTES // (4 * math.prod(per_image))))
        ]
        return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}

    with watching(model, read, grid, num_prefix_tokens) as watch:
        watch.forward(images)
    return watch.result()


@contextlib.contextmanager
def watching(model: nn.Module, read: Reader, grid=None, num_prefix_tokens=None) -> Iterator[Watch]:
    """A Watch on `model`, which is in eval mode meanwhile; it comes back as it was, also after an exception."""
    model = plain(model)
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    watch = Watch(model, read, grid, num_prefix_tokens)
    try:
        for module in compiled:  # model.compile(): the same module, run as it is written
            module._compiled_call_impl = None
        with evaluating(model), watch.hooked():
            yield watch
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module's own training mode comes back, for frozen parts differ from their parents."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def plain(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper. Raises ValueError naming a part that hides its attention."""
    model = getattr(model, "_orig_mod", model)
    for name, part in model.named_modules():
        what = "torch.compile'd" if hasattr(part, "_orig_mod") else "TorchScript"
        if hasattr(part, "_orig_mod") or isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'} is {what} and hides its attention; give the model as it was before"
            )
    return model


SOFTMAX = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax}
CASTS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.bmm, torch.Tensor.bmm}
NOT_BETWEEN_PATCHES = {  # by what is in the name of the class, where no shape can tell
    "xca": "it attends between channels",
    "covariance": "it attends between channels",
    "channel": "it attends between channels",
    "maskunit": "its tokens are ordered by mask units, not by rows of the grid",
}
# timm's ConViT has two softmaxes and a gate, and a method that gives the map which it applies.
ASKED_AFTER = {"GPSA": "get_attention"}


class Watch(TorchFunctionMode):
    """Sees attention as the model computes it and knows whose it is by a stack of the modules that are running."""

    def __init__(self, model: nn.Module, read: Reader, grid: tuple[int, ...] | None, num_prefix_tokens: int | None):
        super().__init__()
        self.model, self.read, self.grid, self.num_prefix_tokens = model, read, grid, num_prefix_tokens
        self.names = {module: name for name, module in model.named_modules()}
        self.asked = {module for module in self.names if _offers_map(module)}
        self.asked_after = {
            m: getattr(m, ASKED_AFTER[type(m).__name__])
            for m in self.names if hasattr(m, ASKED_AFTER.get(type(m).__name__, " "))
        }  # fmt: skip
        self.silent = self.asked | set(self.asked_after)
        self.tokens = sum(
            p.numel() // p.shape[-1] for name, p in model.named_parameters() if p.ndim and _is_token(name)
        )

    @torch.no_grad()
    def forward(self, *inputs: object, **named: object) -> object:
        """The model's output, and in `seen` each layer with what was read off it."""
        tensors = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor) and x.ndim]
        if not tensors:
            raise ValueError("give the model's input as tensors, [B, ...]")
        self.inputs, self.batch, self.device = tensors[0], len(tensors[0]), tensors[0].device.type
        self.running: list[nn.Module] = []
        self.softmaxed: list[tuple[Tensor, nn.Module]] = []  # on their way to the values, and whose they are
        self.shapes: dict[tuple[int, int], None] = {}  # of feature maps, or what looks like one; the newest last
        self.seen: dict[nn.Module, Recorded] = {}
        with self:
            return self.model(*inputs, **named)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for module in self.names:
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        self.running.append(module)
        if module in self.asked:
            maps = Maps(lambda rows: module.attention_map(*(x[rows] for x in inputs)), ())
            maps.shape = (len(inputs[0]), *maps.part(slice(0, 1)).shape[1:])
            place = tuple(module.grid), module.num_prefix_tokens, "grid"
            self._see(module, maps, "asked", place)

    def _leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if module in self.asked_after and module not in self.seen:
            give = self.asked_after[module]
            maps = Maps(lambda rows: give(inputs[0][rows]).float(), (len(inputs[0]), *give(inputs[0][:1]).shape[1:]))
            self._see(module, maps, "asked")
        self.running.pop()
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == self.batch:
            for shape in (tuple(output.shape[1:3]), tuple(output.shape[2:])):  # channels last, channels first
                if min(shape) > 1:
                    self.shapes.pop(shape, None)
                    self.shapes[shape] = None  # the newest is last
        left = [attention for attention, owner in self.softmaxed if owner is module]
        self.softmaxed = [(attention, owner) for attention, owner in self.softmaxed if owner is not module]
        for attention in left:
            if attention is output and self.running:  # a module for the softmax alone
                self.softmaxed.append((attention, self.running[-1]))
                continue
            square = attention.shape[-2] == attention.shape[-1]
            if module not in self.seen and (square or _looks_like_attention(module)):
                self._skip(module, "its softmax does not meet the values as it is")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.running or not self.silent.isdisjoint(self.running):  # layers that are asked need no watching
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            given = inspect.signature(Scores).bind(*args, **kwargs).arguments
            tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
            scores = Scores(**given | {name: self._batched(x) for name, x in tensors.items()})
            self._see_unasked(self.running[-1], scores, "fused")
            return func(*args, **kwargs) if scores.out is None else scores.out.reshape(*given["query"].shape[:-1], -1)
        result = func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            self._see_multihead(func, inspect.signature(func).bind(*args, **kwargs).arguments)
        elif func in SOFTMAX:
            if result.ndim > 2 and _named(args, kwargs, 1, "dim") in (-1, result.ndim - 1):
                self.softmaxed.append((result, self.running[-1]))
        elif self.softmaxed and func in CASTS:
            self.softmaxed = [(result if a is args[0] else a, owner) for a, owner in self.softmaxed]
        elif self.softmaxed and (func in PRODUCTS or func is torch.einsum):
            self._see_written_out(func, args, kwargs)
        return result

    def _see_written_out(self, func, args: tuple, kwargs: dict) -> None:
        for place, (attention, owner) in enumerate(self.softmaxed):
            if _multiplies(func, args, kwargs, attention):
                del self.softmaxed[place]
                a = self._batched(attention) if owner is self.running[-1] else attention
                self._see_unasked(owner, Maps(lambda rows, a=a: _wide(a[rows]), a.shape), "written out")
                return

    def _see_multihead(self, func, given: dict) -> None:
        """nn.MultiheadAttention: the same function again, a few images at a time, with the weights that it then returns."""
        query, key, heads = given["query"], given["key"], given["num_heads"]
        if query.ndim != 3:
            return self._skip(self.running[-1], f"its input {list(query.shape)} is not a batch")

        def part(rows: slice) -> Tensor:
            some = given | {name: given[name][:, rows] for name in ("query", "key", "value")}
            if given.get("key_padding_mask") is not None:
                some["key_padding_mask"] = given["key_padding_mask"][rows]
            mask = given.get("attn_mask")
            if mask is not None and mask.ndim == 3:
                some["attn_mask"] = mask[rows.start * heads : rows.stop * heads]
            return func(**some | {"need_weights": True, "average_attn_weights": False})[1].float()

        keys = key.shape[0] + (given.get("bias_k") is not None) + bool(given.get("add_zero_attn"))
        self._see_unasked(self.running[-1], Maps(part, (query.shape[1], heads, query.shape[0], keys)), "multihead")

    def _see_unasked(self, module: nn.Module, maps: Maps, how: str) -> None:
        """Attention that the model computed: of all tokens of an image, or of some, or not of tokens at all."""
        other = next((why for word, why in NOT_BETWEEN_PATCHES.items() if word in type(module).__name__.lower()), None)
        if getattr(module, "use_global", False):  # GC-ViT
            other = "its queries are of the whole image, its keys of a window"
        if len(maps.shape) != 4:
            self._skip(module, f"its attention {list(maps.shape)} is not [B, H, Q, K]")
        elif other:
            self._skip(module, other)
        else:
            self._see(module, maps, how)

    def _batched(self, x: Tensor) -> Tensor:
        """What the module that is running has as [B * H, ...] (SAM, BoTNet) or [B, windows, H, ...] (Twins) -> [B, H, ...]"""
        heads = getattr(self.running[-1], "num_heads", None)
        if x.ndim == 3 and isinstance(heads, int) and len(x) % heads == 0:
            return x.unflatten(0, (-1, heads))
        return x.flatten(0, 1) if x.ndim == 5 and getattr(self.running[-1], "ws", None) else x

    def _see(self, module: nn.Module, maps: Maps, how: str, place: tuple | None = None) -> None:
        batch, heads, queries, keys = maps.shape
        if module in self.seen:
            return self._skip(module, "it attends more than once in a forward pass")
        place = place or self._place(batch, queries, keys)
        if isinstance(place, str):
            return self._skip(module, place)
        grid, prefix, extent = place
        layer = Layer(
            -1, self.names[module], type(module).__name__, heads, queries, grid, prefix, how=how, extent=extent
        )
        if keys != layer.keys:
            return self._skip(module, _misfit(keys, grid, prefix))
        if layer.between_patches and math.prod(grid) == 1:
            return self._skip(module, "its grid is one patch: there are no distances")
        layer = replace(layer, causal=isinstance(maps, Scores) and queries == keys and _is_causal(maps))
        with torch.autocast(self.device, enabled=False):  # float32, also where the model computes in less
            self.seen[module] = Recorded(layer, self.read(layer, maps))

    def _place(self, batch: int, queries: int, keys: int) -> tuple[tuple[int, ...], int, str] | str:
        """(grid, prefix tokens, extent) of a layer that does not say so itself, or why that cannot be told."""
        if batch != self.batch:
            window = self._window() if batch % self.batch == 0 and queries == keys else None
            if isinstance(window, tuple) and keys == math.prod(window):
                return window, 0, "window"
            if isinstance(window, str):
                return window
            return f"it attends within parts of an image: {batch} of {self.batch} images"
        declared = self.num_prefix_tokens
        if declared is None:
            declared = getattr(self.model, "num_prefix_tokens", None)
        if queries != keys and queries > max(1, declared or 0):
            return f"its {queries} queries are neither its {keys} keys nor a token alone"
        if self.grid is not None:
            return tuple(self.grid), declared or 0, "grid"
        whole = self._declared_grid()
        if whole and keys == math.prod(whole) + (declared or 0):
            return whole, declared or 0, "grid"
        # Where tokens are merged or class tokens join late, feature maps tell: the newest that fits, with no prefix first.
        fitting = [
            (keys - h * w, (h, w))
            for h, w in reversed(self.shapes)
            if 0 <= keys - h * w <= min(self.tokens, MAX_PREFIX)
        ]
        allowed = [found for found in fitting if self.num_prefix_tokens in (None, found[0])]
        if allowed:
            prefix, grid = min(allowed, key=lambda found: found[0])
            return grid, prefix, "grid"
        window = self._window()
        if isinstance(window, tuple) and queries == keys == math.prod(
            window
        ):  # one window, of an image that is padded to it
            return window, 0, "window"
        if whole:
            return _misfit(keys, whole, declared or 0)
        return (
            f"its {keys} keys are no grid of patches that can be told: give grid=(rows, columns) and num_prefix_tokens"
        )

    def _declared_grid(self) -> tuple[int, int] | None:
        embed = getattr(self.model, "patch_embed", None)
        patch, size = getattr(embed, "patch_size", None), tuple(self.inputs.shape[-2:])
        if self.inputs.ndim != 4:
            return None
        if hasattr(embed, "dynamic_feat_size"):  # timm's: knows of padding and of a CNN in front
            return tuple(embed.dynamic_feat_size(size))
        if patch is None:
            return None
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        return tuple(side // p for side, p in zip(size, patch, strict=True))

    def _window(self) -> tuple[int, int] | str | None:
        """The window of the layer that is running, by the names that Swin, Twins and MaxViT have for it, or why it is none."""
        for module in reversed(self.running[-3:]):
            if getattr(module, "partition_block", True) is False:  # MaxViT's grid attention
                return "it attends among every so many patches, which are no neighbours"
            for name in ("window_size", "ws", "partition_size"):
                size = getattr(module, name, None)
                if isinstance(size, int) and size > 0:
                    return size, size
                if isinstance(size, (tuple, list)) and len(size) == 2:
                    return tuple(size)
        return None

    def _skip(self, module: nn.Module, reason: str) -> None:
        layer = Layer(-1, self.names[module], type(module).__name__, 0, 0, (0, 0), 0)
        self.seen[module] = Recorded(layer.skipped(reason))

    def result(self) -> list[Recorded]:
        """Every attention layer of the model in its order: those that were seen, and those that should have been.

        Raises ValueError for a model without any.
        """
        for module in self.names:
            inside = (other for other in module.modules() if other is not module)
            if not _looks_like_attention(module) or module in self.seen:
                continue
            if not any(other in self.seen or _looks_like_attention(other) for other in inside):
                self._skip(module, "neither scaled_dot_product_attention nor softmax is seen in it")
        recorded = [self.seen[module] for module in self.names if module in self.seen]
        if not recorded:
            raise ValueError(f"{type(self.model).__name__} has no attention layer that can be seen")
        for index, item in enumerate(recorded):
            item.layer = replace(item.layer, index=index)
        return recorded


def fused_map(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None, rows: slice) -> Tensor:
    """The attention [b, H, Q, K] that scaled_dot_product_attention applies for the images `rows`, scores in float32."""
    q, k = (x[rows] if len(x) > 1 else x for x in (q, k))
    if k.shape[1] != q.shape[1]:  # grouped queries
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = _wide(q) @ _wide(k).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = mask[rows] if mask is not None and mask.ndim == 4 and mask.shape[0] > 1 else mask
    return _softmax(scores, mask, int(causal))


def _softmax(scores: Tensor, mask: Tensor | None, causal: int) -> Tensor:
    """In place over the keys of scores [b, h, q, K]; causal: 1 + the place of the first query, or 0.

    A query whose every key is masked attends to nothing.
    """
    if causal:
        scores.masked_fill_(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(causal), -math.inf
        )
    if mask is None:
        return torch.softmax(scores, -1, out=scores)
    scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    empty = scores.amax(-1, keepdim=True) == -math.inf
    return torch.softmax(scores, -1, out=scores).masked_fill_(empty, 0.0)


def _is_causal(scores: Scores) -> bool:
    """Whether no query sees a later key: by is_causal, or by a mask that says so for all images and heads alike."""
    if scores.causal or scores.mask is None or scores.shape[-1] == 1:
        return scores.causal
    mask = scores.mask.expand(scores.shape)[0, 0]
    closed = ~mask if mask.dtype == torch.bool else mask <= -1e4
    return bool((closed == torch.ones_like(closed).triu(1)).all())


def _rows(queries: int, keys: int) -> int:
    return queries if queries * keys <= BLOCK // 8 else min(queries, BLOCK_ROWS)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _wide(x: Tensor) -> Tensor:
    """Half precision -> float32"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _misfit(keys: int, grid: tuple[int, ...], prefix: int) -> str:
    return f"its {keys} keys are not {prefix} prefix tokens + {' x '.join(map(str, grid))} patches"


def _is_token(name: str) -> bool:
    """Whether a parameter holds class, register or distillation tokens, by the names of timm, HuggingFace and torchvision."""
    name = name.rpartition(".")[-1].lower()
    return any(word in name for word in ("token", "class_emb", "cls", "register"))


def _named(args: tuple, kwargs: dict, place: int, name: str):
    return args[place] if len(args) > place else kwargs.get(name)


def _multiplies(func, args: tuple, kwargs: dict, attention: Tensor) -> bool:
    """Whether this product sums over the keys of `attention`, as that with the values does."""
    if func is not torch.einsum:
        return _named(args, kwargs, 0, "input") is attention
    operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    terms, _, out = args[0].replace(" ", "").partition("->")
    named = [term for term, operand in zip(terms.split(","), operands, strict=False) if operand is attention]
    return bool(named) and bool(out) and named[0][-1] not in out and all(letter in out for letter in named[0][:-1])


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return any(word in name for word in ("attention", "attn", "litemla")) or _offers_map(module)


def _offers_map(module: nn.Module) -> bool:
    """isinstance(module, AttentionLayer), which takes Python 20 microseconds a module, for most of which a look is enough."""
    return hasattr(type(module), "attention_map") and isinstance(module, AttentionLayer)
