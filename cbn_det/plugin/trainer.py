"""detectron2's trainer with what these norms need: burn-in, pooled statistics, memory, checks."""

from __future__ import annotations

import contextlib
import io
import logging
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..data.coco_api import detections_counted, number_annotations
from ..norms import (
    DoubleForward,
    check_bindings,
    find_chain_at_call,
    format_norm_table,
    norm_rows,
    resolve_burn_in,
)
from ..run.measure import RunClock
from ..run.norm_schedule import NormSchedule
from ..run.signals import ignore_interrupts, stop_requests
from .checkpointer import AtomicCheckpointer
from .config import FULL_MODEL, scale_schedule
from .hooks import EvalHook, PreciseBN, Reports, Save, report_norms
from .loading import build_loader, place, seed_step
from .registry import unused_norms
from .resume import ResumableTrainer
from .step import CheckedStep

logger = logging.getLogger(__name__)

_WRITE_PERIOD = 20  # iterations between two lines of metrics.json


class Trainer(ResumableTrainer):
    """Trains, evaluates and checkpoints a config; use it as detectron2's ``DefaultTrainer``.

    Call :func:`cbn_det.register` first, then ``resume_or_load()``, then ``train()``. With several
    processes it works on GPUs and, over gloo, on CPU.

    It resumes exactly: see :class:`.resume.ResumableTrainer`.

    Args:
        cfg: of detectron2.
        accumulate: mini-batches of ``SOLVER.IMS_PER_BATCH`` images in an optimiser step, which is
            one iteration.

    Attributes:
        results: of the last evaluation, as detectron2 returns it; empty on ranks other than 0.
        reports: what is written as training goes; None on ranks other than 0.
        unused_norms: config keys that name a norm of ours but gave the model no layer of it.
    """

    def __init__(self, cfg: CfgNode, accumulate: int = 1) -> None:
        # DefaultTrainer's own __init__ cannot wrap a CPU model in DDP
        TrainerBase.__init__(self)
        cfg = scale_schedule(cfg, comm.get_world_size(), accumulate)
        model = self.build_model(cfg)
        check_bindings(model)
        resolve_burn_in(model, cfg.SOLVER.MAX_ITER)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        on_gpu = next(model.parameters()).is_cuda
        wrapped = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=[torch.cuda.current_device()] if on_gpu else None,
            # else gradients are packed anew after a process's first step, and where in a buffer a
            # gradient lies decides in what order those of more than two ranks are added up
            find_unused_parameters=not on_gpu and comm.get_world_size() > 2,
        )
        mixed = cfg.SOLVER.AMP.ENABLED
        self._trainer = CheckedStep(wrapped, loader, optimizer, accumulate, mixed)
        self.bare_model = model
        self.double_forward = DoubleForward(model, getattr(model, "proposal_generator", None))
        self._norm_schedule = NormSchedule(
            model, cfg.SOLVER.MAX_ITER, self._batches_of_freeze, cfg.TEST.PRECISE_BN.NUM_ITER
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(
            model, cfg.OUTPUT_DIR, cfg, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.results: dict[str, Any] = {}
        self.clock = RunClock()
        self.reports: Reports | None = None
        self._prepare_to_resume(cfg.SEED)
        self.register_hooks(self.build_hooks())
        logger.info(format_norm_table(norm_rows(model)))
        self.unused_norms = unused_norms(cfg, model)
        for key in self.unused_norms:
            logger.warning(
                f"{key}: the model has no layer of this norm. Code that knows norms by names of its"
                " own must ask detectron2.layers.get_norm for the others",
            )

    def build_hooks(self) -> list[hooks.HookBase]:
        cfg, main = self.cfg, comm.is_main_process()
        period, precise = cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN
        found = [hooks.IterationTimer(), hooks.LRScheduler()]
        if precise.ENABLED and get_bn_modules(self.bare_model):
            loader = self.build_train_loader(in_process_loading(cfg))
            found.append(PreciseBN(period, self.bare_model, loader, precise.NUM_ITER))
        if main:
            self.reports = Reports(self.build_writers(), _WRITE_PERIOD)
            found.append(hooks.CallbackHook(after_step=partial(report_norms, period=_WRITE_PERIOD)))
        # those behind Save run again after a resume: ResumableTrainer says why
        found += [Save(), EvalHook(period, self.evaluate)]
        return found + [self.reports] * main

    @property
    def step(self) -> CheckedStep:
        """The object that makes single training steps."""
        return self._trainer

    @property
    def last_batch(self) -> Any:
        """The latest mini-batch of this rank."""
        return self._trainer.last_batch

    def train(self) -> dict[str, Any]:
        """Trains from ``start_iter`` and evaluates. After a complete run, evaluates only.

        Returns:
            :attr:`results`.

        Raises:
            Diverged: a loss, weight or running statistic is not finite; on all ranks.
            Interrupted: SIGINT or SIGTERM; the last whole iteration is saved.
        """
        logger.info(f"Training from iteration {self.start_iter} to {self.max_iter}")
        self.iter = self.start_iter
        place(self.data_loader, self.seed, self.start_iter * self.step.accumulate)
        self.clock.start()
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                if self._resuming:
                    self._end_saved_iteration()
                with stop_requests() as self._trainer.stop_request:
                    for iteration in range(self.start_iter, self.max_iter):
                        self.iter = iteration
                        self.before_step()
                        self.clock.start_step()
                        self.run_step()
                        self.clock.end_step()
                        self.after_step()
                self.iter = self.max_iter  # tells after_train that training succeeded
            finally:
                self.clock.stop()
                self.after_train()
        return self.results

    def batches(self) -> Iterator[Any]:
        """This rank's mini-batches, from the first one on."""
        place(self.data_loader, self.seed)
        return iter(self.data_loader)

    def try_step(self, iteration: int, batches: Iterator[Any]) -> None:
        """A step of a training that is only tried."""
        self.iter = iteration
        self.step.reset_data_loader(lambda: batches)
        with EventStorage() as self.storage:
            self.run_step()

    def before_step(self) -> None:
        with EventStorage():  # what heads log of these forwards is dropped
            self._norm_schedule.before_step(self.iter)
        super().before_step()

    def _batches_of_freeze(self) -> Iterator[Any]:
        """The same images and random numbers in a resumed run."""
        seed_step(self.seed, comm.get_rank(), self.iter)
        loader = self.build_train_loader(in_process_loading(self.cfg))
        place(loader, self.seed)
        return iter(loader)

    def run_step(self) -> None:
        """One optimiser step, and the second pass over its images where an MBN layer wants it.

        Training forwards outside of it (losses of a validation set) are not run again; under
        ``torch.no_grad()`` no norm remembers them.
        """
        # neither those, nor the images of a step that was skipped, which are in no checkpoint
        self.double_forward.forget()
        seed_step(self.seed, comm.get_rank(), self.iter)
        super().run_step()
        with EventStorage():  # what heads log of the second pass is dropped
            self.double_forward.refresh()

    def evaluate(self) -> dict[str, Any]:
        """Evaluates the model as it is on ``DATASETS.TEST``. All ranks must call it."""
        self.results = self.test(self.cfg, self.bare_model)
        return self.results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """detectron2's; KN and GKN layers find what precedes them when it is called."""
        model = super().build_model(cfg)
        find_chain_at_call(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """detectron2's, which also takes ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` ``full_model``: the
        norm of all gradients together is clipped, as mmdetection and DETR do it, where ``norm``
        clips each parameter's."""
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not (clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL):
            return super().build_optimizer(cfg, model)
        unclipped = cfg.clone()
        unclipped.defrost()
        unclipped.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(unclipped, model)

        def clip_all(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        # a GradScaler, too, has unscaled the gradients by then
        optimizer.register_step_pre_hook(clip_all)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Endless training batches; see :func:`.loading.build_loader`, which takes a mapper."""
        return build_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """detectron2's, whose processes leave interrupts to this one."""
        loader = super().build_test_loader(cfg, dataset_name)
        loader.worker_init_fn = ignore_interrupts
        return loader

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output: Path | None = None
    ) -> DatasetEvaluator:
        """COCO evaluation of boxes, masks and keypoints, whichever the model predicts. The limit of
        predictions follows ``TEST.DETECTIONS_PER_IMAGE``, and annotations may have any ids.

        Args:
            output: folder for the predictions of the first set, those of others go below it; by
                default ``OUTPUT_DIR``.

        Raises:
            ValueError: the data set asks for another kind of evaluation.
        """
        check_evaluable(dataset_name)
        output = output or Path(cfg.OUTPUT_DIR)
        if dataset_name != cfg.DATASETS.TEST[0]:
            output /= dataset_name
        limit = detections_counted(cfg)
        evaluator = COCOEvaluator(dataset_name, output_dir=str(output), max_dets_per_image=limit)
        with contextlib.redirect_stdout(io.StringIO()):
            number_annotations(evaluator._coco_api)
        return evaluator

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None, output: Path | None = None
    ) -> dict[str, Any]:
        """Evaluates on ``DATASETS.TEST``; ``output`` is that of :meth:`build_evaluator`."""
        names = cfg.DATASETS.TEST
        if not names:
            return {}
        find_chain_at_call(model)
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name, output) for name in names]
        return super().test(cfg, model, evaluators)


def check_evaluable(dataset_name: str) -> None:
    """Refuses a test set that COCO evaluation of instances does not fit.

    Raises:
        ValueError: names the data set and what it asks for.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind != "coco":
        raise ValueError(
            f"DATASETS.TEST: {dataset_name} asks for '{kind}' evaluation; this trainer evaluates"
            " COCO boxes, masks and keypoints. Subclass cbn_det.plugin.trainer.Trainer and override"
            " build_evaluator"
        )


def in_process_loading(cfg: CfgNode) -> CfgNode:
    """For a short-lived second loader: no worker processes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.freeze()
    return cfg
