"""A training on detectron2 that is only tried."""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path

from detectron2.utils.events import EventStorage
from torch import nn

from ..data import CocoReport
from ..run.job import built
from ..run.trial import Trial
from .config import build_config
from .job import Detectron2Job
from .launch import read_layout
from .loading import place
from .trainer import Trainer


class Detectron2Trial(Trial):
    """See :class:`~cbn_det.run.trial.Trial`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.world_size = read_layout(args).world_size
        self.cfg, self.notes = build_config(args, self.world_size)

    def prepare(self) -> dict[str, CocoReport]:
        return built(lambda: Detectron2Job(self.cfg, self._args).prepare(eval_only=False))

    def build(self, folder: Path, load_weights: bool) -> nn.Module:
        cfg = self.cfg.clone()
        cfg.defrost()
        # what one process has of the batch, which is scaled already
        cfg.SOLVER.IMS_PER_BATCH //= self.world_size
        cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
        cfg.OUTPUT_DIR = str(folder)
        cfg.freeze()
        trainer = self._trainer = built(lambda: Trainer(cfg, self._args.accumulate))
        if load_weights:
            built(lambda: trainer.resume_or_load(resume=False))
        place(trainer.data_loader, trainer.seed)
        self.optimizer, self.unused_norms = trainer.optimizer, trainer.unused_norms
        return trainer.bare_model

    def repeat(self, batches: int) -> None:
        kept = list(islice(iter(self._trainer.data_loader), batches))
        self._trainer.step.reset_data_loader(lambda: cycle(kept))

    def step(self, iteration: int) -> None:
        with EventStorage() as self._trainer.storage:
            self._trainer.iter = iteration
            self._trainer.run_step()
