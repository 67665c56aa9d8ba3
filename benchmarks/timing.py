"""Norms that are timed side by side: a process for each holds its model, and they take turns."""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from cbn_det import __version__
from cbn_det.norms import SmallBatchNorm2d, resolve_burn_in
from cbn_det.progress import shown
from cbn_det.run.errors import one_line
from cbn_det.run.measure import machine, peak_memory_mb

CONFIDENCE = 0.95

#: repetitions below which no interval for a median reaches the confidence
FEWEST = 6

#: glibc gives large freed blocks back to the system or keeps them, depending on the order in which
#: they came, and getting them anew takes as long as a norm does. So workers keep what they once
#: had, as CUDA's caching allocator does: the ratios are then of the norms. The caller's environment
#: takes precedence.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**36),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
}
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


class WorkerFailed(RuntimeError):
    """A worker could not be built, or died."""


class Worker:
    """A process that holds one norm's model and runs its steps when asked. What it prints goes
    where this process prints.

    Args:
        norm: its name.
        build: makes the workload there.
        threads: of torch; None: the default.
    """

    def __init__(
        self, norm: str, build: Callable[[], Workload], threads: int | None = None
    ) -> None:
        self.norm = norm
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        self._built = self._pool.submit(_hold, build, threads)

    def facts(self) -> dict[str, Any]:
        """Waits until the workload is there: "machine", "versions", and the steps of "warm_up"
        until everything that its norms remember is there.

        Raises:
            WorkerFailed: it cannot be built; says why.
        """
        return self._answer(self._built)

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls :func:`run` or :func:`peak_mb` there.

        Raises:
            WorkerFailed: it raised, or the process died; says why.
        """
        return self._answer(self._pool.submit(function, *args))

    def _answer(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except Exception as error:
            raise WorkerFailed(f"{self.norm}: {one_line(error)}") from error

    def end(self) -> None:
        """Ends the process after the step at hand."""
        self._pool.shutdown(cancel_futures=True)


def _hold(build: Callable[[], Workload], threads: int | None) -> dict[str, Any]:
    """In a worker: makes the workload that the other functions are about."""
    global _work, _imported
    warnings.simplefilter("ignore")
    if threads:
        torch.set_num_threads(threads)
    _imported = peak_memory_mb()
    _work = build()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "machine": machine(on_gpu=_work.device.type == "cuda"),
        "versions": versions | {"cbn_det": __version__},
        "warm_up": end_burn_in(_work.model),
    }


def run(steps: int) -> dict[str, float]:
    """In a worker: makes steps; "wall" and "cpu" seconds of one (cpu: of the process, all
    threads)."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        _work.step()
    _synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall / steps, "cpu": cpu / steps}


def peak_mb() -> float:
    """In a worker: the most memory in MiB that was in use beyond what the imports take: of tensors
    on a GPU, of the process elsewhere."""
    return peak_memory_mb() - (0.0 if _work.device.type == "cuda" else _imported)


def _synchronize() -> None:
    if _work.device.type == "cuda":
        torch.cuda.synchronize(_work.device)


def end_burn_in(model: nn.Module) -> int:
    """Sets norms past their burn-in; returns the steps until everything they remember is there."""
    layers = [m for m in model.modules() if isinstance(m, SmallBatchNorm2d)]
    resolve_burn_in(model, 1, start_iter=_PAST_ANY_SCHEDULE)
    return max((getattr(layer, "window", 0) for layer in layers), default=0)


@contextmanager
def started(
    builds: Mapping[str, Callable[[], Workload]], threads: int | None = None
) -> Iterator[list[Worker]]:
    """Workers side by side, which end with the context; ``builds`` make their workloads, by
    norm."""
    for name, value in KEEP_FREED_MEMORY.items():
        os.environ.setdefault(name, value)  # read where a process starts
    with ExitStack() as stack:
        workers = []
        for norm, build in builds.items():
            workers.append(Worker(norm, build, threads))
            stack.callback(workers[-1].end)
        yield workers


def take_turns(
    workers: Sequence[Worker], steps: int, repetitions: int
) -> dict[str, list[dict[str, float]]]:
    """Lets every worker make `steps` steps in each repetition, in an order drawn anew each time.

    Returns:
        for each norm, what :func:`run` says of each repetition.
    """
    order = random.Random(0)
    taken: dict[str, list[dict[str, float]]] = {worker.norm: [] for worker in workers}
    for _ in shown(range(repetitions), "repetitions"):
        for worker in order.sample(workers, len(workers)):
            taken[worker.norm].append(worker.ask(run, steps))
    return taken


def enough(text: str) -> int:
    """For ``type``: repetitions that make an interval."""
    if not text.isdecimal() or int(text) < FEWEST:
        raise argparse.ArgumentTypeError(f"expected {FEWEST} or more, got {text}")
    return int(text)


def paired_ratio(
    times: Sequence[float], reference: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """The median ratio of two lists of times, the i-th of both taken one shortly after the other,
    and its :func:`median_interval`.

    What disturbs a machine for longer than a repetition takes disturbs both times of a pair, and
    what disturbs a single time is an outlier, which a median ignores.

    Raises:
        ValueError: lists of different length, or shorter than `FEWEST`.
    """
    ratios = [time / base for time, base in zip(times, reference, strict=True)]
    return statistics.median(ratios), median_interval(ratios)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A `CONFIDENCE` interval for the median of what the values are drawn from, whatever its
    distribution: the k-th smallest and the k-th largest value, with k as large as may be. (How many
    of n values lie below the true median is binomial, n times one half.)

    Raises:
        ValueError: fewer than `FEWEST` values.
    """
    n = len(values)
    if n < FEWEST:
        raise ValueError(f"{n} repetitions: an interval needs {FEWEST} or more")
    outside, k = 0.0, 0  # probability that fewer than k values lie below the true median
    while True:
        outside += math.comb(n, k) / 2**n
        if 2 * outside > 1 - CONFIDENCE:
            break
        k += 1
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
