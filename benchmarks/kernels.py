"""How many kernels a norm launches.

A training step of a detector on a GPU is bound by its host thread, which takes 5 to 10 microseconds
a launch. So a norm costs there what it launches, not what it computes; seconds on a CPU with large
maps, where launches are free, do not show it (benchmark.py dispatch times small ones). Two tables:

  layer      operations that a norm dispatches a layer and iteration more than BatchNorm does:
             forward, backward and optimiser step of two convolutions with their norms, averaged
             over 8 iterations in burn-in and 8 after it, with full windows
  iteration  operations in a whole training iteration of Faster R-CNN R50-FPN with the 4conv1fc
             head, 2 images, norm in FPN and head or everywhere (needs detectron2)

Operations are those that torch dispatches, views left out. They are counted, not measured: the
numbers are exact, the same on every machine, and hardly depend on the size of images. They are of
the branch that a norm takes on CUDA, whose kernels are stood in for on a CPU.

examples:
  python benchmarks/kernels.py layer
  python benchmarks/kernels.py layer --norms CBN "CBN(positions=None)" --operations
  python benchmarks/kernels.py iteration --norms CBN KN --places everywhere --out iteration.csv
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import clone  # noqa: F401
import counting
import torch
from cuda_branch import cuda_branch
from detector import PLACES, detector_step
from publishing import Row, publish
from tabulate import tabulate

from cbn_det import __version__
from cbn_det.run.errors import one_line
from cbn_det.run.measure import machine

REFERENCE = "BN"
NORMS = (
    *("GN", "BGN", "BRN", "MBN(double_forward=False)", "MBN", "CBN", "CBN(positions=None)"),
    *("KN", "GKN"),
)


def layer_table(norms: Sequence[str], show_operations: bool) -> list[Row]:
    """A row a norm: operations of a layer and iteration over BatchNorm's."""
    reference = counting.layer_counts(REFERENCE)
    rows = []
    for norm in norms:
        counts = counting.layer_counts(norm)
        early = counting.layer_counts(norm, in_burn_in=True)
        row = {
            "norm": norm,
            "a layer over BN": counting.over_batchnorm(counts, reference),
            "in burn-in": counting.over_batchnorm(early, reference),
        }
        rows.append(row)
        if show_operations:
            print(f"\n{norm}: of a layer and iteration over BN\n{_operations(counts, reference)}")
    return rows


def _operations(counts: Counter[str], reference: Counter[str]) -> str:
    names = {name: counts[name] - reference[name] for name in counts | reference}
    rows = [(name, n / (2 * counting.ITERATIONS)) for name, n in names.items() if n]
    return tabulate(sorted(rows, key=lambda row: -row[1]))


def iteration_table(norms: Sequence[str], places: Sequence[str]) -> list[Row]:
    rows = []
    for place in places:
        reference = None
        for norm in (REFERENCE, *norms):
            print(f"{place}: {norm}", file=sys.stderr, flush=True)
            model, step = detector_step(norm, place)
            for _ in range(counting.set_schedule(model)):
                step()
            count = counting.count_steps(step).total() / counting.ITERATIONS
            reference = reference or count
            rows.append(
                {"place": place, "norm": norm, "operations": count, "ratio": count / reference}
            )
    return rows


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__, formatter_class=raw)
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--norms", nargs="+", default=NORMS, metavar="NORM", help="default: all, beside BN")
    add("--out", type=Path, metavar="FILE.csv", help="also write the table there")
    tables = parser.add_subparsers(dest="table", required=True)
    layer = tables.add_parser("layer", parents=[common], help="operations of a layer over BN")
    layer.add_argument("--operations", action="store_true", help="also list them by name")
    iteration = tables.add_parser("iteration", parents=[common], help="of a detector's iteration")
    iteration.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    norms = [norm for norm in args.norms if norm != REFERENCE]
    try:
        with cuda_branch():
            if args.table == "layer":
                rows = layer_table(norms, args.operations)
            else:
                rows = iteration_table(norms, args.places)
    except (ImportError, ValueError) as error:
        parser.error(one_line(error))
    facts = {
        "machine": machine(on_gpu=False)["cpu"],
        "torch": torch.__version__,
        "branch": "cuda",
        "cbn_det": __version__,
    }
    publish(rows, facts, args.out, digits=".5g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
