"""Starts a run on detectron2: one process, several here, on several machines, or torchrun's."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..run import folder as run_folder
from ..run.cores import usable_cores
from ..run.errors import STOPPED, USAGE, ConfigError, one_line
from ..run.files import read_result
from ..run.signals import handled
from ..run.trial import Trial
from . import job
from .config import build_config

_GRACE_SECONDS = 20  # for the other processes to end by themselves after one has failed


def launch(args: argparse.Namespace) -> int:
    """Runs what the command line (with ``command``, its text) asks for; returns the exit code."""
    try:
        layout = read_layout(args)
        cfg, notes = build_config(args, layout.world_size)
    except ValueError as error:
        if is_first():
            print(f"error: {one_line(error)}", file=sys.stderr)
        return USAGE
    code, death = run_processes(layout, cfg.MODEL.DEVICE, job.run, (cfg, notes, args))
    if death:
        print(f"error: {death}", file=sys.stderr)
        folder = Path(cfg.OUTPUT_DIR)
        if not args.eval_only and read_result(folder) is None:
            result = job.describe_run(cfg, args, layout.world_size)
            run_folder.write_result(folder, {**result, "message": death})
    return code


def trial(args: argparse.Namespace) -> Trial:
    """The training that a command line asks for, to be tried; raises ConfigError."""
    layout = read_layout(args)
    cfg, notes = build_config(args, layout.world_size)
    return Trial(job.Detectron2Job(cfg, args), notes, layout.world_size)


@dataclass(frozen=True)
class Layout:
    """Which processes make up a run.

    Attributes:
        processes: on this machine.
        dist_url: where several machines meet; None on a single machine, where the parent process
            hosts the meeting point itself, so that runs side by side never compete for a port.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    dist_url: str | None = None

    @property
    def world_size(self) -> int:
        return self.processes * self.machines


def under_torchrun() -> bool:
    """Whether the processes have been started already, and this is one of them."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def is_first() -> bool:
    """Whether this process may speak for the run before rank 0 exists."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def read_layout(args: argparse.Namespace) -> Layout:
    """Raises ConfigError for options that do not go together."""
    if under_torchrun():
        if args.num_gpus != 1 or args.num_machines != 1 or args.dist_url:
            raise ConfigError(
                "under torchrun, its own options set the processes: leave out --num-gpus,"
                " --num-machines and --dist-url"
            )
        world_size = int(os.environ["WORLD_SIZE"])
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return Layout(processes, world_size // processes)
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines must be 1 or more")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(f"--machine-rank must be 0 to {args.num_machines - 1}")
    if args.num_machines > 1 and not args.dist_url:
        raise ConfigError("--num-machines needs --dist-url tcp://HOST:PORT of machine 0")
    return Layout(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)


def run_processes(
    layout: Layout, device: str, main: Callable[..., int], args: tuple[Any, ...]
) -> tuple[int, str]:
    """Runs ``main(*args) -> exit code`` in every process of the run and waits for the end.

    GPU processes get a GPU each and talk over NCCL; where a machine has fewer GPUs than processes,
    they share them and talk over gloo, as they do on CPU.

    Args:
        device: ``MODEL.DEVICE``.
        main: importable by name, as spawned processes need it.

    Returns:
        The exit code, and why a process died if it died without returning one.
    """
    try:
        if layout.world_size == 1:
            _use_threads(device, 1)
            return main(*args), ""
        if under_torchrun():
            return _join(int(os.environ["LOCAL_RANK"]), layout, device, None, main, args), ""
        store = None
        if layout.dist_url is None:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        rest = (layout, device, store and store.port, main, args)
        return _wait(mp.start_processes(_spawned, rest, layout.processes, join=False))
    except KeyboardInterrupt:
        return STOPPED, ""


def _wait(context: Any) -> tuple[int, str]:
    interrupted = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        for process in context.processes:
            process.terminate()  # they save and stop; SIGINT twice would stop them at once

    try:
        with handled(pass_on, signal.SIGINT, signal.SIGTERM):
            while not context.join(grace_period=_GRACE_SECONDS):
                pass
    except mp.ProcessExitedException as error:
        if interrupted:
            return STOPPED, ""
        if error.signal_name:
            return 1, f"rank {error.error_index} was killed by {error.signal_name}"
        return error.exit_code, ""
    except mp.ProcessRaisedException as error:
        return 1, str(error).strip()
    return 0, ""


def _spawned(*args: Any) -> None:
    sys.exit(_join(*args))


def _join(
    local_rank: int,
    layout: Layout,
    device: str,
    port: int | None,
    main: Callable[..., int],
    args: tuple[Any, ...],
) -> int:
    rank = layout.machine_rank * layout.processes + local_rank
    if under_torchrun():
        rank = int(os.environ["RANK"])
    faulthandler.enable()  # a process that a signal ends says where it was
    _use_threads(device, layout.processes)
    gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
    if gpus:
        torch.cuda.set_device(local_rank % gpus)
    backend = "nccl" if gpus >= layout.processes else "gloo"
    where: dict[str, Any] = {"init_method": layout.dist_url or "env://"}
    if port is not None:
        where = {"store": dist.TCPStore("127.0.0.1", port, is_master=False)}
    dist.init_process_group(
        backend, rank=rank, world_size=layout.world_size, timeout=DEFAULT_TIMEOUT, **where
    )
    comm.create_local_process_group(layout.processes)
    comm.synchronize()
    code = main(*args)
    if code == 0:  # after a failure other ranks may be gone, and leaving would wait for them
        _leave()
    return code


def _leave() -> None:
    """Ends the process groups with their threads. A thread of gloo's that drops the tensors of the
    last collective while the interpreter ends would abort the process (torch 2.14): nothing may
    hold a group beyond its end."""
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # a DistributedDataParallel in a circle
    dist.destroy_process_group()


def _use_threads(device: str, processes: int) -> None:
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // processes))
