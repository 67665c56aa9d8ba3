"""Starts a run of the standalone engine in this process."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
from pathlib import Path

from fvcore.common.config import CfgNode

from ..run.command_line import check_run
from ..run.errors import USAGE, ConfigError, one_line
from ..run.trial import Trial
from .config import read_config
from .job import StandaloneJob

_ELSEWHERE = "the standalone engine is one process: several need --engine detectron2"


def launch(args: argparse.Namespace) -> int:
    """Runs what the command line (with ``command``, its text) asks for; returns the exit code."""
    try:
        cfg, notes = build_config(args)
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USAGE
    folder = Path(cfg.OUTPUT_DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _log_to(folder / "log.txt")
    except OSError as error:
        print(f"error: OUTPUT_DIR: {one_line(error)}: name another folder", file=sys.stderr)
        return USAGE
    logger = logging.getLogger(__name__)
    logger.info(f"engine: standalone (torchvision's parts); command: {args.command}")
    for note in notes:
        logger.warning(note)
    return StandaloneJob(cfg, args).execute()


def trial(args: argparse.Namespace) -> Trial:
    """The training that a command line asks for, to be tried; raises ConfigError."""
    cfg, notes = build_config(args)
    return Trial(StandaloneJob(cfg, args), notes)


def build_config(args: argparse.Namespace) -> tuple[CfgNode, list[str]]:
    """The checked, frozen config of a run, and a line for everything that was replaced because
    this machine lacks it. Raises ConfigError for a file, key or value that cannot be run."""
    _check_processes(args)
    cfg = read_config(args.config_file, args.opts)
    notes = check_run(cfg, args)
    if cfg.SEED < 0:
        cfg.SEED = random.SystemRandom().randrange(2**31)
        notes.append(f"SEED: chosen at random, {cfg.SEED}")
    weights = cfg.MODEL.WEIGHTS
    if "://" in weights:
        raise ConfigError(
            f"MODEL.WEIGHTS {weights}: the standalone engine reads files only; download it first"
        )
    cfg.freeze()
    return cfg, notes


def _check_processes(args: argparse.Namespace) -> None:
    if args.num_gpus != 1 or args.num_machines != 1 or args.machine_rank or args.dist_url:
        raise ConfigError(f"--num-gpus, --num-machines, --dist-url: {_ELSEWHERE}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"torchrun started {os.environ['WORLD_SIZE']} processes: {_ELSEWHERE}")


def _log_to(path: Path) -> None:
    """Lines of this package go to stdout and, with those of earlier parts, to a file."""
    logger = logging.getLogger("cbn_det")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    line = logging.Formatter("[%(asctime)s] %(levelname).1s %(message)s", "%m/%d %H:%M:%S")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in (
        logging.StreamHandler(sys.stdout),
        logging.FileHandler(path, encoding="utf-8"),
    ):
        handler.setFormatter(line)
        logger.addHandler(handler)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
