"""The processor that computes: its name, its precision, and what is slow on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


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
