"""What a run reports of its model and machine."""

from __future__ import annotations

import logging
import os
import platform
import resource
import sys

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

logger = logging.getLogger(__name__)


def peak_memory_mb() -> float:
    """Of this process so far, in MiB: tensors on the GPU if one is in use, else resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(cfg: CfgNode, model: nn.Module) -> int | None:
    """Multiply-adds of the model on the first test image, as fvcore counts them.

    Returns:
        None, with the reason in the log, for a model that cannot be traced.
    """
    training = model.training
    model.eval()
    try:
        record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
        sample = DatasetMapper(cfg, is_train=False)(dict(record))
        analysis = FlopCountAnalysis(model, [{"image": sample["image"]}])
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return int(analysis.tracer_warnings("none").total())
    except Exception as error:  # tracing runs arbitrary model code; no run fails over a statistic
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
