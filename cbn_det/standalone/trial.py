"""A training on the standalone engine that is only tried."""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import nn

from ..data import CocoReport
from ..run.job import built
from ..run.trial import Trial
from .job import StandaloneJob
from .launch import build_config
from .loading import batches
from .model import build_model
from .trainer import Trainer
from .weights import load_weights as load_weights_of


class StandaloneTrial(Trial):
    """See :class:`~cbn_det.run.trial.Trial`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.cfg, self.notes = build_config(args)
        self.unused_norms = []  # they are refused when the model is built
        self._job = StandaloneJob(self.cfg, args)

    def prepare(self) -> dict[str, CocoReport]:
        return built(lambda: self._job.prepare(eval_only=False))

    def build(self, folder: Path, load_weights: bool) -> nn.Module:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(folder)
        cfg.freeze()
        torch.manual_seed(cfg.SEED)
        model = built(lambda: build_model(cfg)).to(cfg.MODEL.DEVICE)
        dataset = self._job.training_set()
        self._trainer = built(lambda: Trainer(cfg, model, dataset, dict, self._args.accumulate))
        if load_weights:
            load_weights_of(model, cfg.MODEL.WEIGHTS)
        self._loader = batches(dataset, cfg)
        self.optimizer = self._trainer.optimizer
        return model.train()

    def repeat(self, batches: int) -> None:
        self._loader = cycle(list(islice(self._loader, batches)))

    def step(self, iteration: int) -> None:
        self._trainer.iter = iteration
        self._trainer._step(self._loader)
