"""Checkpoints that are either whole or not there, and what they hold of the norms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..norms import load_memory_state_dict, memory_state_dict, norm_rows, resolve_burn_in
from ..norms.freeze import freeze_layers, frozen_layers
from .files import replace_file


class AtomicSave:
    """Mixin of fvcore's ``Checkpointer``: writes through :func:`replace_file` into a local
    folder."""

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        replace_file(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        replace_file(
            Path(self.save_dir) / "last_checkpoint",
            lambda file: file.write(last_filename_basename.encode()),
        )


def norm_state(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of a model's norms besides their weights."""
    return {
        "norm_memory": memory_state_dict(model),
        "norms": _norms(model),
        "frozen_norms": frozen_layers(model),
    }


def load_norm_state(
    model: nn.Module, state: Mapping[str, Any], start_iter: int, max_iter: int
) -> str:
    """Restores what :func:`norm_state` returned, all of it or nothing. Norms that remember nothing
    know at least that they are at ``start_iter`` of ``max_iter``.

    Returns:
        Why nothing was restored; empty if all is well.
    """
    before = memory_state_dict(model)
    try:
        if "norm_memory" not in state:
            raise ValueError("it holds no norm memory")
        if state["norms"] != _norms(model):
            raise ValueError("the model has other norms")
        load_memory_state_dict(model, state["norm_memory"])
        freeze_layers(model, state["frozen_norms"], start_iter)
    except ValueError as error:
        load_memory_state_dict(model, before)
        resolve_burn_in(model, max_iter, start_iter)
        return f"{error}: windows of all norms start anew, burn-ins go on"
    return ""


def _norms(model: nn.Module) -> dict[str, str]:
    return {row.name: row.norm for row in norm_rows(model)}
