"""What a run reports of its model and machine."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from pathlib import Path

import torch
from torch import nn


def peak_memory_mb() -> float:
    """Of this process so far, in MiB: tensors on the GPU if one is in use, else resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak_memory() -> None:
    """Lets :func:`peak_memory_mb` begin anew, where the system can: on Linux and GPUs."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def machine(on_gpu: bool) -> dict[str, str | int | None]:
    """``cpu`` (its name), ``cores`` (usable by this process), ``threads`` (torch's), ``gpu``."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }


def usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except FileNotFoundError:
        pass  # not Linux
    return platform.processor() or platform.machine()
