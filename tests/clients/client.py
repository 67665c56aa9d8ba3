"""One client through :mod:`smoke`: ``client.py NAME PATH [--norms CBN ...] [--configs TEXT ...]``.

Exits with 1 where something came out wrong.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from pathlib import Path

import torch
from catalog import PROJECTS, cases_of
from detectron2.utils.events import EventStorage
from smoke import NORMS, Case, fails_with_batchnorm, run

import cbn_det


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(PROJECTS), help="of the project")
    parser.add_argument("checkout", type=Path, help="folder that the project was cloned to")
    parser.add_argument("--norms", nargs="+", choices=sorted(NORMS), default=list(NORMS))
    parser.add_argument("--configs", nargs="+", default=[""], help="only those that contain one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cbn_det.register()
    wrong = 0
    for case in cases_of(PROJECTS[args.name], args.checkout.resolve()):
        if not any(text in case.name for text in args.configs):
            continue
        for norm in args.norms:
            started = time.monotonic()
            said, failed = _tried(case, norm)
            wrong += failed
            print(f"{case.name}  {norm}  {said}  [{time.monotonic() - started:.0f} s]", flush=True)
            gc.collect()
    return int(wrong > 0)


def _tried(case: Case, norm: str) -> tuple[str, bool]:
    """What is to be said of a configuration under a norm, and whether it came out wrong."""
    spec, before = NORMS[norm], ""
    while True:
        try:
            with EventStorage():
                outcome = run(case, spec)
            return f"{before}{outcome}", bool(outcome.problems)
        except Exception as error:  # whatever the project or a layer raises is the result
            if norm == "CBN" and not before and "compensation='none'" in str(error):
                spec, before = "CBN(burn_in=0, compensation='none')", "refused; naive: "
                continue
            traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = (str(error).splitlines() or [""])[0]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            text = f"{before}{type(error).__name__} at {place}: {text}"
            with EventStorage():
                as_batchnorm = fails_with_batchnorm(case)
            return text + " (with BN, too)" * as_batchnorm, not as_batchnorm


if __name__ == "__main__":
    sys.exit(main())
