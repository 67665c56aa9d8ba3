"""Several processes of one job inside a test, talking over gloo on the CPU.

They are forked from a server that has imported the slow libraries and run nothing: autograd refuses
to compute in what was forked from a process where it has threads, which some tests start.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# read when the server starts; what is not installed it passes over
multiprocessing.set_forkserver_preload(["torch._dynamo", "torchvision", "detectron2.engine"])


def in_order(n: int, **kwargs: Any) -> torch.Tensor:
    """In place of ``torch.randperm``: what is sampled is the same in every process."""
    return torch.arange(n)


def run_ranks(job: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Runs ``job(rank, world, *args)`` in each process; what they return, in the order of ranks.

    ``job`` is a function of a module, and shares nothing with the test but its arguments. A
    collective that waits for half a minute is an error, and so is a job that raises.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(
        _process, (world, port, job, str(folder), args), world, start_method="forkserver"
    )
    results = []
    for rank in range(world):
        with open(os.path.join(folder, str(rank)), "rb") as file:
            results.append(pickle.load(file))
    errors = [text for text in results if isinstance(text, _Error)]
    assert not errors, "\n".join(errors)
    return results


class _Error(str):
    pass


def _process(
    rank: int, world: int, port: int, job: Callable[..., Any], folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try:
        result = job(rank, world, *args)
    except Exception:
        result = _Error(f"rank {rank}: {traceback.format_exc()}")
    with open(os.path.join(folder, str(rank)), "wb") as file:
        pickle.dump(result, file)
    dist.destroy_process_group()
