"""Norm layers by their config names, and what freezing makes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ..norms import build_norm, try_norm
from ..run.errors import ConfigError

NormLayer = Callable[[int], nn.Module] | None

#: detectron2's names of torch's and torchvision's norms
_TORCH_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    # in one process it computes what BatchNorm computes
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


def norm_builder(key: str, norm: str) -> NormLayer:
    """What torchvision's builders take as ``norm_layer``.

    Args:
        key: the config key, for the error.
        norm: its value: a name, with options where it is one of ours; "" for no norm.

    Returns:
        A function from the number of channels to a layer, None for no norm. It raises a
        ConfigError that names the key where the layer cannot have so many channels.
    """

    def build(channels: int) -> nn.Module:
        try:
            make = _TORCH_NORMS.get(norm) or partial(build_norm, norm)
            return make(channels)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error

    return build if norm else None


def check_norm(key: str, norm: str) -> None:
    """Builds a layer once, so that a mistake is told before anything is prepared.

    Raises:
        ConfigError: an unknown name or option; names the config key and the known values.
    """
    if not norm or norm in _TORCH_NORMS:
        return
    try:
        layer = try_norm(norm)
    except ValueError as error:
        raise ConfigError(
            f"{key}: {error}; without options {', '.join(_TORCH_NORMS)}, or '' for none;"
            " --engine detectron2 takes more"
        ) from error
    if key == "MODEL.RESNETS.NORM" and getattr(layer, "affine", True) is False:
        raise ConfigError(f"{key}: {norm}: torchvision's ResNet sets the weights of its norms")


def freeze(module: nn.Module) -> nn.Module:
    """Takes a part of a model out of training, as detectron2's FREEZE_AT does: its parameters get
    no gradient, and every BatchNorm in it, ours included, becomes a FrozenBatchNorm2d with the same
    weights and statistics. A GroupNorm stays what it is.

    Returns:
        What is to take the module's place: a new layer if it is itself a BatchNorm, else the
        module, changed in place.
    """
    for parameter in module.parameters():
        parameter.requires_grad = False
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        frozen.load_state_dict(module.state_dict(), strict=False)  # affine=False: no weight
        return frozen
    for name, child in module.named_children():
        setattr(module, name, freeze(child))
    return module
