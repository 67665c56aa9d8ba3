"""Flags that several commands have, with their checks."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from ..run.arguments import add_datasets
from ..run.cores import usable_cores
from ..study.plan import Run
from ..study.recipes import RECIPES
from ..study.runner import Active, visible_gpus

SET_BY_THE_TOOL = {"nodes", "ntasks-per-node", "signal", "output", "error", "requeue", "job-name"}


def positive(text: str) -> int:
    """For ``type``: a number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text}")
    return key, value


class _Pairs(argparse.Action):
    def __call__(self, parser: Any, args: Any, words: Any, option: str | None = None) -> None:
        if len(words) % 2:
            parser.error(f"{option} takes KEY VALUE pairs, got {len(words)} words")
        args.opts = words


def add_opts(parser: argparse.ArgumentParser) -> None:
    """Gives a parser ``--opts KEY VALUE ...``."""
    parser.add_argument(
        "--opts",
        nargs="*",
        default=[],
        action=_Pairs,
        metavar="KEY VALUE",
        help="config overrides for every run",
    )


def add_detector(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Gives a parser what says which detector is trained, and on which data: ``--recipe``,
    ``--config-file`` (with ``more`` help), ``--coco-dataset`` and ``--opts``."""
    add = parser.add_argument
    add("--recipe", choices=sorted(RECIPES), default="scratch", help="default scratch")
    add("--config-file", help=f"base config in place of the recipe's. {more}")
    add_datasets(parser)
    add_opts(parser)


def add_places(parser: argparse.ArgumentParser) -> None:
    """Gives a parser what says where runs go: ``--gpus``, ``--jobs``, ``--num-machines``,
    ``--submit`` and ``--sbatch``."""
    add = parser.add_argument
    add(
        "--gpus",
        nargs="+",
        metavar="ID",
        help="GPUs to share out among the runs, one a process (default: all visible ones)",
    )
    add(
        "--jobs",
        type=positive,
        metavar="N",
        help="processes side by side (default: as many as GPUs, on CPU as cores); more than there "
        "are GPUs share them. With --submit: processes in the queue, default all",
    )
    add(
        "--num-machines",
        type=positive,
        default=1,
        metavar="N",
        help="nodes of a SLURM job (default 1)",
    )
    add(
        "--submit",
        choices=("slurm", "local"),
        help="submit each run as a job through submitit: to SLURM, or to this machine to try it",
    )
    add(
        "--sbatch",
        nargs="+",
        type=_key_value,
        default=[],
        metavar="KEY=VALUE",
        help="options of sbatch; time=MINUTES is needed, partition, account, qos, mem, gres, "
        "cpus-per-task, constraint and all others may be given",
    )


def places(args: argparse.Namespace, on_gpu: bool, runs: Sequence[Run]) -> dict[str, Any]:
    """``jobs``, ``gpus`` and ``submit`` of :func:`~cbn_det.study.runner.run_all`, of the flags of
    :func:`add_places`.

    Args:
        on_gpu: whether the runs ask for a GPU.

    Raises:
        RuntimeError, ValueError: see :func:`submitter`.
    """
    submit = submitter(args, on_gpu)
    gpus = (args.gpus or visible_gpus()) if on_gpu and not submit else []
    everything = sum(run.ranks for run in runs) if submit else 0
    jobs = args.jobs or everything or len(gpus) or usable_cores()
    return {"jobs": jobs, "gpus": gpus, "submit": submit}


def submitter(args: argparse.Namespace, on_gpu: bool) -> Callable[[Run], Active] | None:
    """What submits a run, of the flags of :func:`add_places`; None: runs are processes here.

    Raises:
        RuntimeError: submitit is not installed.
        ValueError: an option that cannot be followed.
    """
    if args.num_machines > 1 and args.submit != "slurm":
        raise ValueError("--num-machines needs --submit slurm, which knows the machines")
    if not args.submit:
        return None
    options = {key.replace("_", "-"): value for key, value in args.sbatch}
    if taken := options.keys() & SET_BY_THE_TOOL:
        raise ValueError(f"--sbatch {min(taken)}: is set by the tool")
    minutes = options.pop("time", "1440" if args.submit == "local" else "")
    if not minutes.isdecimal():
        raise ValueError(
            f"--sbatch time={minutes}: expected minutes, time=1440 for a day. It is what "
            "a job takes at a time; one that needs longer is queued again and resumes"
        )
    if importlib.util.find_spec("submitit") is None:
        raise RuntimeError("--submit needs submitit: pip install submitit")
    from ..study.slurm import Cluster

    return Cluster(args.submit, int(minutes), args.num_machines, on_gpu, options).submit
