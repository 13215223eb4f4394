"""A CUDA device for tests on machines without one: tensors that say that they lie on cuda:0 and hold their data on the CPU.

    with simulated() as cuda:
        model.to("cuda")(x.to("cuda"))
    cuda.kernels, cuda.copies, cuda.waits     # Counters: by operation, and by the line of ours that caused them

An operation on two devices raises RuntimeError, as does a CPU generator for a tensor on CUDA. Numbers are the CPU's; what
cannot be seen here are the kernels of a GPU, their rounding and their memory.
"""

import collections
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

ROOT = str(Path(__file__).parents[1])
CUDA = torch.device("cuda:0")
ATEN = torch.ops.aten
INDEXING = {f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")}
BETWEEN_DEVICES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
# Whose output has a size that depends on values: the host waits for it.
SIZED_BY_VALUES = {f"aten::{name}" for name in ("nonzero", "masked_select", "_unique2", "unique_dim", "equal")}
FREE = {
    f"aten::{name}"
    for name in (
        "view", "_unsafe_view", "t", "transpose", "expand", "permute", "slice", "select", "unsqueeze", "squeeze", "detach",
        "split", "split_with_sizes", "unbind", "alias", "as_strided", "diagonal", "_reshape_alias", "unfold", "empty",
        "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "chunk", "_local_scalar_dense",
    )
}  # fmt: skip
_of_tensor = torch.Tensor.to  # as it is outside `simulated`
_mode: "Cuda | None" = None


class OnCuda(torch.Tensor):
    """A tensor on the simulated device; `elem` holds its data."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem):
        return torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=torch.device("cpu"),
        )  # fmt: skip

    def __init__(self, elem):
        self.elem = elem

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _mode.__torch_dispatch__(func, types, args, kwargs)

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnCuda({self.elem})"

    def __deepcopy__(self, memo):
        copied = OnCuda(self.elem.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        """Saved as the tensor that torch.load(map_location="cpu") would give back."""
        _mode.wait("to the CPU")
        return self.elem.detach().__reduce_ex__(protocol)

    def cpu(self):
        return _Down.apply(self)

    def cuda(self, *args, **kwargs):
        return self

    def to(self, *args, **kwargs):
        args, copy = list(args), kwargs.pop("copy", False)
        kwargs.pop("non_blocking", None)
        target = kwargs.pop("device", None)
        if args and isinstance(args[0], torch.Tensor):
            target, args = args[0].device, [args[0].dtype]
        elif args and isinstance(args[0], str | torch.device):
            target = args.pop(0)
        moved = self if target is None or torch.device(target).type == "cuda" else _Down.apply(self)
        dtype = next((a for a in args if isinstance(a, torch.dtype)), kwargs.pop("dtype", None)) or self.dtype
        if dtype == self.dtype:
            return moved.clone() if copy and moved is self else moved
        return _Cast.apply(moved, dtype) if moved.requires_grad else ATEN._to_copy(moved, dtype=dtype)

    def tolist(self):
        _mode.wait("tolist")
        return self.elem.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"numpy() of a tensor on CUDA at {_line()}")

    __array__ = numpy


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return ATEN._to_copy(x, dtype=dtype)

    @staticmethod
    def backward(ctx, gradient):
        return ATEN._to_copy(gradient, dtype=ctx.dtype), None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        _mode.wait("to the CPU")
        return x.elem.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(CUDA)


def _line() -> str:
    """Where in this project, timm or transformers the operation was asked for."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        ours = frame.filename.startswith(ROOT) and "simulated_cuda" not in frame.filename
        if (
            (ours and "site-packages" not in frame.filename)
            or "/timm/" in frame.filename
            or "/transformers/" in frame.filename
        ):
            return f"{frame.filename.removeprefix(ROOT + '/').split('site-packages/')[-1]}:{frame.lineno}"
    return "?"


class Cuda(TorchDispatchMode):
    """Runs operations on the data that the tensors hold, checks their devices, and counts."""

    def __init__(self):
        super().__init__()
        self.kernels, self.copies, self.waits = (collections.Counter() for _ in range(3))

    def wait(self, why):
        """The host waits for the device."""
        self.waits[f"{_line()} {why}"] += 1

    def copy(self, non_blocking):
        """From the host to the device."""
        self.copies[_line()] += 1
        if not non_blocking:
            self.wait("copy")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there, here = ([x for x in tensors if isinstance(x, OnCuda) == on] for on in (True, False))
        target = kwargs.get("device")
        to_cuda = target is not None and torch.device(target).type == "cuda"
        like = name.startswith("aten::new_") or name.endswith("_like") or name == "aten::_to_copy"
        if (
            there and like and target is not None
        ):  # the device that a wrapper tensor was made with, not one that was asked for
            to_cuda = True
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if not there and not to_cuda:
            return func(*args, **kwargs)
        self.check(name, args, kwargs, there, here)
        arguments, options = tree_map(lambda x: x.elem if isinstance(x, OnCuda) else x, (args, kwargs))
        options.pop("pin_memory", None)
        on_cuda = bool(there) if target is None else to_cuda
        if name == "aten::_to_copy" and not there:
            self.copy(kwargs.get("non_blocking"))
        if name == "aten::copy_":
            on_cuda = isinstance(args[0], OnCuda)
            if on_cuda and not isinstance(args[1], OnCuda):
                self.copy(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            elif not on_cuda:
                self.wait("to the CPU")
        out = _run(name, func, arguments, options)
        if name not in FREE:
            self.kernels[name] += 1
        if not on_cuda:
            return out
        same = {id(x.elem): x for x in there}  # operations in place hand back their argument

        def wrapped(x):
            if not isinstance(x, torch.Tensor):
                return x
            return same[id(x)] if id(x) in same else OnCuda(x)

        return tree_map(wrapped, out)

    def check(self, name, args, kwargs, there, here):
        """Raises for two devices in one operation; counts what makes the host wait."""
        generator = kwargs.get("generator")
        if there and generator is not None and generator.device.type == "cpu":
            raise RuntimeError(f"a CPU generator for a tensor on CUDA in {name} at {_line()}")
        if there and here and name not in BETWEEN_DEVICES:
            indices = name in INDEXING and isinstance(args[0], OnCuda)
            values = args[2:3] if indices else here
            odd = [x for x in here if x.dim() and (not indices or any(x is v for v in values))]
            if odd:
                raise RuntimeError(f"two devices in {name}: {[tuple(x.shape) for x in odd]} on the CPU, at {_line()}")
            if indices:
                self.copy(False)
        if there and (name == "aten::_local_scalar_dense" or name in SIZED_BY_VALUES):
            self.wait(name)
        if there and name == "aten::repeat_interleave":
            self.wait(name)
        if there and name in INDEXING:
            masks = [
                x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            ]
            if masks:
                self.wait("a boolean mask")


def _run(name, func, args, kwargs):
    """The operation on the CPU, whose flash attention goes by another name and has another signature."""
    if name == "aten::_scaled_dot_product_flash_attention":
        q, k, v = args[:3]
        causal, scale = (args[4] if len(args) > 4 else kwargs.get("is_causal", False)), kwargs.get("scale")
        out, logsumexp = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        empty = torch.empty(0, dtype=torch.int64)
        return out, logsumexp, None, None, q.shape[2], k.shape[2], empty, empty, empty
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        scale = kwargs.get("scale")
        return ATEN._scaled_dot_product_flash_attention_for_cpu_backward(*args[:6], 0.0, args[11], scale=scale)
    if name == "aten::_fused_sdp_choice":
        return 1  # flash
    return func(*args, **kwargs)


def _to(self, *args, **kwargs):
    """Tensor.to for tensors on the CPU: `cuda` without a number would ask the driver which one."""
    args = list(args)
    if args and isinstance(args[0], OnCuda):
        args = [CUDA, args[0].dtype, *args[1:]]
    if args and isinstance(args[0], str | torch.device) and torch.device(args[0]).type == "cuda":
        args[0] = CUDA
    if "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cuda":
        kwargs["device"] = CUDA
    if CUDA in (*args[:1], kwargs.get("device")) and _mode not in _get_current_dispatch_mode_stack():
        return _unwatched(self, *args, **kwargs)
    return _of_tensor(self, *args, **kwargs)


def _unwatched(self, *args, non_blocking=False, **kwargs):
    """Tensor.to cuda:0 where all modes are switched off, this one too."""
    args = [torch.device("cpu") if a == CUDA else a for a in args]
    kwargs |= {"device": torch.device("cpu")} if kwargs.get("device") == CUDA else {}
    _mode.copy(non_blocking)
    return OnCuda(_of_tensor(self, *args, **kwargs))


def _made_there(function):
    """A factory that reads its data on the CPU and sends it to the device that is asked for."""

    def make(data, *args, device=None, **kwargs):
        if isinstance(data, OnCuda):
            return data
        if device is None or torch.device(device).type != "cuda":
            return function(data, *args, device=device, **kwargs)
        return function(data, *args, **kwargs).to(CUDA)

    return make


def _numbered(function):
    """A factory by size: `cuda` becomes cuda:0."""

    def make(*args, device=None, **kwargs):
        cuda = device is not None and torch.device(device).type == "cuda"
        return function(*args, device=CUDA if cuda else device, **kwargs)

    return make


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


@contextlib.contextmanager
def simulated():
    """In the body there is a device cuda:0. Yields its counters."""
    global _mode
    sized = ("empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn")
    patches = [
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "get_device_name", lambda device=None: "simulated"),
        mock.patch.object(torch, "autocast", _Autocast),
        mock.patch.object(torch.Tensor, "to", _to),
        mock.patch.object(torch.Tensor, "type_as", lambda self, other: self.to(other)),
        mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(CUDA)),
        *(mock.patch.object(torch, name, _made_there(getattr(torch, name))) for name in ("tensor", "as_tensor")),
        *(mock.patch.object(torch, name, _numbered(getattr(torch, name))) for name in sized),
        mock.patch.object(optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, OnCuda]),
        mock.patch.object(
            _foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, OnCuda]
        ),
    ]
    before, overwrites = _mode, torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _mode = stack.enter_context(Cuda())
        try:
            yield _mode
        finally:
            _mode = before
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
