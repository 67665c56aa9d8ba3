"""The folder a run leaves behind. All in it is the training's, and what comparisons of runs read;
an evaluation on its own has a folder within it, with files of the same names."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from fvcore.common.config import CfgNode

from .. import __version__
from .files import RESULT, read_result, write_text
from .measure import machine

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
PREDICTIONS = "coco_instances_results.json"
#: folder of ``--eval-only``: of an earlier checkpoint than the last, or while training goes on
EVALUATION = "evaluation"
#: what an evaluation on its own leaves besides
WORST_IMAGES = "worst_images.png"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"

# of training; an evaluation in the same folder has them too
_TRAINING_FACTS = (
    "images_per_gpu",
    "world_size",
    "total_batch",
    "accumulate",
    "iterations",
    "sec_per_iter",
    "train_seconds",
    "peak_memory_mb",
    "machine",
)
_OF_EVALUATION = (RESULT, PREDICTIONS, WORST_IMAGES)
# of an earlier training run, and misleading once another one starts
_STALE = (
    "last_checkpoint",
    "metrics.json",
    PREDICTIONS,
    *(f"{EVALUATION}/{name}" for name in _OF_EVALUATION),
)


def describe(
    cfg: CfgNode,
    command: str,
    accumulate: int,
    world_size: int,
    engine: str,
    norms: Mapping[str, str],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What is known of a run before it starts, with a place for the rest of ``result.json``.

    Args:
        accumulate: mini-batches of ``SOLVER.IMS_PER_BATCH`` images in an optimiser step.
        norms: the config's norm keys that the model reads, with their values.
        versions: of what the engine adds to torch and torchvision.
    """
    return {
        "status": FAILED,
        "message": None,
        "results": {},
        "results_precise_bn": None,
        "results_image_share": None,
        "image_share": None,
        "norm": dict(norms),
        "weights": cfg.MODEL.WEIGHTS or None,
        "dataset": {"train": list(cfg.DATASETS.TRAIN), "test": list(cfg.DATASETS.TEST)},
        "test_set": None,
        "images_per_gpu": cfg.SOLVER.IMS_PER_BATCH // world_size,
        "world_size": world_size,
        "accumulate": accumulate,
        "total_batch": cfg.SOLVER.IMS_PER_BATCH * accumulate,
        "seed": cfg.SEED if cfg.SEED >= 0 else None,
        "iterations": None,
        "sec_per_iter": None,
        "train_seconds": None,
        "peak_memory_mb": None,
        "parameters": None,
        "flops": None,
        "engine": engine,
        "device": cfg.MODEL.DEVICE,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            **versions,
            "cbn_det": __version__,
        },
        "machine": machine(on_gpu=cfg.MODEL.DEVICE.startswith("cuda")),
        "command": command,
    }


def start_training(folder: Path, resume: bool = False) -> None:
    """Removes what an earlier run in this folder would pass off as this one's; checkpoints stay,
    and of a run that is resumed all but the result. A run that starts has no result yet: whoever
    finds one later knows that this run wrote it."""
    (folder / RESULT).unlink(missing_ok=True)
    for name in () if resume else _STALE:
        path = folder / name
        opened = name == "metrics.json"  # by detectron2's writer
        if not path.exists() or (opened and not path.stat().st_size):
            continue
        logger.warning(f"{folder} holds an earlier run: {name} is removed (--resume continues one)")
        if opened:
            os.truncate(path, 0)
        else:
            path.unlink()


def start_evaluation(folder: Path) -> None:
    """Removes what an earlier evaluation in this folder would pass off as this one's."""
    for name in _OF_EVALUATION:
        (folder / name).unlink(missing_ok=True)


def write_config(folder: Path, cfg: CfgNode) -> None:
    """Writes ``config.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, cfg.dump())


def result_stamp(folder: Path) -> tuple[int, int] | None:
    """Tells one writing of the folder's ``result.json`` from another; None: there is none."""
    try:
        found = (folder / RESULT).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes ``result.json``; numbers that are not finite become null."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(result), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / RESULT, text)


def keep_training_facts(result: dict[str, Any], folder: Path) -> None:
    """Adds to the result of an evaluation what training left in the folder's ``result.json``."""
    earlier = read_result(folder) or {}
    if earlier.get("iterations") is not None:
        result.update({key: earlier[key] for key in _TRAINING_FACTS if key in earlier})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)  # numpy's numbers too
    return number if math.isfinite(number) else None
