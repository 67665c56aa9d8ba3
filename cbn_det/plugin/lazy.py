"""Trains a LazyConfig as detectron2's ``tools/lazyconfig_train_net.py`` does, with
:class:`~.norm_hook.NormHook`."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn

from ..config_files import find_config
from ..norms import find_chain_at_call, format_norm_table, norm_rows
from ..run.command_line import usable_device
from ..run.errors import USAGE, ConfigError, one_line
from .checkpointer import AtomicCheckpointer
from .launch import is_first, read_layout, run_processes
from .norm_hook import NormHook
from .registry import register
from .step import CheckedStep

logger = logging.getLogger("detectron2.lazy")  # which default_setup sends to the log


def main(argv: list[str] | None = None) -> int:
    """Runs the launcher, with detectron2's arguments, and returns its exit code."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url=None)  # one port for all runs of a user
    args = parser.parse_args(argv)
    try:
        layout = read_layout(args)
        args.config_file = find_config(args.config_file)
        cfg, notes = _load(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    for note in notes if is_first() else ():
        print(f"note: {note}", file=sys.stderr)
    code, death = run_processes(layout, cfg.train.device, run, (args,))
    if death:
        print(f"error: {death}", file=sys.stderr)
    return code


def run(args: argparse.Namespace) -> int:
    """Trains or evaluates in one process of several, and returns the exit code."""
    cfg, _ = _load(args)
    default_setup(cfg, args)
    try:
        model = _make(cfg, "model").to(cfg.train.device)
        logger.info(format_norm_table(norm_rows(model)))
        if args.eval_only:
            path = cfg.train.init_checkpoint
            AtomicCheckpointer(model).load_complete(path, f"train.init_checkpoint {path}")
            find_chain_at_call(model)
            evaluate(cfg, model)
        else:
            train(cfg, model, resume=args.resume)
    except ConfigError as error:
        with open(Path(cfg.train.output_dir, "log.txt"), "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        if comm.is_main_process():
            print(f"error: {one_line(error)}", file=sys.stderr)
        return USAGE
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """The config as this machine can run it, and a line for everything that was replaced."""
    register()  # before anything is instantiated, in every process
    with _named(f"--config-file {args.config_file}"):
        cfg = LazyConfig.load(args.config_file)
        for word in args.opts:
            with _named(word):
                LazyConfig.apply_overrides(cfg, [word])
        cfg.train.device, notes = usable_device("train.device", str(cfg.train.device))
        if notes and cfg.train.amp.enabled:
            raise ConfigError("train.amp.enabled needs a GPU: set it to False")
    return cfg, notes


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Whatever goes wrong within is told with a key of the config."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a LazyConfig calls any code
        message = one_line(error) or type(error).__name__
        if key.startswith("dataloader") and isinstance(error, FileNotFoundError):
            message += ": the variable DETECTRON2_DATASETS names the folder of detectron2's sets"
        raise ConfigError(f"{key}: {message}") from error


def _make(cfg: Any, key: str) -> Any:
    with _named(key):
        return instantiate(OmegaConf.select(cfg, key))


def train(cfg: Any, model: nn.Module, resume: bool = False) -> CheckedStep:
    """Trains a model, instantiated and on its device, as the rest of a LazyConfig says, and returns
    the trainer. With ``resume`` it goes on from the last checkpoint in ``train.output_dir``, with
    the optimizer's options and the schedule of ``cfg``.

    Raises:
        ConfigError: something cannot be built from ``cfg``; names its key.
    """
    options, main = cfg.train, comm.is_main_process()
    loader = _make(cfg, "dataloader.train")
    if "evaluator" in cfg.dataloader:  # missing files are told now, not after hours
        _make(cfg, "dataloader.test")
    with _named("model"):
        norms = NormHook(model)
    cfg.optimizer.params.model = model
    optimizer = _make(cfg, "optimizer")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # at resume, too, the schedule's is the config's
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    wrapped = create_ddp_model(model, **{"device_ids": devices, **options.ddp})
    trainer = CheckedStep(wrapped, loader, optimizer, mixed_precision=options.amp.enabled)
    checkpointer = AtomicCheckpointer(wrapped, options.output_dir, trainer=trainer)
    writers = default_writers(options.output_dir, options.max_iter) if main else []
    trainer.register_hooks(
        [
            norms,
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=_make(cfg, "lr_multiplier")),
            hooks.PeriodicCheckpointer(checkpointer, **options.checkpointer) if main else None,
            hooks.EvalHook(options.eval_period, lambda: evaluate(cfg, model)),
            hooks.PeriodicWriter(writers, options.log_period) if main else None,
        ]
    )
    with _named(f"train.init_checkpoint {options.init_checkpoint}"):
        checkpointer.resume_or_load(options.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, options.max_iter)
    return trainer


def evaluate(cfg: Any, model: nn.Module) -> dict[str, Any] | None:
    """Results on ``dataloader.test``; None without a ``dataloader.evaluator``."""
    if "evaluator" not in cfg.dataloader:
        return None
    loader, evaluator = _make(cfg, "dataloader.test"), _make(cfg, "dataloader.evaluator")
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results
