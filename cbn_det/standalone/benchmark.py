"""A training iteration or inference on the standalone engine, ready to be timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle, islice

import torch
import torchvision
from torch import nn

from ..run.job import built
from .job import StandaloneJob
from .launch import build_config
from .loading import batches as training_batches
from .loading import in_order
from .model import build_model
from .trainer import Trainer
from .weights import load_weights


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
    cfg, _ = build_config(args)
    job = StandaloneJob(cfg, args)
    job.prepare(eval_only=False)
    torch.manual_seed(cfg.SEED)
    model = built(lambda: build_model(cfg)).to(cfg.MODEL.DEVICE)
    dataset = job._training_set()
    trainer = built(lambda: Trainer(cfg, model, dataset, dict, args.accumulate))
    if cfg.MODEL.WEIGHTS:
        load_weights(model, cfg.MODEL.WEIGHTS)
    kept = cycle(list(islice(training_batches(dataset, cfg), batches)))
    model.train()

    def step_on(iteration: int) -> None:
        trainer.iter = iteration
        trainer._step(kept)

    return model, step_on, {"torchvision": torchvision.__version__}


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
