"""Trains a LazyConfig as detectron2's ``tools/lazyconfig_train_net.py`` does, with what the norms
need: a burn-in that knows its schedule, pooled running statistics, MBN's second pass."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..norms import (
    DoubleForward,
    check_bindings,
    find_chain_at_call,
    format_norm_table,
    norm_rows,
    resolve_burn_in,
    sync_running_stats,
)
from ..run.errors import ConfigError, one_line
from ..run.job import STOPPED, USAGE
from .checkpointer import AtomicCheckpointer
from .launch import read_layout
from .processes import run_processes
from .registry import register
from .step import OptimizerOfConfig

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs the launcher, with detectron2's arguments, and returns its exit code."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url=None)  # one port for all runs of a user
    args = parser.parse_args(argv)
    try:
        layout = read_layout(args)
        device = _load(args).train.device
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USAGE
    try:
        code, death = run_processes(layout, device, run, (args,))
    except KeyboardInterrupt:
        return STOPPED
    if death:
        print(f"error: {death}", file=sys.stderr)
    return code


def run(args: argparse.Namespace) -> int:
    """Trains or evaluates in one process of several, and returns the exit code."""
    cfg = _load(args)
    default_setup(cfg, args)
    model = instantiate(cfg.model).to(cfg.train.device)
    logger.info(format_norm_table(norm_rows(model)))
    try:
        if args.eval_only:
            path = cfg.train.init_checkpoint
            AtomicCheckpointer(model).load_complete(path, f"train.init_checkpoint {path}")
            find_chain_at_call(model)
            evaluate(cfg, model)
        else:
            train(cfg, model, resume=args.resume)
    except ConfigError as error:
        if comm.is_main_process():
            print(f"error: {one_line(error)}", file=sys.stderr)
        return USAGE
    return 0


def _load(args: argparse.Namespace) -> Any:
    register()  # before anything is instantiated, in every process
    return LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)


def train(cfg: Any, model: nn.Module, resume: bool = False) -> SimpleTrainer:
    """Trains a model of a LazyConfig.

    Args:
        cfg: with what detectron2's script reads: ``optimizer``, ``lr_multiplier``, ``dataloader``
            and ``train``.
        model: instantiated, on its device.
        resume: go on from the last checkpoint in ``train.output_dir``, with the optimizer's options
            and the schedule of ``cfg``. What norms remember starts anew, their burn-in goes on.

    Returns:
        The trainer, after its last iteration.
    """
    options = cfg.train
    check_bindings(model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # at resume, too, the schedule's is the config's
    on_gpu = next(model.parameters()).is_cuda
    devices = [torch.cuda.current_device()] if on_gpu else None
    wrapped = create_ddp_model(model, **{"device_ids": devices, **options.ddp})
    loader = instantiate(cfg.dataloader.train)
    kind = _MixedPrecision if options.amp.enabled else OptimizerOfConfig
    trainer = kind(wrapped, loader, optimizer)
    checkpointer = AtomicCheckpointer(wrapped, options.output_dir, trainer=trainer)
    main_process = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            NormHook(model, options.eval_period, options.checkpointer.period),
            (
                hooks.PeriodicCheckpointer(checkpointer, **options.checkpointer)
                if main_process
                else None
            ),
            hooks.EvalHook(options.eval_period, lambda: evaluate(cfg, model)),
            (
                hooks.PeriodicWriter(
                    default_writers(options.output_dir, options.max_iter),
                    period=options.log_period,
                )
                if main_process
                else None
            ),
        ]
    )
    checkpointer.resume_or_load(options.init_checkpoint, resume=resume)
    started = resume and checkpointer.has_checkpoint()
    start_iter = trainer.iter + 1 if started else 0
    resolve_burn_in(model, options.max_iter, start_iter)
    trainer.train(start_iter, options.max_iter)
    return trainer


class _MixedPrecision(OptimizerOfConfig, AMPTrainer):
    pass


class NormHook(HookBase):
    """What the norms of a model need of a training loop besides a resolved burn-in; for any of
    detectron2's trainers, on all ranks, before the hooks that save and evaluate.

    Args:
        model: bare, not wrapped for several processes.
        periods: of evaluations and checkpoints, in iterations; 0 is never but at the end.
    """

    def __init__(self, model: nn.Module, *periods: int) -> None:
        self._model = model
        self._double_forward = DoubleForward(model, getattr(model, "proposal_generator", None))
        self._periods = [period for period in periods if period > 0]
        find_chain_at_call(model)

    def after_step(self) -> None:
        with EventStorage():  # what heads log of the second pass is dropped
            self._double_forward.refresh()
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            sync_running_stats(self._model)


def evaluate(cfg: Any, model: nn.Module) -> dict[str, Any] | None:
    """Results on ``dataloader.test``; None without a ``dataloader.evaluator``."""
    if "evaluator" not in cfg.dataloader:
        return None
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results
