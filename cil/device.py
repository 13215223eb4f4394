"""The device that computes: which one, its name, its cores, its precision, and what is slow on it."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def resolve(name: str) -> str:
    """The device that a name stands for: `auto` is CUDA where there is one, else the CPU; any other name is that device.

    Raises ValueError for a device that is not here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "meta":
        raise ValueError("the device 'meta' holds no numbers; give cpu or cuda")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here ({str(error).splitlines()[0]})") from None
    return name


def spread(name: str) -> list[str]:
    """The devices that pieces of work are given in turn: for `cuda` every GPU that there is, for another name that alone."""
    several = torch.cuda.device_count() if name == "cuda" else 1
    return [f"cuda:{n}" for n in range(several)] if several > 1 else [name]


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor(device: str) -> str:
    """The model name of a GPU, or of the CPU as far as the system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


FILLS = "fill_uninitialized_memory"  # torch would else write NaN into all new memory, which finds bugs and takes time


@contextlib.contextmanager
def repeatable(device: str, matmul: str = "ieee") -> Iterator[None]:
    """In the body the same work on CUDA gives the same numbers again; on a CPU it does without this.

    Attention comes from the flash and memory-efficient kernels, as cuDNN's are not deterministic. matmul: `ieee`, or `tf32`,
    whose products have 10 bits; after the body they are ieee, for what is measured in the same process. To be entered before
    anything is computed on CUDA, for cuBLAS reads its workspace once.
    """
    _allow_tf32(matmul == "tf32")
    try:
        with _deterministic() if torch.device(device).type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        _allow_tf32(False)


def _allow_tf32(allowed: bool) -> None:
    """In matrix products and in convolutions, where torch allows it by default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """CUDA's deterministic kernels in the body; afterwards what was asked for before."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    fills = getattr(torch.utils.deterministic, FILLS)
    torch.use_deterministic_algorithms(True)  # with warn_only, attention's gradients would not be deterministic
    setattr(torch.utils.deterministic, FILLS, False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        torch.backends.cuda.enable_cudnn_sdp(before[3])
        setattr(torch.utils.deterministic, FILLS, fills)


def excuse(error: RuntimeError) -> None:
    """Let what has no deterministic kernel be done by another from now on, with a warning. Raises what is another error."""
    if "deterministic" not in str(error):
        raise error
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.warn(f"two runs on this device will differ by rounding: {str(error).split('.')[0]}", stacklevel=2)


ALIGNED = 16  # bytes; where each tensor of a packet begins


def send(nested: Any, device: str) -> Any:
    """Tuples and lists of CPU tensors and other things, with the tensors on a device: by one copy, for which nobody waits.

    On the CPU they stay what they are.
    """
    if torch.device(device).type == "cpu":
        return nested
    return unpack(nested, pack(nested).to(device, non_blocking=True))


def pack(nested: Any) -> Tensor:
    """The bytes of all CPU tensors in tuples and lists, in one buffer in pinned memory: uint8."""
    tensors = list(_tensors(nested))
    packet = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    for tensor, there in zip(tensors, packet.split([_room(t) for t in tensors]), strict=True):
        there[: _size(tensor)].copy_(tensor.contiguous().flatten().view(torch.uint8))
    return packet


def unpack(nested: Any, packet: Tensor) -> Any:
    """`nested`, as it was packed, with views of the packet in the places of its tensors."""
    tensors = list(_tensors(nested))
    parts = zip(tensors, packet.split([_room(tensor) for tensor in tensors]), strict=True)
    return _with(nested, (there[: _size(t)].view(t.dtype).view(t.shape) for t, there in parts))


def layout(nested: Any) -> Any:
    """What makes two packets alike but for the numbers in their tensors: shapes, types, and everything else; to be a key."""
    if isinstance(nested, Tensor):
        return nested.shape, nested.dtype
    return tuple(map(layout, nested)) if isinstance(nested, tuple | list) else nested


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _room(tensor: Tensor) -> int:
    """Bytes of a packet, of which the next tensor begins at a whole ALIGNED."""
    return -(-_size(tensor) // ALIGNED) * ALIGNED


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    for part in nested if isinstance(nested, tuple | list) else ():
        yield from _tensors(part)


def _with(nested: Any, tensors: Iterator[Tensor]) -> Any:
    """The same, with the next of `tensors` in the place of each."""
    if isinstance(nested, Tensor):
        return next(tensors)
    if not isinstance(nested, tuple | list):
        return nested
    parts = [_with(part, tensors) for part in nested]
    return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)


def slow_bf16(amp: str, device: str) -> str:
    """A sentence where bf16 is asked of a CPU that computes it slowly, else nothing.

    Without AVX-512 a training step took 7.4 times as long in bf16 as in float32 (an AVX2 EPYC, the scale `small`).
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if amp != "bf16" or torch.device(device).type != "cpu" or capability.startswith("AVX512"):
        return ""
    return (
        f"amp=bf16 is slow on this CPU ({capability}, without AVX-512; on such a one it took 7 times as long as float32): "
        "--set amp=none trains in float32"
    )
