"""Whether pretrained weights fit the norms of the backbone that they were loaded into.

detectron2 loads what has a matching name and says little about the rest; a norm with another
network's statistics, or none, then trains for days. What fits is told by the tensors, not by the
name of the file.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..norm_keys import BACKBONE
from ..run.errors import ConfigError

_COUNTER = "num_batches_tracked"  # torch makes one up for files of old versions
_STATISTICS = re.compile(r"\.running_(mean|var)$")
_GN_WEIGHTS = "catalog://ImageNetPretrained/FAIR/R-50-GN"
_BN_WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


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
