"""All that can be known of a training before it starts: takes the words of `cbn-det train`.

Reads the config, checks the data sets as training would and whether images are in both, looks for
the weights, then builds the model and makes three training steps with it, the second and third as
after burn-in: which norms are bound to which convolutions, what they need of memory and time, what
checkpoints need of the disk, and whether the trained model folds. Nothing is written to OUTPUT_DIR
and nothing downloaded; the built-in digits set is written where it is used.

Each line says ok, note (nothing has to be done) or PROBLEM (and what to do).

examples:
  cbn-det check quickstart/faster_rcnn_R_18_FPN_digits_cbn OUTPUT_DIR out/cbn
  cbn-det check coco/mask_rcnn_R_50_FPN_1x/cbn_2img --num-gpus 8
  cbn-det check my.yaml --coco-dataset cells_train train.json images/ \\
      DATASETS.TRAIN "('cells_train',)" MODEL.ROI_HEADS.NUM_CLASSES 3

exit codes: 0 ready   1 problems, each on a line   2 wrong arguments   130 stopped by Ctrl-C
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from fvcore.common.config import CfgNode

from ..cli import reader_left
from ..config_files import find_config
from ..data import CocoReport
from ..data.findings import NOTE, OK, PROBLEM, Finding
from ..data.pretrained import check_weights_file
from ..data.sets import check_overlap
from ..engines import resolve_engine
from ..run.arguments import argument_parser
from ..run.errors import one_line

if TYPE_CHECKING:
    from ..run.trial import Trial

T = TypeVar("T")


def make_parser() -> argparse.ArgumentParser:
    parser = argument_parser()
    parser.description = __doc__
    parser.epilog = None
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    args.command = ""
    return tell("check", findings(args))


def tell(tool: str, findings: Iterator[Finding]) -> int:
    """Prints findings as they come, and at the end how many are problems. Returns the exit code."""
    problems = 0
    try:
        for finding in findings:
            problems += finding.level == PROBLEM
            label = finding.level.upper() if finding.level == PROBLEM else finding.level
            print(f"{label:8s}{finding.text}", flush=True)
    except KeyboardInterrupt:
        print("stopped: nothing was changed", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return reader_left()
    except OSError as error:  # no permission, a disk that went away
        print(f"{tool}: {error}", file=sys.stderr)
        return 1
    print(f"{problems} problem{'s' * (problems != 1)} found" if problems else "ready for training")
    return 1 if problems else 0


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    """Ends early where what follows would need what is missing."""
    with heard("cbn_det") as lines:
        trial, refused = _tried(lambda: make_trial(args))
    yield from (*lines, *refused)
    if trial is None:
        return
    cfg = trial.cfg
    place = cfg.MODEL.DEVICE + (f", {trial.world_size} processes" if trial.world_size > 1 else "")
    yield Finding(OK, f"config: {args.config_file}, {args.engine} engine, {place}")
    for note in trial.notes:
        yield Finding(NOTE, note)
    for phase in ("TRAIN", "TEST"):
        least, most = cfg.INPUT[f"MIN_SIZE_{phase}"], cfg.INPUT[f"MAX_SIZE_{phase}"]
        if np.max(least, initial=0) > most:
            text = f"INPUT.MIN_SIZE_{phase} {least} is above INPUT.MAX_SIZE_{phase} {most}"
            yield Finding(NOTE, f"{text}: no image gets that large, as its longer side is limited")
    with heard("cbn_det.data") as lines:
        reports, refused = _tried(trial.prepare)
    yield from (*lines, *refused)
    if reports is not None:
        yield from _overlap(cfg, reports)
    there = yield from _weights(cfg)
    if reports is None:
        yield Finding(NOTE, "nothing else was tried: a training step needs the data")
        return
    from .trial import try_out  # imports torch

    with heard("cbn_det") as lines:
        yield from try_out(trial, args.accumulate, there)
    for finding in lines:
        if finding.level == NOTE:
            yield finding


def make_trial(args: argparse.Namespace) -> Trial:
    """The trial of a command line, on the engine that it names.

    Raises:
        ImportError: the engine does not work here.
        ValueError: the command line or the config cannot be run.
    """
    args.config_file = find_config(args.config_file)
    if args.config_file.endswith(".py"):
        raise ValueError(f"--config-file {args.config_file}: a LazyConfig cannot be checked")
    args.engine = resolve_engine(args.engine)
    if args.engine == "detectron2":
        from ..plugin.launch import trial
    else:
        from ..standalone.launch import trial
    return trial(args)


def _tried(make: Callable[[], T]) -> tuple[T | None, list[Finding]]:
    """What is made, or why it is refused."""
    try:
        return make(), []
    except (ValueError, ImportError) as error:
        return None, [Finding(PROBLEM, one_line(error))]


def _overlap(cfg: CfgNode, reports: dict[str, CocoReport]) -> Iterator[Finding]:
    groups = {
        f"DATASETS.{key}": [
            path for name in cfg.DATASETS[key] if name in reports for path in reports[name].paths
        ]
        for key in ("TRAIN", "TEST")
    }
    if all(groups.values()):
        yield check_overlap(groups)
    if not cfg.DATASETS.TEST:
        yield Finding(NOTE, "DATASETS.TEST is empty: nothing will be evaluated")


def _weights(cfg: CfgNode) -> Iterator[Finding]:
    """Returns whether there are weights to load without a download."""
    spec = cfg.MODEL.WEIGHTS
    if not spec:
        frozen = "FrozenBN" in cfg.MODEL.RESNETS.NORM or cfg.MODEL.BACKBONE.FREEZE_AT > 0
        if frozen and "resnet" in cfg.MODEL.BACKBONE.NAME:  # others have no such keys
            yield Finding(
                PROBLEM,
                "MODEL.WEIGHTS is empty, and the backbone has frozen layers, which stay random:"
                " name weights, or set MODEL.BACKBONE.FREEZE_AT 0 and MODEL.RESNETS.NORM BN",
            )
        else:
            yield Finding(OK, "weights: none, training starts from scratch")
        return False
    found = check_weights_file(spec)
    yield found
    return found.level == OK


@contextmanager
def heard(logger: str) -> Iterator[list[Finding]]:
    """What a logger says meanwhile as findings, each once: information is ok, a warning a note.
    Python's warnings are notes."""
    lines: list[Finding] = []

    def add(level: str, text: str) -> None:
        finding = Finding(level, " ".join(text.split()))
        if finding not in lines:
            lines.append(finding)

    handler = logging.Handler()
    handler.emit = lambda r: add(NOTE if r.levelno >= logging.WARNING else OK, r.getMessage())
    source = logging.getLogger(logger)
    before = source.level, source.propagate, source.handlers[:]
    source.handlers[:] = [handler]
    source.setLevel(logging.INFO)
    source.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield lines
    finally:
        source.level, source.propagate, source.handlers[:] = before
        for warning in caught:
            if Path(warning.filename).is_relative_to(Path(__file__).parents[1]):
                add(NOTE, str(warning.message))
