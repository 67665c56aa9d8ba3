"""Trains and compares GN, BN and CBN at 2 images per GPU, on the CPU; `make demo` runs it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.digits import write_digits
from ..engines import ENGINES, resolve_engine
from ..study.compare import compare, guarded
from ..study.plan import Plan, Split

NORMS = ["GN", "BN", "CBN"]


def evaluation_period(iterations: int) -> int:
    """About a quarter of the training; divides it, so that the last evaluation ends it."""
    times = min((n for n in range(1, 9) if iterations % n == 0), key=lambda n: abs(n - 4))
    return iterations // times


def run(args: argparse.Namespace) -> int:
    print(f"digits, 1000 training and 150 validation images: {write_digits()}", flush=True)
    plan = Plan(
        args.output,
        NORMS,
        [Split(1, 2)],
        [1],
        engine=resolve_engine() if args.engine == "auto" else args.engine,
        iterations=args.iters,
        overrides=["TEST.EVAL_PERIOD", str(evaluation_period(args.iters))],
    )
    return compare(plan, jobs=args.jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=600, help="iterations of each run")
    parser.add_argument("--jobs", type=int, default=2, help="one-thread runs side by side")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    args = parser.parse_args()
    return guarded("demo", lambda: run(args))
