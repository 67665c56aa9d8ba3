"""A training iteration on detectron2, ready to be timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle, islice

import detectron2
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
