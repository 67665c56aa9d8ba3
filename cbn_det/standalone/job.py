"""A run on torchvision's parts."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.data import ConcatDataset

from ..data import CocoReport
from ..run.folder import describe
from ..run.job import Job, built
from ..run.nonfinite import first_bad_layer
from ..run.precise_bn import kept_statistics, recompute_statistics
from .config import norms_in_use
from .datasets import DetectionDataset, prepare_datasets
from .evaluation import evaluate
from .loading import batches
from .model import build_model
from .trainer import Trainer, losses_of
from .weights import load_weights

logger = logging.getLogger(__name__)


class StandaloneJob(Job):
    """See :class:`~cbn_det.run.job.Job`."""

    trainer: Trainer | None

    def __init__(self, cfg: CfgNode, args: argparse.Namespace) -> None:
        norms = norms_in_use(cfg)
        result = describe(cfg, args.command, args.accumulate, 1, "standalone", norms, {})
        super().__init__(cfg, args, result)
        self.reports: dict[str, CocoReport] = {}

    def prepare(self, eval_only: bool) -> dict[str, CocoReport]:
        self.reports = prepare_datasets(self.cfg, self.args.coco_dataset, eval_only=eval_only)
        return self.reports

    def train(self) -> dict[str, Any]:
        torch.manual_seed(self.cfg.SEED)
        model = built(lambda: build_model(self.cfg)).to(self.cfg.MODEL.DEVICE)
        trainer = self.trainer = built(
            lambda: Trainer(
                self.cfg,
                model,
                self.training_set(),
                lambda: self.evaluate(model),
                self.args.accumulate,
            )
        )
        if self.args.resume:
            trainer.resume()
        if self.cfg.MODEL.WEIGHTS and not trainer.start_iter:
            logger.info(load_weights(model, self.cfg.MODEL.WEIGHTS))
        self.start()
        return trainer.train()

    def build_trained(self) -> nn.Module:
        checkpointer = Checkpointer(nn.Module(), self.cfg.OUTPUT_DIR)
        path, named_by = self.weights_to_evaluate(checkpointer)
        model = build_model(self.cfg).to(self.cfg.MODEL.DEVICE)
        logger.info(load_weights(model, path, complete=True, named_by=named_by))
        return model

    def evaluate(self, model: nn.Module, folder: str | None = None) -> dict[str, Any]:
        return self._evaluate(model, self.output / folder if folder else self.output)

    def _evaluate(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Results by task; with several test sets by set and task. The first set's predictions are
        left in ``folder``, the others' below it."""
        names = self.cfg.DATASETS.TEST
        results = {
            name: evaluate(
                model,
                self._dataset(name, training=False),
                self.cfg,
                folder / name if i else folder,
            )
            for i, name in enumerate(names)
        }
        return results if len(names) > 1 else next(iter(results.values()), {})

    def evaluate_precise(self, model: nn.Module, iterations: int) -> dict[str, Any] | None:
        training = model.training
        model.train()
        try:
            with kept_statistics(model):
                torch.manual_seed(self.cfg.SEED)
                loader = batches(self.training_set(), self.cfg)
                forward = partial(losses_of, model)
                if not recompute_statistics(model, loader, iterations, forward):
                    return None
                logger.info(f"Evaluating with PreciseBN statistics of {iterations} iterations")
                return self._evaluate(model, self.output / "inference_precise_bn")
        finally:
            model.train(training)

    def find_bad_layer(self) -> str | None:
        trainer = self.trainer
        if trainer.last_batch is None:
            return None
        model = trainer.bare_model
        return first_bad_layer(model, lambda: losses_of(model, trainer.last_batch))

    def analyse_flops(self, model: nn.Module) -> FlopCountAnalysis:
        image, _ = self.test_set()[0]
        return FlopCountAnalysis(model, ([image.to(self.cfg.MODEL.DEVICE)],))

    def test_files(self) -> tuple[str, str]:
        report = self.reports[self.cfg.DATASETS.TEST[0]]
        return str(report.annotations), str(report.images)

    def training_set(self) -> ConcatDataset:
        return ConcatDataset(self._dataset(n, training=True) for n in self.cfg.DATASETS.TRAIN)

    def test_set(self) -> DetectionDataset:
        return self._dataset(self.cfg.DATASETS.TEST[0], training=False)

    def _dataset(self, name: str, training: bool) -> DetectionDataset:
        report = self.reports[name]
        return DetectionDataset(report.annotations, report.images, self.cfg, training)
