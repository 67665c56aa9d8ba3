"""A training iteration of a detector, on either engine."""

from __future__ import annotations

import argparse
import tempfile
from itertools import cycle

from ..engines import resolve_engine
from ..run.arguments import argument_parser
from .worker import Workload

#: training batches, read before anything is timed and used in turn
BATCHES = 8


def parse(words: list[str]) -> argparse.Namespace:
    """The launcher's arguments, with the engine resolved.

    Raises:
        ImportError: the engine does not work here.
    """
    args = argument_parser().parse_args(words)
    args.engine = resolve_engine(args.engine)
    args.command = "tools/benchmark.py"
    return args


def iteration_workload(args: argparse.Namespace) -> Workload:
    """The training iteration that a launcher's command line describes: forward, backward,
    optimiser step, Double Forward. Reading images, evaluation and checkpoints are no part of it.

    Raises:
        ValueError: a config that cannot be run.
    """
    if args.engine == "detectron2":
        from ..plugin.benchmark import training_step
    else:
        from ..standalone.benchmark import training_step
    with tempfile.TemporaryDirectory() as folder:  # metrics are opened there, and not read
        args.opts = [*args.opts, "OUTPUT_DIR", folder]
        model, step_on, versions = training_step(args, BATCHES)
    turns = cycle(range(BATCHES))
    return Workload(lambda: step_on(next(turns)), model, next(model.parameters()).device, versions)
