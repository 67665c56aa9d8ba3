"""Inference of a detector, as trained or deployed, on either engine."""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import count

import torch

from ..deploy import fold, to_batchnorm
from .iteration import BATCHES
from .worker import Workload

#: what is done to the model before it is timed
STAGES = {"trained": None, "deployed": to_batchnorm, "folded": fold}


def inference_workload(stage: str, args: argparse.Namespace) -> Workload:
    """The forward pass over a test image that a launcher's command line describes, from the image
    in memory to the detections.

    Args:
        stage: a name of `STAGES`.

    Raises:
        ValueError: a config that cannot be run, or a norm that cannot be deployed so.
    """
    if args.engine == "detectron2":
        from ..plugin.benchmark import inference_step
    else:
        from ..standalone.benchmark import inference_step
    with tempfile.TemporaryDirectory() as folder:  # evaluation would write there; this does not
        args.opts = [*args.opts, "OUTPUT_DIR", folder]
        model, forward_on, versions = inference_step(args, BATCHES)
    if (deploy := STAGES[stage]) is not None:
        print(deploy(model), file=sys.stderr)
    turns = count()

    def step() -> None:
        with torch.inference_mode():
            forward_on(next(turns))

    return Workload(step, model, next(model.parameters()).device, versions)
