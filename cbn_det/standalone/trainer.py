"""The training loop of the standalone engine: one process, on the CPU or one GPU."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from ..norms import (
    DoubleForward,
    format_norm_table,
    norm_diagnostics,
    norm_rows,
    resolve_burn_in,
)
from ..run.checkpoint import (
    AtomicSave,
    fit_optimizer_state,
    load_norm_state,
    norm_state,
    parameter_names,
    settings,
    settings_changes,
)
from ..run.errors import ConfigError, one_line
from ..run.loading import seed_random
from ..run.measure import RunClock
from ..run.nonfinite import Diverged, check_state
from ..run.norm_schedule import NormSchedule
from ..run.signals import Interrupted, StopRequest, stop_requests
from .loading import Sample, batches
from .metrics import Metrics
from .optimizer import build_optimizer, clip_gradients, learning_rate
from .weights import check

logger = logging.getLogger(__name__)

_WRITE_PERIOD = 20  # iterations between two lines of metrics.json
# torchvision's names of what detectron2 calls otherwise, so that curves of both engines overlay
_NAMES = {
    "loss_classifier": "loss_cls",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
}
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
        accumulate: mini-batches in an optimiser step, which is one iteration and takes the average
            of their losses.

    Attributes:
        iter: the iteration at work; ``SOLVER.MAX_ITER`` after a whole run.
        last_batch: the latest mini-batch.
        unused_norms: none, as they are refused when the model is built.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: GeneralizedRCNN,
        dataset: Dataset,
        evaluate: Callable[[], dict[str, Any]],
        accumulate: int = 1,
    ) -> None:
        self.cfg = cfg
        self.bare_model = model
        self.dataset = dataset
        self.evaluate = evaluate
        self.accumulate = accumulate
        self.iter = self.start_iter = 0
        self.last_batch: list[Sample] | None = None
        self.unused_norms: list[str] = []
        self.clock = RunClock()
        self.metrics = Metrics(Path(cfg.OUTPUT_DIR))
        resolve_burn_in(model, cfg.SOLVER.MAX_ITER)
        self.optimizer = build_optimizer(cfg, model)
        self.double_forward = DoubleForward(model, getattr(model, "rpn", None))
        self._norm_schedule = NormSchedule(
            model,
            cfg.SOLVER.MAX_ITER,
            self._batches_of_freeze,
            cfg.TEST.PRECISE_BN.NUM_ITER,
            lambda batch: losses_of(model, batch),
        )
        self.checkpointer = _Checkpointer(
            model, cfg.OUTPUT_DIR, optimizer=self.optimizer, training=self
        )
        logger.info(format_norm_table(norm_rows(model)))

    def state_dict(self) -> dict[str, Any]:
        return {
            **norm_state(self.bare_model),
            "settings": settings(self.cfg, self.cfg.SEED, self.accumulate),
            "parameter_names": parameter_names(self.optimizer, self.bare_model),
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
        except ConfigError:
            raise
        except Exception as error:  # whatever the bytes of a broken or foreign file make it do
            raise ConfigError(
                f"--resume: {path} is no checkpoint of this run ({one_line(error)[:300]}): start"
                " without --resume, or with another OUTPUT_DIR"
            ) from error
        logger.info(f"resumed {path}")

    def _load(self, path: str) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        training = state["training"]
        check(self.bare_model, state["model"], f"--resume: {path}", complete=True)
        self.bare_model.load_state_dict(state["model"])
        fitted, optimizer_change = fit_optimizer_state(
            self.optimizer, self.bare_model, state["optimizer"], training["parameter_names"]
        )
        self.optimizer.load_state_dict(fitted)
        self.iter = self.start_iter = state["iteration"] + 1
        schedule = (self.start_iter, self.cfg.SOLVER.MAX_ITER)
        changes = [load_norm_state(self.bare_model, training, *schedule)]
        now = settings(self.cfg, self.cfg.SEED, self.accumulate)
        changes += [optimizer_change, *settings_changes(training["settings"], now)]
        if any(changes):
            why = "; ".join(filter(None, changes))
            logger.warning(f"the checkpoint cannot be resumed exactly: {why}")
        self.clock.load_state_dict(training["clock"])
        self.metrics.load_state_dict(training["metrics"])

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
            if 0 < self.start_iter <= last:
                if written:
                    self.metrics.begin_line()
                else:  # stopped after saving, before reporting
                    self._report(self.start_iter - 1)
            try:
                with stop_requests() as stop:
                    self._iterate(stop)
            finally:
                self.clock.stop()
            self.iter = last + 1
            results = self.evaluate()
            self.metrics.put(results)
            self._write_line(last)
        return results

    def _iterate(self, stop: StopRequest) -> None:
        solver = self.cfg.SOLVER
        saver = PeriodicCheckpointer(self.checkpointer, solver.CHECKPOINT_PERIOD, solver.MAX_ITER)
        loader = self.batches()
        for iteration in range(self.start_iter, solver.MAX_ITER):
            self.iter = iteration
            self._norm_schedule.before_step(iteration)
            self.clock.start_step()
            self._step(loader)
            self.clock.end_step()
            done = iteration + 1
            stopping = stop.requested
            if done % solver.CHECKPOINT_PERIOD == 0 or stopping or self._line_due(done):
                check_state(self.bare_model)  # only finite weights are worth saving or evaluating
            if self._line_due(done):
                self.metrics.put(norm_diagnostics(self.bare_model))
            saver.step(iteration)
            if stopping:
                if done < solver.MAX_ITER:
                    self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
                raise Interrupted(f"interrupted at iteration {iteration}")
            self._report(iteration)

    def batches(self) -> Iterator[list[Sample]]:
        """The mini-batches that are left."""
        return batches(self.dataset, self.cfg, self.start_iter * self.accumulate)

    def try_step(self, iteration: int, loader: Iterator[list[Sample]]) -> None:
        """A step of a training that is only tried."""
        self.iter = iteration
        self._step(loader)

    def _step(self, loader: Iterator[list[Sample]]) -> None:
        seconds = 0.0  # without those of loading
        rate = learning_rate(self.cfg, self.iter)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed_random([self.cfg.SEED, _SAMPLING, self.iter])
        averages: dict[str, float] = {}
        self.optimizer.zero_grad()
        for _ in range(self.accumulate):
            self.last_batch = next(loader)
            started = time.perf_counter()
            for name, value in self._backward(self.last_batch).items():
                averages[name] = averages.get(name, 0.0) + value / self.accumulate
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        clip_gradients(self.cfg, self.bare_model)
        self.optimizer.step()
        self.double_forward.refresh()
        seconds += time.perf_counter() - started
        self.metrics.put_losses(averages)
        self.metrics.put({"lr": rate, "time": seconds})

    def _batches_of_freeze(self) -> Iterator[list[Sample]]:
        torch.manual_seed(self.cfg.SEED)  # for RoI sampling; a resumed run takes the same
        return batches(self.dataset, self.cfg)

    def _backward(self, batch: list[Sample]) -> dict[str, float]:
        """Adds the gradients of one mini-batch and returns its losses."""
        losses = losses_of(self.bare_model, batch)
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"losses not finite: {', '.join(bad)}")
        (sum(losses.values()) / self.accumulate).backward()
        return values

    def _report(self, iteration: int) -> None:
        """Evaluates and writes a line after an iteration for which that is due."""
        done, end = iteration + 1, self.cfg.SOLVER.MAX_ITER
        if done >= end or not self._line_due(done):
            return
        if self._evaluation_due(done):
            self.metrics.put(self.evaluate())
            self.bare_model.train()
        self._write_line(iteration)

    def _write_line(self, iteration: int) -> None:
        line = self.metrics.write(iteration)
        if "lr" not in line:
            return  # a finished run, evaluated again
        left = int((self.clock.sec_per_iter or 0.0) * (self.cfg.SOLVER.MAX_ITER - iteration - 1))
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


def losses_of(model: GeneralizedRCNN, batch: list[Sample]) -> dict[str, Tensor]:
    """The losses of a training batch as the data loader gives it, on the model's device."""
    device = next(model.parameters()).device
    images = [image.to(device) for image, _ in batch]
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in batch]
    return {_NAMES.get(name, name): loss for name, loss in model(images, targets).items()}
