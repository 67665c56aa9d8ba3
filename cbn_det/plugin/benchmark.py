"""A training iteration or inference on detectron2, ready to be timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import detectron2
import torch
from torch import nn

from ..run.job import built
from .config import build_config
from .job import Detectron2Job
from .trainer import Trainer
from .trial import Detectron2Trial


def training_step(
    args: argparse.Namespace, batches: int
) -> tuple[nn.Module, Callable[[int], None], dict[str, str]]:
    """Builds the trainer of a command line and loads its first batches.

    Args:
        args: the launcher's; trains from ``MODEL.WEIGHTS``, if there are any.
        batches: that the steps take in turn, read beforehand.

    Returns:
        The bare model; a function that makes one step, with the random numbers of the iteration it
        is given and the learning rate of the first; the engine's version.

    Raises:
        ValueError: a config that cannot be run.
    """
    trial = Detectron2Trial(args)
    trial.prepare()
    model = trial.build(Path(trial.cfg.OUTPUT_DIR), bool(trial.cfg.MODEL.WEIGHTS))
    trial.repeat(batches)
    return model, trial.step, {"detectron2": detectron2.__version__}


def inference_step(
    args: argparse.Namespace, batches: int
) -> tuple[nn.Module, Callable[[int], None], dict[str, str]]:
    """Builds the model of a command line, for evaluation, and loads its first test images.

    Args:
        args: the launcher's; ``MODEL.WEIGHTS`` are loaded, if there are any.
        batches: test images, one a batch, that the steps take in turn, read beforehand.

    Returns:
        The model; a function that runs it on one of them; the engine's version.

    Raises:
        ValueError: a config that cannot be run.
    """
    cfg, _ = build_config(args, world_size=1)
    job = Detectron2Job(cfg, args)
    job.prepare(eval_only=True)
    torch.manual_seed(cfg.SEED)
    model = built(job.build_trained if cfg.MODEL.WEIGHTS else lambda: Trainer.build_model(cfg))
    kept = list(islice(iter(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])), batches))
    model.eval()
    versions = {"detectron2": detectron2.__version__}
    return model, lambda step: model(kept[step % len(kept)]), versions
