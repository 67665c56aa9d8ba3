"""The norm layers of a model: which of them evaluate as BatchNorm, and what feeds them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .binding import ConvBound, _feeding_conv

#: what BatchNorm keeps
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)

#: id of a module -> (parent, the parent's name for it), everywhere it is used
Places = dict[int, list[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class LeftNorm:
    """One norm layer that was left as it is.

    Attributes:
        name: of the layer in the model.
        norm: its class.
        reason: why, as half a sentence.
    """

    name: str
    norm: str
    reason: str


def reasons(left: Iterable[LeftNorm]) -> Iterator[str]:
    """A line for each class and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in left:
        groups.setdefault((row.norm, row.reason), []).append(row.name)
    for (norm, reason), names in groups.items():
        yield f"  left: {len(names)} {norm} ({some(names)}): {reason}"


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


@dataclass
class Site:
    """A BatchNorm, everywhere it is used, and the convolution that feeds it."""

    name: str
    layer: nn.Module
    places: list[tuple[nn.Module, str]]  # (parent, the parent's name for it)
    conv: nn.Conv2d | None


def survey(model: nn.Module) -> tuple[list[Site], list[LeftNorm]]:
    """What can be converted, in the model's order, and what is to be left."""
    places: Places = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    sites, left = [], []
    for name, layer in model.named_modules():
        if not _is_norm(layer):
            continue
        reason = _why_left(layer)
        if reason:
            left.append(LeftNorm(name, type(layer).__name__, reason))
        else:
            conv = _conv_of(layer, places)
            sites.append(Site(name, layer, places[id(layer)], conv))
    return sites, left


def _is_norm(layer: nn.Module) -> bool:
    if isinstance(layer, (_BatchNorm, nn.GroupNorm)):
        return True
    name = type(layer).__name__  # those of torch's weight and spectral normalisation begin with _
    return "Norm" in name and not name.startswith("_") and not list(layer.children())


def _why_left(layer: nn.Module) -> str:
    """Why a norm layer cannot be converted, "" if it can."""
    if not isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return "frozen" if "Frozen" in type(layer).__name__ else "no BatchNorm2d"
    inside = [name for name, _ in layer.named_children()]
    if inside:
        return f"does more than BatchNorm, it contains {', '.join(inside)}"
    more = sorted((layer._parameters.keys() | layer._buffers.keys()) - {*STATE})
    if more:
        return f"does more than BatchNorm, it has {', '.join(more)}"
    if layer.running_mean is None or layer.running_var is None:
        return "keeps no running statistics"
    if (layer.weight is None) != (layer.bias is None):
        return "has only one of weight and bias"
    if any(getattr(layer, hooks, None) for hooks in _HOOKS):
        return "has hooks on it, which would be lost"
    forward = type(layer).forward
    if forward in _FORWARDS or forward.__module__.startswith(f"{__package__}."):
        return ""
    try:
        same = _evaluates_as_batchnorm(layer)
    except Exception as error:
        return f"its forward is not BatchNorm's and failed when tried: {error}"
    return "" if same else "does more than BatchNorm, its output in evaluation differs"


@torch.no_grad()
def _evaluates_as_batchnorm(layer: nn.Module) -> bool:
    """Tries a forward of someone else's: on a copy, with values that an activation would change."""
    copied = copy.deepcopy(layer).to("cpu", torch.float32).eval()
    channels = layer.num_features
    values = {"weight": (0.5, 1.5), "bias": (-0.2, 0.2), "running_mean": (-1, 1)}
    for name, (low, high) in (values | {"running_var": (0.5, 2)}).items():
        if getattr(copied, name) is not None:
            getattr(copied, name).copy_(torch.linspace(low, high, channels))
    x = torch.linspace(-20, 20, 8 * channels).view(2, 2, 2, channels).permute(0, 3, 1, 2)
    mean, var = copied.running_mean, copied.running_var
    expected = F.batch_norm(x, mean, var, copied.weight, copied.bias, eps=layer.eps)
    return torch.allclose(copied(x.clone()), expected, rtol=1e-4, atol=1e-4)


def _conv_of(layer: nn.Module, places: Places) -> nn.Conv2d | None:
    """The convolution that feeds a layer; None where there is none, or another at each place."""
    if isinstance(layer, ConvBound) and layer.conv is not None:
        return layer.conv
    convs = {id(conv): conv for conv in (_conv_at(*at, places) for at in places[id(layer)])}
    conv = next(iter(convs.values())) if len(convs) == 1 else None
    return conv if conv is not None and conv.out_channels == layer.num_features else None


def _conv_at(parent: nn.Module, key: str, places: Places) -> nn.Conv2d | None:
    """What registration shows of one norm alone, and what a whole model shows beyond that."""
    conv = _feeding_conv(parent, key)
    if conv is not None:
        return conv
    before = _before(parent, key)
    if isinstance(before, nn.Sequential) and len(before):  # a stem of several layers
        return before[-1] if isinstance(before[-1], nn.Conv2d) else None
    around = places.get(id(parent), [])
    if not isinstance(parent, nn.ModuleList) or len(around) != 1:
        return None
    before = _before(*around[0])
    if isinstance(before, nn.ModuleList) and len(before) == len(parent):  # convs, norms: in pairs
        conv = before[int(key)]
        return conv if isinstance(conv, nn.Conv2d) else None
    return _feeding_conv(*around[0])  # a norm for each feature level after one convolution


def _before(parent: nn.Module, key: str) -> nn.Module | None:
    keys = list(parent._modules)
    index = keys.index(key)
    return parent._modules[keys[index - 1]] if index else None
