"""What a run reports of its model, machine and time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from .cores import usable_cores

logger = logging.getLogger(__name__)

_WARM_UP = 3  # iterations that are not timed, as in detectron2's IterationTimer


def peak_memory_mb() -> float:
    """Of this process so far, in MiB: tensors on the GPU if one is in use, else resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak_memory() -> None:
    """Lets :func:`peak_memory_mb` begin anew, where the system can: on Linux and GPUs. What was
    freed goes back to the system (glibc): used again, it would count as nothing."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, analyse: Callable[[nn.Module], FlopCountAnalysis]) -> int | None:
    """Multiply-adds of one image by fvcore's count of the model in evaluation mode; None, with the
    reason in the log, for a model that cannot be traced."""
    training = model.training
    model.eval()
    try:
        analysis = analyse(model)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return int(analysis.tracer_warnings("none").total())
    except Exception as error:  # tracing runs arbitrary model code; no run fails over this
        logger.warning(f"FLOPs are not counted: {type(error).__name__}: {error}")
        return None
    finally:
        model.train(training)


def machine(on_gpu: bool) -> dict[str, str | int | None]:
    """``cpu`` (its name), ``cores`` (usable by this process), ``threads`` (torch's), ``gpu``."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except FileNotFoundError:
        pass  # not Linux
    return platform.processor() or platform.machine()


class RunClock:
    """Seconds of training, summed over resumed parts, and the peak memory of this part (MiB)."""

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.timed_seconds = 0.0
        self.timed_iterations = 0
        self.peak_memory_mb: float | None = None
        self._started: float | None = None
        self._steps = 0

    def start(self) -> None:
        """Training begins."""
        self._started = time.perf_counter()
        self._steps = 0

    def start_step(self) -> None:
        self._step_started = time.perf_counter()

    def end_step(self) -> None:
        if self._steps >= _WARM_UP:
            self.timed_seconds += time.perf_counter() - self._step_started
            self.timed_iterations += 1
        self._steps += 1

    def stop(self) -> None:
        """Training ends; called before the final evaluation, which uses memory of its own."""
        self._add_elapsed()
        self.peak_memory_mb = peak_memory_mb()

    @property
    def sec_per_iter(self) -> float | None:
        return self.timed_seconds / self.timed_iterations if self.timed_iterations else None

    def state_dict(self) -> dict[str, Any]:
        if self._started is not None:
            self._add_elapsed()
        names = ("train_seconds", "timed_seconds", "timed_iterations")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _add_elapsed(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._started
        self._started = now
