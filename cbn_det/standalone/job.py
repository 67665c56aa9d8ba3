"""A run on torchvision's parts."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ..data import CocoReport
from ..run.folder import describe
from ..run.job import Job
from .config import norms_in_use
from .datasets import DetectionDataset, prepare_datasets
from .evaluation import evaluate
from .loading import Sample, batches
from .model import build_model
from .trainer import Trainer, losses_of
from .weights import load_weights

logger = logging.getLogger(__name__)


class StandaloneJob(Job):
    """See :class:`~cbn_det.run.job.Job`."""

    def __init__(self, cfg: CfgNode, args: argparse.Namespace) -> None:
        norms = norms_in_use(cfg)
        result = describe(cfg, args.command, args.accumulate, 1, "standalone", norms, {})
        super().__init__(cfg, args, result)
        self.reports: dict[str, CocoReport] = {}

    def prepare(self, eval_only: bool) -> dict[str, CocoReport]:
        self.reports = prepare_datasets(self.cfg, self.args.coco_dataset, eval_only=eval_only)
        return self.reports

    def build_trainer(self, cfg: CfgNode) -> Trainer:
        torch.manual_seed(cfg.SEED)
        model = build_model(cfg).to(cfg.MODEL.DEVICE)
        evaluate = partial(self.evaluate, model)
        return Trainer(cfg, model, self.training_set(), evaluate, self.args.accumulate)

    def load(self, trainer: Trainer, resume: bool) -> None:
        if resume:
            trainer.resume()
        if self.cfg.MODEL.WEIGHTS and not trainer.start_iter:
            logger.info(load_weights(trainer.bare_model, self.cfg.MODEL.WEIGHTS))

    def build_trained(self) -> nn.Module:
        checkpointer = Checkpointer(nn.Module(), self.cfg.OUTPUT_DIR)
        path, named_by = self.weights_to_evaluate(checkpointer)
        model = build_model(self.cfg).to(self.cfg.MODEL.DEVICE)
        logger.info(load_weights(model, path, complete=True, named_by=named_by))
        return model

    def evaluate(self, model: nn.Module, folder: str | None = None) -> dict[str, Any]:
        """Results by task; with several test sets by set and task. The first set's predictions are
        left in ``folder``, the others' below it."""
        names = self.cfg.DATASETS.TEST
        output = self.output / (folder or "")
        results = {
            name: evaluate(
                model,
                self._dataset(name, training=False),
                self.cfg,
                output / name if i else output,
            )
            for i, name in enumerate(names)
        }
        return results if len(names) > 1 else next(iter(results.values()), {})

    def training_batches(self) -> Iterator[list[Sample]]:
        torch.manual_seed(self.cfg.SEED)
        return batches(self.training_set(), self.cfg)

    def forward(self, model: nn.Module, batch: list[Sample]) -> dict[str, Tensor]:
        return losses_of(model, batch)

    def analyse_flops(self, model: nn.Module) -> FlopCountAnalysis:
        image, _ = self.test_set()[0]
        return FlopCountAnalysis(model, ([image.to(self.cfg.MODEL.DEVICE)],))

    def training_set(self) -> ConcatDataset:
        return ConcatDataset(self._dataset(n, training=True) for n in self.cfg.DATASETS.TRAIN)

    def test_set(self) -> DetectionDataset:
        return self._dataset(self.cfg.DATASETS.TEST[0], training=False)

    def _dataset(self, name: str, training: bool) -> DetectionDataset:
        report = self.reports[name]
        return DetectionDataset(report.annotations, report.images, self.cfg, training)
