"""A worker: holds one norm's model and runs its steps when asked.

``stdin`` takes one request a line, ``stdout`` gives one JSON object for each, after a first one
that says that the worker is ready. Whatever else is printed goes to ``stderr``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cbn_det import __version__
from cbn_det.norms import SmallBatchNorm2d, resolve_burn_in
from cbn_det.run.errors import one_line
from cbn_det.run.measure import machine, peak_memory_mb

_PAST_ANY_SCHEDULE = 10**9


@dataclass
class Workload:
    """What is timed.

    Attributes:
        step: one training step, forward to optimiser.
        model: what it trains; its norms are set past their burn-in, where they do all their work.
        device: of the model.
    """

    step: Callable[[], None]
    model: nn.Module
    device: torch.device


def serve(build: Callable[[], Workload]) -> int:
    """Builds the workload, then answers requests until stdin ends; returns the exit code.

    Requests: ``run N`` and ``time N`` run N steps, and the second answers with ``wall`` and ``cpu``
    seconds of one (cpu: of this process, all threads); ``memory`` answers with ``peak_mb``, the
    most that was in use beyond what the imports take: memory of tensors on a GPU, of the process
    elsewhere.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        imported = peak_memory_mb()
        work = build()
        on_gpu = work.device.type == "cuda"
        answer(**_facts(work), warm_up=end_burn_in(work.model))
        for request in sys.stdin:
            word, _, number = request.strip().partition(" ")
            if word == "memory":
                answer(peak_mb=peak_memory_mb() - (0.0 if on_gpu else imported))
            else:
                seconds = _run(work, int(number))
                answer(**(seconds if word == "time" else {}))
    except Exception as error:
        traceback.print_exc()
        answer(error=one_line(error))
        return 1
    return 0


def _facts(work: Workload) -> dict[str, Any]:
    return {
        "machine": machine(on_gpu=work.device.type == "cuda"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cbn_det": __version__,
        },
    }


def end_burn_in(model: nn.Module) -> int:
    """Sets norms past their burn-in; returns the steps until everything they remember is there."""
    layers = [m for m in model.modules() if isinstance(m, SmallBatchNorm2d)]
    resolve_burn_in(model, 1, start_iter=_PAST_ANY_SCHEDULE)
    return max((getattr(layer, "window", 0) for layer in layers), default=0)


def _run(work: Workload, steps: int) -> dict[str, float]:
    _synchronize(work.device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        work.step()
    _synchronize(work.device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall / steps, "cpu": cpu / steps}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
