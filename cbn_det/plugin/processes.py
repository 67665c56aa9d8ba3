"""Starting the processes of a run: one, several here, several machines, or torchrun's."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..run.job import STOPPED as INTERRUPTED
from ..run.measure import usable_cores

_GRACE_SECONDS = 20  # for the other processes to end by themselves after one has failed


Job = Callable[..., int]


@dataclass(frozen=True)
class Layout:
    """Which processes make up a run.

    Attributes:
        processes: on this machine.
        dist_url: where several machines meet; None on a single machine, where the parent process
            hosts the meeting point itself, so that runs side by side never compete for a port.
        torchrun: whether torchrun has already started the processes and this is one of them.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    dist_url: str | None = None
    torchrun: bool = False

    @property
    def world_size(self) -> int:
        return self.processes * self.machines

    @property
    def is_first(self) -> bool:
        """Whether this process may speak for the run before rank 0 exists."""
        return int(os.environ["RANK"]) == 0 if self.torchrun else True


def under_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def torchrun_layout() -> Layout:
    world_size = int(os.environ["WORLD_SIZE"])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Layout(processes, world_size // processes, torchrun=True)


def run_processes(layout: Layout, device: str, job: Job, args: tuple[Any, ...]) -> tuple[int, str]:
    """Runs ``job(*args) -> exit code`` in every process of the run and waits for the end.

    GPU processes get a GPU each and talk over NCCL; where a machine has fewer GPUs than processes,
    they share them and talk over gloo, as they do on CPU.

    Args:
        device: ``MODEL.DEVICE``.
        job: importable by name, as spawned processes need it.

    Returns:
        The exit code, and why a process died if it died without returning one.
    """
    if layout.torchrun:
        if layout.world_size == 1:
            _use_threads(device, 1)
            return job(*args), ""
        local_rank = int(os.environ["LOCAL_RANK"])
        return _join(layout, device, int(os.environ["RANK"]), local_rank, None, job, args), ""
    if layout.world_size == 1:
        _use_threads(device, 1)
        return job(*args), ""
    port = None
    if layout.machines == 1 and layout.dist_url is None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
    context = mp.start_processes(
        _spawned, (layout, device, port, job, args), layout.processes, join=False
    )
    return _wait(context)


def _wait(context: Any) -> tuple[int, str]:
    interrupted = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        for process in context.processes:
            process.terminate()  # they save and stop; SIGINT twice would stop them at once

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not context.join(grace_period=_GRACE_SECONDS):
            pass
    except mp.ProcessExitedException as error:
        if interrupted:
            return INTERRUPTED, ""
        if error.signal_name:
            return 1, f"rank {error.error_index} was killed by {error.signal_name}"
        return error.exit_code, ""
    except mp.ProcessRaisedException as error:
        return 1, str(error).strip()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0, ""


def _spawned(
    local_rank: int, layout: Layout, device: str, port: int | None, job: Job, args: tuple[Any, ...]
) -> None:
    rank = layout.machine_rank * layout.processes + local_rank
    sys.exit(_join(layout, device, rank, local_rank, port, job, args))


def _join(
    layout: Layout,
    device: str,
    rank: int,
    local_rank: int,
    port: int | None,
    job: Job,
    args: tuple[Any, ...],
) -> int:
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
    code = job(*args)
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
