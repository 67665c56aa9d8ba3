"""A training iteration or inference on detectron2, ready to be timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle, islice

import detectron2
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ..run.job import built
from .config import build_config
from .job import Detectron2Job
from .loading import place
from .trainer import Trainer


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
    cfg, _ = build_config(args, world_size=1)
    Detectron2Job(cfg, args).prepare(eval_only=False)
    trainer = built(lambda: Trainer(cfg, args.accumulate))
    if cfg.MODEL.WEIGHTS:
        built(lambda: trainer.resume_or_load(resume=False))
    place(trainer.data_loader, trainer.seed)
    kept = list(islice(iter(trainer.data_loader), batches))
    trainer.step.reset_data_loader(lambda: cycle(kept))

    def step_on(iteration: int) -> None:
        with EventStorage() as trainer.storage:
            trainer.iter = iteration
            trainer.run_step()

    return trainer.bare_model, step_on, {"detectron2": detectron2.__version__}


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
