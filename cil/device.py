"""The device that computes: which one, its name, its cores, its precision, and what is slow on it."""

from __future__ import annotations

import contextlib
import os
import platform
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
    # An operation that has no deterministic kernel says so once, and is done all the same.
    torch.use_deterministic_algorithms(True, warn_only=True)
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


ALIGNED = 16  # bytes; where each tensor of a packet begins


def send(nested: Any, device: str) -> Any:
    """Tuples and lists of CPU tensors and other things, with the tensors on a device: by one copy, for which nobody waits.

    All tensors go through one buffer in pinned memory. On the CPU they stay what they are.
    """
    if torch.device(device).type == "cpu":
        return nested
    tensors = list(_tensors(nested))
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    room = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    packet = torch.empty(sum(room), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    for tensor, size, there in zip(tensors, sizes, packet.split(room), strict=True):
        there[:size].copy_(tensor.contiguous().flatten().view(torch.uint8))
    arrived = packet.to(device, non_blocking=True).split(room)
    parts = zip(tensors, sizes, arrived, strict=True)
    return _with(nested, (there[:size].view(tensor.dtype).view(tensor.shape) for tensor, size, there in parts))


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
