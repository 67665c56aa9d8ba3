"""How many kernels a norm launches, and what that costs where nothing else does.

A training step of a detector on a GPU is bound by its host thread, which takes 5 to 10 microseconds
a launch. So a norm costs there what it launches, not what it computes; seconds on a CPU with large
maps, where launches are free, do not show it. Three tables:

  layer      operations that a norm dispatches a layer and iteration more than BatchNorm does:
             forward, backward and optimiser step of two convolutions with their norms, averaged
             over 8 iterations in burn-in and 8 after it, with full windows
  iteration  operations in a whole training iteration of Faster R-CNN R50-FPN with the 4conv1fc
             head, 2 images, norm in FPN and head or everywhere (needs detectron2)
  dispatch   seconds of a step of 8 convolutions 64->64 with their norms on 1x64x4x4, where
             launching is all there is to do: ratio to BatchNorm, one process a norm, one thread,
             in turns; processor time on a CPU

Operations are those that torch dispatches, views left out. They are counted, not measured: the
numbers are exact, the same on every machine, and hardly depend on the size of images. A norm takes
another branch on CUDA than on a CPU: the counts are of the one on CUDA, whose kernels are stood in
for on a CPU.

examples:
  python benchmarks/kernels.py layer
  python benchmarks/kernels.py layer --norms CBN "CBN(positions=None)" --operations
  python benchmarks/kernels.py iteration --norms CBN KN --places everywhere --out iteration.csv
  python benchmarks/kernels.py dispatch --norms CBN BRN --repetitions 100

  # on a GPU, where layer and iteration also time a step, by CUDA events
  python benchmarks/kernels.py layer --device cuda

  # the quick-start detector's whole iteration on the CPU, norm everywhere (docs/results/cost.md)
  python benchmarks/benchmark.py iteration --engine detectron2 --threads 1 --repetitions 15 \\
      --turn-seconds 0 --norms BN CBN KN "MBN(double_forward=False)" MBN BGN BRN GN
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import clone  # noqa: F401
import counting
import timing
import torch
from cuda_branch import cuda_branch
from detector import PLACES, detector_step
from publishing import Row, publish
from tabulate import tabulate
from workloads import stack_workload

from cbn_det import __version__
from cbn_det.commands.flags import positive
from cbn_det.run.errors import one_line
from cbn_det.run.measure import machine

REFERENCE = "BN"
NORMS = (
    *("GN", "BGN", "BRN", "MBN(double_forward=False)", "MBN", "CBN", "CBN(positions=None)"),
    *("KN", "GKN"),
)
_TIMED_STEPS = 50


def layer_table(norms: Sequence[str], device: str, show_operations: bool) -> list[Row]:
    """A row a norm: operations of a layer and iteration over BatchNorm's."""
    reference = counting.layer_counts(REFERENCE, device=device)
    rows = []
    for norm in norms:
        counts = counting.layer_counts(norm, device=device)
        early = counting.layer_counts(norm, in_burn_in=True, device=device)
        row = {
            "norm": norm,
            "a layer over BN": counting.over_batchnorm(counts, reference),
            "in burn-in": counting.over_batchnorm(early, reference),
        }
        if device == "cuda":
            row["ms"] = milliseconds(counting.layer_step(norm, device=device))
        rows.append(row)
        if show_operations:
            print(f"\n{norm}: of a layer and iteration over BN\n{_operations(counts, reference)}")
    return rows


def _operations(counts: Counter[str], reference: Counter[str]) -> str:
    names = {name: counts[name] - reference[name] for name in counts | reference}
    rows = [(name, n / (2 * counting.ITERATIONS)) for name, n in names.items() if n]
    return tabulate(sorted(rows, key=lambda row: -row[1]))


def iteration_table(norms: Sequence[str], places: Sequence[str], device: str) -> list[Row]:
    rows = []
    for place in places:
        reference = None
        for norm in (REFERENCE, *norms):
            timing.say(f"{place}: {norm}")
            model, step = detector_step(norm, place, device=device)
            for _ in range(counting.set_schedule(model)):
                step()
            count = counting.count_steps(step, counting.ITERATIONS).total() / counting.ITERATIONS
            reference = reference or count
            row = {"place": place, "norm": norm, "operations": count, "ratio": count / reference}
            if device == "cuda":
                row["ms"] = milliseconds(step)
            rows.append(row)
    return rows


def dispatch_table(norms: Sequence[str], device: str, repetitions: int, steps: int) -> list[Row]:
    """
    Raises:
        WorkerFailed: a norm that cannot be built or run.
    """
    shape = (1, 64, 4, 4)
    builds = {n: partial(stack_workload, n, 8, shape, device) for n in (REFERENCE, *norms)}
    with timing.started(builds, threads=1) as workers:
        for worker in workers:
            worker.ask(timing.run, worker.facts()["warm_up"] + 10)
        taken = timing.take_turns(workers, steps, repetitions)
    # a busy machine disturbs the time of the process less; a GPU's it does not hold
    clock = "cpu" if device == "cpu" else "wall"
    times = {norm: [answer[clock] for answer in answers] for norm, answers in taken.items()}
    rows = []
    for norm, seconds in times.items():
        ratio, (low, high) = timing.paired_ratio(seconds, times[REFERENCE])
        middle = sorted(seconds)[len(seconds) // 2]
        rows.append({"norm": norm, "ms": middle * 1e3, "ratio": ratio, "low": low, "high": high})
    return rows


def milliseconds(step: Callable[[], None]) -> float:
    """Of a step on the GPU, by CUDA events around many."""
    for _ in range(10):
        step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_TIMED_STEPS):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _TIMED_STEPS


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__, formatter_class=raw)
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--norms", nargs="+", default=NORMS, metavar="NORM", help="default: all, beside BN")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--out", type=Path, metavar="FILE.csv", help="also write the table there")
    tables = parser.add_subparsers(dest="table", required=True)
    layer = tables.add_parser("layer", parents=[common], help="operations of a layer over BN")
    layer.add_argument("--operations", action="store_true", help="also list them by name")
    iteration = tables.add_parser("iteration", parents=[common], help="of a detector's iteration")
    iteration.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    dispatch = tables.add_parser("dispatch", parents=[common], help="time where launching is all")
    what = "turns of each norm (default 30)"
    dispatch.add_argument("--repetitions", type=timing.enough, default=30, metavar="N", help=what)
    dispatch.add_argument("--steps", type=positive, default=20, help="in a turn (default 20)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    norms = [norm for norm in args.norms if norm != REFERENCE]
    torch.set_num_threads(1)
    stand_in = args.device == "cpu" and args.table != "dispatch"
    try:
        with cuda_branch() if stand_in else nullcontext():
            if args.table == "layer":
                rows = layer_table(norms, args.device, args.operations)
            elif args.table == "iteration":
                rows = iteration_table(norms, args.places, args.device)
            else:
                rows = dispatch_table(norms, args.device, args.repetitions, args.steps)
    except (ImportError, ValueError, timing.WorkerFailed) as error:
        parser.error(one_line(error))
    where = machine(on_gpu=args.device == "cuda")
    facts = {
        "machine": where["gpu"] or where["cpu"],
        "torch": torch.__version__,
        "branch": "cuda" if stand_in or args.device == "cuda" else "cpu",
        "cbn_det": __version__,
    }
    publish(rows, facts, args.out, digits=".5g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
