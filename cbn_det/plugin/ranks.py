"""What each rank of a training knows that the checkpoint, which rank 0 writes, does not hold.

It lies in a file of the rank's own beside the checkpoint; where machines do not share the folder,
on the rank's machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..run.errors import one_line
from ..run.files import replace_file


def rank_file(folder: str | Path, rank: int, iteration: int) -> Path:
    """Where a rank leaves its state: beside the checkpoints of the same iteration."""
    return Path(folder) / f"rank{rank}_{iteration:07d}.pth"


def save_rank_file(path: Path, run: str, iteration: int, state: dict[str, Any]) -> None:
    """
    Args:
        run: names the process group that trains; the checkpoint holds the same name.
    """
    data = {"run": run, "iteration": iteration, **state}
    path.parent.mkdir(parents=True, exist_ok=True)  # rank 0 may have made it on another machine
    replace_file(path, lambda file: torch.save(data, file))


def load_rank_file(path: Path, run: str, iteration: int) -> dict[str, Any]:
    """What :func:`save_rank_file` wrote.

    Raises:
        ValueError: it is missing, broken or of another save than the checkpoint.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        if (data["run"], data["iteration"]) == (run, iteration):
            return data
    except Exception as error:  # whatever the bytes of a broken or foreign file make it do
        raise ValueError(f"{path} cannot be read ({one_line(error)[:200]})") from error
    raise ValueError(f"{path} was not written with this checkpoint")


def remove_rank_files(folder: str | Path, rank: int, keep: Iterable[int]) -> None:
    """Removes what a rank left for other checkpoints than those of the iterations ``keep``. Such a
    file may hold much (of a CBN layer several times its convolution's weight), and is of use to
    whoever resumes the checkpoint alone."""
    kept = {rank_file(folder, rank, iteration).name for iteration in keep}
    for path in Path(folder).glob(f"rank{rank}_*.pth"):
        if re.fullmatch(r"rank\d+_\d{7,}\.pth", path.name) and path.name not in kept:
            path.unlink(missing_ok=True)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's buffers: ranks have running statistics of their own."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def load_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])
