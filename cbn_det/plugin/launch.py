"""Starts a run on detectron2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..run import folder as run_folder
from ..run.errors import ConfigError, one_line
from ..run.job import STOPPED, USAGE
from . import job
from .config import build_config
from .processes import Layout, run_processes, torchrun_layout, under_torchrun


def launch(args: argparse.Namespace) -> int:
    """Runs what the command line asks for and returns the exit code (see ``--help``).

    Args:
        args: of :func:`~cbn_det.run.arguments.argument_parser`, with ``command``, their text.
    """
    try:
        layout = read_layout(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    try:
        cfg, notes = build_config(args, layout.world_size)
    except ValueError as error:
        if layout.is_first:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return USAGE
    try:
        code, death = run_processes(layout, cfg.MODEL.DEVICE, job.run, (cfg, notes, args))
    except KeyboardInterrupt:
        return STOPPED
    if death:
        print(f"error: {death}", file=sys.stderr)
        folder = Path(cfg.OUTPUT_DIR)
        if not args.eval_only and run_folder.read_result(folder) is None:
            result = job.describe_run(cfg, args, layout.world_size)
            run_folder.write_result(folder, {**result, "message": death})
    return code


def read_layout(args: argparse.Namespace) -> Layout:
    if under_torchrun():
        if args.num_gpus != 1 or args.num_machines != 1 or args.dist_url:
            raise ConfigError(
                "under torchrun, its own options set the processes: leave out --num-gpus,"
                " --num-machines and --dist-url"
            )
        return torchrun_layout()
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines must be 1 or more")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(f"--machine-rank must be 0 to {args.num_machines - 1}")
    if args.num_machines > 1 and not args.dist_url:
        raise ConfigError("--num-machines needs --dist-url tcp://HOST:PORT of machine 0")
    return Layout(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
