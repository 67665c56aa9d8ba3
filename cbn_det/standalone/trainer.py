"""The training loop of the standalone engine: one process, on the CPU or one GPU."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from ..norms import (
    DoubleForward,
    format_norm_table,
    load_memory_state_dict,
    memory_state_dict,
    norm_diagnostics,
    norm_rows,
    resolve_burn_in,
)
from ..run.checkpoint import AtomicSave
from ..run.clock import RunClock
from ..run.errors import ConfigError, one_line
from ..run.nonfinite import Diverged, check_state
from ..run.signals import Interrupted, StopRequest, stop_requests
from .loading import Sample, batches
from .metrics import Metrics
from .optimizer import build_optimizer, clip_gradients, learning_rate

logger = logging.getLogger(__name__)

_WRITE_PERIOD = 20  # iterations between two lines of metrics.json
_SAMPLING = 2  # random numbers for RoI sampling; the data loader's have other tags


class _Checkpointer(AtomicSave, Checkpointer):
    pass


class Trainer:
    """Trains a detector. Which numbers a training step works with depends on ``SEED`` and the
    iteration alone, so that a resumed run goes on exactly as it would have.

    Args:
        cfg: from :func:`~cbn_det.standalone.config.read_config`, with ``SEED`` >= 0.
        model: of :func:`~cbn_det.standalone.model.build_model`, on its device.
        dataset: for training.
        evaluate: gives the results on ``DATASETS.TEST``.

    Attributes:
        iter: the iteration at work; ``SOLVER.MAX_ITER`` after a whole run.
        last_batch: of the latest step.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: GeneralizedRCNN,
        dataset: Dataset,
        evaluate: Callable[[], dict[str, Any]],
    ) -> None:
        self.cfg = cfg
        self.bare_model = model
        self.dataset = dataset
        self.evaluate = evaluate
        self.iter = self.start_iter = 0
        self.last_batch: list[Sample] | None = None
        self.clock = RunClock()
        self.metrics = Metrics(Path(cfg.OUTPUT_DIR))
        resolve_burn_in(model, cfg.SOLVER.MAX_ITER)
        self.optimizer = build_optimizer(cfg, model)
        self.double_forward = DoubleForward(model)
        self.checkpointer = _Checkpointer(
            model, cfg.OUTPUT_DIR, optimizer=self.optimizer, training=self
        )
        logger.info(format_norm_table(norm_rows(model)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "norm_memory": memory_state_dict(self.bare_model),
            "norms": self._norms(),
            "clock": self.clock.state_dict(),
            "metrics": self.metrics.state_dict(),
        }

    def resume(self) -> None:
        """Goes on from the last checkpoint of ``OUTPUT_DIR``; starts anew where there is none.

        Raises:
            ConfigError: the checkpoint is of another model.
        """
        if not self.checkpointer.has_checkpoint():
            logger.warning(
                f"--resume: no checkpoint in {self.cfg.OUTPUT_DIR}, training starts anew"
            )
            return
        path = self.checkpointer.get_checkpoint_file()
        try:
            self._load(path)
        except Exception as error:  # whatever the bytes of a broken or foreign file make it do
            raise ConfigError(
                f"--resume: {path} is no checkpoint of this run ({one_line(error)[:300]}): start"
                " without --resume, or with another OUTPUT_DIR"
            ) from error
        logger.info(f"resumed {path}")

    def _load(self, path: str) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        training = state["training"]
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if training["norms"] != self._norms():
            logger.warning(f"{path} was trained with other norms: what they remember starts anew")
        else:
            load_memory_state_dict(self.bare_model, training["norm_memory"])
        self.clock.load_state_dict(training["clock"])
        self.metrics.load_state_dict(training["metrics"])
        self.iter = self.start_iter = state["iteration"] + 1

    def train(self) -> dict[str, Any]:
        """Trains from ``start_iter`` and evaluates. After a complete run, evaluates only.

        Returns:
            results of the last evaluation.

        Raises:
            Diverged: a loss, weight or running statistic is not finite.
            Interrupted: SIGINT or SIGTERM; the last whole iteration is saved.
        """
        last = self.cfg.SOLVER.MAX_ITER - 1
        logger.info(f"Training from iteration {self.start_iter} to {last + 1}")
        self.bare_model.train()
        self.clock.start()
        # the last line holds the final evaluation, which is always done
        with self.metrics.writing(min(self.start_iter, last)) as written:
            if self.start_iter and not written:  # stopped after saving, before reporting
                self._report(self.start_iter - 1)
            with stop_requests() as stop:
                self._iterate(stop)
            self.clock.stop()
            self.iter = last + 1
            results = self.evaluate()
            self.metrics.put_results(results)
            self.metrics.write(last)
        return results

    def _iterate(self, stop: StopRequest) -> None:
        solver = self.cfg.SOLVER
        saver = PeriodicCheckpointer(self.checkpointer, solver.CHECKPOINT_PERIOD, solver.MAX_ITER)
        loader = batches(self.dataset, self.cfg, self.start_iter)
        for iteration in range(self.start_iter, solver.MAX_ITER):
            self.iter = iteration
            self.clock.start_step()
            self._step(next(loader))
            self.clock.end_step()
            done = iteration + 1
            stopping = stop.requested and done < solver.MAX_ITER
            if done % solver.CHECKPOINT_PERIOD == 0 or stopping or self._line_due(done):
                check_state(self.bare_model)  # only finite weights are worth saving or evaluating
            if self._line_due(done):
                self.metrics.put(norm_diagnostics(self.bare_model))
            saver.step(iteration)
            if stopping:
                self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
                raise Interrupted(f"interrupted at iteration {iteration}")
            self._report(iteration)

    def _step(self, batch: list[Sample]) -> None:
        started = time.perf_counter()
        self.last_batch = batch
        rate = learning_rate(self.cfg, self.iter)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = np.random.SeedSequence([self.cfg.SEED, _SAMPLING, self.iter])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        losses = losses_of(self.bare_model, batch)
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"losses not finite: {', '.join(bad)}")
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        clip_gradients(self.cfg, self.bare_model)
        self.optimizer.step()
        self.double_forward.refresh()
        self.metrics.put_losses(values)
        self.metrics.put({"lr": rate, "time": time.perf_counter() - started})

    def _report(self, iteration: int) -> None:
        """Evaluates and writes a line after an iteration for which that is due."""
        done, end = iteration + 1, self.cfg.SOLVER.MAX_ITER
        if done >= end or not self._line_due(done):
            return
        if self._evaluation_due(done):
            self.metrics.put_results(self.evaluate())
            self.bare_model.train()
        line = self.metrics.write(iteration)
        left = int((self.clock.sec_per_iter or 0.0) * (end - done))
        losses = "  ".join(f"{k}: {v:.3f}" for k, v in line.items() if "loss" in k)
        logger.info(
            f"iter: {iteration}  eta: {left // 60}:{left % 60:02d}  {losses}"
            f"  time: {line['time']:.3f}  lr: {line['lr']:.5g}"
        )

    def _line_due(self, done: int) -> bool:
        end = self.cfg.SOLVER.MAX_ITER
        return done == end or done % _WRITE_PERIOD == 0 or self._evaluation_due(done)

    def _evaluation_due(self, done: int) -> bool:
        period = self.cfg.TEST.EVAL_PERIOD
        return period > 0 and done % period == 0

    def _norms(self) -> dict[str, str]:
        return {row.name: row.norm for row in norm_rows(self.bare_model)}


def losses_of(model: GeneralizedRCNN, batch: list[Sample]) -> dict[str, Tensor]:
    """The losses of a training batch as the data loader gives it, on the model's device."""
    device = next(model.parameters()).device
    images = [image.to(device) for image, _ in batch]
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in batch]
    return model(images, targets)
