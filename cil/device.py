"""The device that computes: which one, its name, its cores, its precision, and what is slow on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


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


def ieee_float32() -> None:
    """Have float32 be float32 on CUDA, convolutions included, whose default is TF32 with its 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


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
