"""detectron2's checkpointer, for files that are whole and fit.

It loads what has a matching name and says little about the rest; a norm with another network's
statistics, or none, then trains for days. What fits is told by the tensors, not by the file's name.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..norm_keys import BACKBONE
from ..run.checkpoint import AtomicSave, check_complete
from ..run.errors import ConfigError
from .datasets import NUM_CLASSES_KEY
from .registry import site_of

_COUNTER = "num_batches_tracked"  # torch makes one up for files of old versions
_STATISTICS = re.compile(r"\.running_(mean|var)$")
_GN_WEIGHTS = "catalog://ImageNetPretrained/FAIR/R-50-GN"
_BN_WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
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


def check_weights(model: nn.Module, incompatible: Any, cfg: CfgNode) -> None:
    """Refuses ``MODEL.WEIGHTS`` that a training must not start from.

    - No tensor of the file has a name of the model's: a frozen backbone would stay random.
    - The backbone's BatchNorm-like norms are trained, but the statistics of the weights are folded
      into scale and bias, or are GroupNorm's, which has none: every running mean is 0 and every
      variance 1, though scale and bias were learned.
    - The backbone's norms are GroupNorm's, but the file holds BatchNorm's statistics for them.

    Args:
        model: after loading.
        incompatible: what the checkpointer found, with ``missing_keys`` and ``unexpected_keys``.

    Raises:
        ConfigError: names the file, the norm's key and what to use instead.
    """
    where = f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}"
    loaded = set(model.state_dict()) - set(incompatible.missing_keys)
    if all(key.endswith(_COUNTER) for key in loaded):
        raise ConfigError(
            f"{where}: none of its tensors has the name of one in the model. For torchvision's"
            " ResNets detectron2 has tools/convert-torchvision-to-d2.py"
        )
    norm = f"MODEL.RESNETS.NORM {cfg.MODEL.RESNETS.NORM}"
    folded = _without_statistics(model)
    if folded:
        raise ConfigError(
            f"{where}: it has no BatchNorm statistics (all {len(folded)} trainable norms of the"
            f" backbone, the first {folded[0]}, have running mean 0 and variance 1: they are folded"
            f" into scale and bias, or the weights are GroupNorm's), and {norm} would train on"
            " from them. Use MODEL.RESNETS.NORM FrozenBN, or weights with their statistics, such as"
            f" {_BN_WEIGHTS}"
        )
    surplus = _unused_statistics(model, incompatible.unexpected_keys)
    if surplus:
        raise ConfigError(
            f"{where}: it holds BatchNorm statistics for {surplus}, but {norm} normalises groups"
            f" of channels. Use weights that were trained with GroupNorm, such as {_GN_WEIGHTS}"
            " with MODEL.RESNETS.STRIDE_IN_1X1 False (GN+WS: with weights of its own)"
        )


def _backbone_norms(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and re.match(BACKBONE.modules, name)
    }


def _without_statistics(model: nn.Module) -> list[str]:
    """The backbone's norms with a learned scale and bias and the statistics of a new layer; empty
    if any layer has both, as then the rest were not used where the weights come from."""
    learned = {
        name: layer
        for name, layer in _backbone_norms(model, _BatchNorm).items()
        if layer.affine and not (torch.all(layer.weight == 1) and torch.all(layer.bias == 0))
    }
    new = [
        name
        for name, layer in learned.items()
        if torch.all(layer.running_mean == 0) and torch.all(layer.running_var == 1)
    ]
    return new if len(new) == len(learned) else []


def _unused_statistics(model: nn.Module, unexpected: list[str]) -> str | None:
    """A GroupNorm of the backbone that the file has statistics for; these have no place in it, so
    their names may lack the model's prefix."""
    layers = [_STATISTICS.sub("", key) for key in unexpected if _STATISTICS.search(key)]
    for name in _backbone_norms(model, nn.GroupNorm) if layers else ():
        if any(name == layer or name.endswith(f".{layer}") for layer in layers):
            return name
    return None
