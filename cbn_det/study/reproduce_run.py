"""Runs rows of tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from cbn_det.study.compare import EXIT_FAILED, announce
from cbn_det.study.plan import Run
from cbn_det.study.processes import interruptible, locked
from cbn_det.study.reproduce import Reproduction, Row
from cbn_det.study.runner import Active, run_all, visible_gpus


def run_rows(
    reproduction: Reproduction,
    rows: Sequence[Row],
    runs: list[Run],
    jobs: int | None = None,
    gpus: Sequence[str] | None = None,
    submit: Callable[[Run], Active] | None = None,
) -> int:
    """Trains what is not finished yet.

    Args:
        rows: of which the runs are.
        runs: of :meth:`Reproduction.runs`.
        jobs: processes side by side; None: one a GPU, on CPU one a core, submitted ones all.
        gpus: names for CUDA_VISIBLE_DEVICES; None: those of this machine.
        submit: starts a run elsewhere, in place of a process here.

    Returns:
        1 if a run failed, else 0; a diverged one is a result.

    Raises:
        KeyboardInterrupt: stopped; every run started here was ended.
        RuntimeError: another process runs rows of one of the tables.
    """
    here = submit is None and reproduction.on_gpu(rows)
    places = list(gpus or visible_gpus()) if here else []
    everything = sum(run.ranks for run in runs) if submit else 0
    with ExitStack() as stack:
        for table in dict.fromkeys(row.table.name for row in rows):
            stack.enter_context(locked(reproduction.output / table))
        stack.enter_context(interruptible())
        jobs = jobs or everything or len(places) or os.cpu_count() or 1
        outcomes = run_all(runs, jobs, announce, gpus=places, submit=submit)
    return EXIT_FAILED if any(o.result.get("status") == "failed" for o in outcomes) else 0
