"""detectron2's checkpointer, for files that are whole and fit."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import nn

from ..run.checkpoint import AtomicSave
from ..run.fit import check_complete
from .datasets import NUM_CLASSES_KEY
from .registry import site_of

_OF_CLASSES = re.compile(r"\.(cls_score|bbox_pred|predictor)\.")


class AtomicCheckpointer(AtomicSave, DetectionCheckpointer):
    """detectron2's checkpointer, whose files are either whole or not there, and which refuses to
    resume the checkpoint of another model.

    Args:
        save_dir: where checkpoints are.
        cfg: that describes the model; its keys are named in errors.

    Attributes:
        incompatible: what was missing or left over when a file was loaded last; None before.
    """

    incompatible: Any = None

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        cfg: CfgNode | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._cfg = cfg
        self._complete: str | None = None

    def load_complete(self, path: str, where: str) -> None:
        """Loads the weights of a file that must be those of this model, nothing else.

        Args:
            where: names the file in the error.

        Raises:
            ConfigError: a tensor is missing, of another shape, or has no place in the model.
        """
        self._complete = where
        self.load(path, checkpointables=[])

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        if resume and self.has_checkpoint():
            self._complete = f"--resume: {self.get_checkpoint_file()}"
        return super().resume_or_load(path, resume=resume)

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        where, self._complete = self._complete, None
        if where is not None:
            found = self.incompatible
            shapes = {name: (saved, wanted) for name, saved, wanted in found.incorrect_shapes}
            missing = [n for n in _unloaded(self.model, found.missing_keys) if n not in shapes]
            key_for = partial(_key_for, self._cfg)
            check_complete(where, shapes, missing, found.unexpected_keys, key_for)
        return self.incompatible


def _unloaded(model: nn.Module, missing: list[str]) -> list[str]:
    """The tensors without a value from the file: one that layers share needs one name only."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [shared[0] for shared in names.values() if set(shared) <= set(missing)]


def _key_for(cfg: CfgNode | None, tensor: str, other_shape: bool) -> str:
    if cfg is None:
        return ""
    if other_shape and _OF_CLASSES.search(tensor):
        return NUM_CLASSES_KEY.get(cfg.MODEL.META_ARCHITECTURE, "")
    key = site_of(tensor)
    return key.removesuffix(".NORM") if other_shape else key
