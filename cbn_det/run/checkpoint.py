"""Checkpoints that are either whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
