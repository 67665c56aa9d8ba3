"""A training iteration or inference on the standalone engine, ready to be timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torchvision
from torch import nn

from ..run.job import built
from .job import StandaloneJob
from .launch import build_config
from .loading import in_order
from .model import build_model
from .trial import StandaloneTrial


def training_step(
    args: argparse.Namespace, batches: int
) -> tuple[nn.Module, Callable[[int], None], dict[str, str]]:
    """Builds the trainer of a command line and loads its first batches.

    Args:
        args: the launcher's; trains from ``MODEL.WEIGHTS``, if there are any.
        batches: that the steps take in turn, read beforehand.

    Returns:
        The model; a function that makes one step, with the random numbers and the learning rate of
        the iteration it is given; the version of torchvision.

    Raises:
        ValueError: a config that cannot be run.
    """
    trial = StandaloneTrial(args)
    trial.prepare()
    model = trial.build(Path(trial.cfg.OUTPUT_DIR), bool(trial.cfg.MODEL.WEIGHTS))
    trial.repeat(batches)
    return model, trial.step, {"torchvision": torchvision.__version__}


def inference_step(
    args: argparse.Namespace, batches: int
) -> tuple[nn.Module, Callable[[int], None], dict[str, str]]:
    """Builds the model of a command line, for evaluation, and loads its first test images.

    Args:
        args: the launcher's; ``MODEL.WEIGHTS`` are loaded, if there are any.
        batches: test images, one a batch, that the steps take in turn, read beforehand.

    Returns:
        The model; a function that runs it on one of them; the version of torchvision.

    Raises:
        ValueError: a config that cannot be run.
    """
    cfg, _ = build_config(args)
    job = StandaloneJob(cfg, args)
    job.prepare(eval_only=True)
    torch.manual_seed(cfg.SEED)
    model = built(job.build_trained if cfg.MODEL.WEIGHTS else lambda: build_model(cfg))
    model.to(cfg.MODEL.DEVICE).eval()
    samples = islice(in_order(job._test_set(), cfg), batches)
    kept = [[image.to(cfg.MODEL.DEVICE)] for image, _ in samples]
    versions = {"torchvision": torchvision.__version__}
    return model, lambda step: model(kept[step % len(kept)]), versions
