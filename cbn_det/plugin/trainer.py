"""detectron2's trainer with what these norms need: burn-in, pooled statistics, memory, checks."""

from __future__ import annotations

import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..norms import (
    DoubleForward,
    check_bindings,
    find_chain_at_call,
    format_norm_table,
    norm_rows,
    resolve_burn_in,
)
from ..run.clock import RunClock
from ..run.folder import PREDICTIONS
from ..run.precise_bn import kept_statistics, recompute_statistics
from ..run.signals import StopRequest, ignore_interrupts, stop_requests
from .checkpointer import AtomicCheckpointer
from .evaluation import Evaluator
from .hooks import (
    ClockHook,
    EvalHook,
    Freeze,
    NormDiagnostics,
    PeriodicCheckpointer,
    PreciseBN,
    SettleStatistics,
    StopOnRequest,
)
from .loading import build_loader, place, seed_step
from .optimizer import build_optimizer
from .registry import norms_in_use, told_apart, unused_norms
from .reports import Reports
from .resume import ResumableTrainer
from .scaling import scale_schedule
from .step import CheckedAMPStep, CheckedStep
from .weights import check_weights

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
        model = self.build_model(told_apart(cfg))
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
        step = CheckedAMPStep if cfg.SOLVER.AMP.ENABLED else CheckedStep
        self._trainer = step(wrapped, loader, optimizer, accumulate=accumulate)
        self.bare_model = model
        self.double_forward = DoubleForward(model, getattr(model, "proposal_generator", None))
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
        self.unused_norms = self._tell_unused_norms()

    def _tell_unused_norms(self) -> list[str]:
        in_use, unused = norms_in_use(self.cfg), unused_norms(self.cfg, self.bare_model)
        for key in unused:
            logger.log(
                logging.WARNING if key in in_use else logging.INFO,
                f"{key}: the model has no layer of this norm. Code that knows norms by names of its"
                " own must ask detectron2.layers.get_norm for the others",
            )
        return [key for key in unused if key in in_use]

    auto_scale_workers = staticmethod(scale_schedule)

    def resume_or_load(self, resume: bool = True) -> None:
        """See :class:`.resume.ResumableTrainer`.

        Raises:
            ConfigError: the checkpoint is another model's, or the weights of ``MODEL.WEIGHTS`` do
                not fit the norms; see :func:`.weights.check_weights`.
        """
        super().resume_or_load(resume)
        resumed = resume and self.checkpointer.has_checkpoint()
        if self.checkpointer.incompatible is not None and not resumed:
            check_weights(self.bare_model, self.checkpointer.incompatible, self.cfg)

    def build_hooks(self) -> list[hooks.HookBase | None]:
        cfg = self.cfg
        precise = cfg.TEST.PRECISE_BN
        wanted = precise.ENABLED and get_bn_modules(self.bare_model)
        main = comm.is_main_process()
        if main:
            self.reports = Reports(self.build_writers(), _WRITE_PERIOD)
        return [
            Freeze(
                self.bare_model,
                cfg.SOLVER.MAX_ITER,
                lambda: self.build_train_loader(_in_process_loading(cfg)),
                precise.NUM_ITER,
            ),
            ClockHook(self.clock),
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            (
                PreciseBN(
                    cfg.TEST.EVAL_PERIOD,
                    self.bare_model,
                    self.build_train_loader(_in_process_loading(cfg)),
                    precise.NUM_ITER,
                )
                if wanted
                else None
            ),
            NormDiagnostics(_WRITE_PERIOD) if main else None,
            SettleStatistics(cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD),
            PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
            StopOnRequest(),
            # those from here on run again after a resume: ResumableTrainer says why
            EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate),
            self.reports,
        ]

    @property
    def step(self) -> CheckedStep:
        """The object that makes single training steps."""
        return self._trainer

    @property
    def stopping(self) -> bool:
        """Whether all ranks have agreed to stop after this iteration."""
        return self._trainer.stop_agreed

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
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                if self._resuming:
                    self._end_saved_iteration()
                with stop_requests() as self._trainer.stop_request:
                    for iteration in range(self.start_iter, self.max_iter):
                        self.iter = iteration
                        self.before_step()
                        self.run_step()
                        self.after_step()
                self._trainer.stop_request = StopRequest()
                self.iter = self.max_iter  # tells after_train that training succeeded
            finally:
                self.after_train()
        return self.results

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

    def evaluate_precise(self, iterations: int) -> dict[str, Any] | None:
        """Evaluates once more with PreciseBN statistics, which are taken back afterwards."""
        return evaluate_precise(self.cfg, self.bare_model, iterations)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """detectron2's; KN and GKN layers find what precedes them when it is called."""
        model = super().build_model(cfg)
        find_chain_at_call(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

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
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        """COCO evaluation of boxes, masks and keypoints, whichever the model predicts.

        Raises:
            ValueError: the data set asks for another kind of evaluation.
        """
        check_evaluable(dataset_name)
        output = Path(cfg.OUTPUT_DIR, folder)
        if len(cfg.DATASETS.TEST) > 1:
            output /= dataset_name
        return Evaluator(dataset_name, cfg, output)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None, folder: str = "inference"
    ) -> dict[str, Any]:
        """Evaluates on ``DATASETS.TEST``; predictions are left in ``OUTPUT_DIR/<folder>``, and if
        that is an ``inference`` those of the first set beside it."""
        names = cfg.DATASETS.TEST
        if not names:
            return {}
        find_chain_at_call(model)
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name, folder) for name in names]
        results = super().test(cfg, model, evaluators)
        output = Path(cfg.OUTPUT_DIR, folder)
        if output.name == "inference" and comm.is_main_process():
            source = output / (names[0] if len(names) > 1 else "") / PREDICTIONS
            if source.exists():  # absent if there was no prediction at all
                shutil.copyfile(source, output.with_name(PREDICTIONS))
        return results


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


def evaluate_precise(
    cfg: CfgNode, model: nn.Module, iterations: int, folder: str = "inference_precise_bn"
) -> dict[str, Any] | None:
    """Evaluates with running statistics recomputed over ``iterations`` training batches.

    The batches are the same in every call with the same ``SEED``; the statistics are put back
    afterwards. All ranks must call it.

    Args:
        model: the bare model.
        folder: within ``OUTPUT_DIR``, for the predictions.

    Returns:
        Results, or None if the model has no BatchNorm layer to recompute.
    """
    training = model.training
    model.train()
    try:
        with kept_statistics(model):
            seed_all_rng(max(cfg.SEED, 0) + comm.get_rank())
            loader = Trainer.build_train_loader(_in_process_loading(cfg))
            place(loader, max(cfg.SEED, 0))
            with EventStorage():  # what heads log of these forwards is dropped
                count = recompute_statistics(model, loader, iterations)
            if not count:
                return None
            logger.info(f"Evaluating with PreciseBN statistics of {iterations} iterations")
            return Trainer.test(cfg, model, folder=folder)
    finally:
        model.train(training)


def _in_process_loading(cfg: CfgNode) -> CfgNode:
    """For a short-lived second loader: no worker processes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.freeze()
    return cfg
