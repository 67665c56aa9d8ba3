"""Any torch model's BatchNorms, swapped for a norm of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .base import SmallBatchNorm2d
from .binding import ConvBound, _feeding_conv
from .model import resolve_burn_in
from .spec import build_norm, known_norms, name_of, options_of, parse_spec

_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_CARRIED = ("eps", "momentum", "affine")  # attributes handed on beside the state
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SmallBatchNorm2d.forward)


# id of a module -> (parent, the parent's name for it), everywhere it is used
_Places = dict[int, list[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class ConvertedNorm:
    """One layer that was swapped.

    Attributes:
        name: of the layer in the model; the first one, if the layer is used at several places.
        before: what it was: the class, or the registered name of a norm of ours.
        after: what it is now: the norm as :func:`convert_norm` was given it.
        channels: of its input.
        conv: name of the convolution it is bound to, "" if none.
    """

    name: str
    before: str
    after: str
    channels: int
    conv: str


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


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_norm` did; ``str()`` is a report of it."""

    converted: tuple[ConvertedNorm, ...]
    left: tuple[LeftNorm, ...]

    def __str__(self) -> str:
        total = len(self.converted) + len(self.left)
        bound = sum(bool(row.conv) for row in self.converted)
        kinds = sorted({row.before for row in self.converted})
        line = (
            f"{len(self.converted)} of {total} norm layers converted: {', '.join(kinds)} ->"
            f" {self.converted[0].after}; {bound} bound to their convolution"
        )
        return "\n".join([line, *_reasons(self.left)])


def _reasons(left: Iterable[LeftNorm]) -> Iterator[str]:
    """A line for each class and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in left:
        groups.setdefault((row.norm, row.reason), []).append(row.name)
    for (norm, reason), names in groups.items():
        yield f"  left: {len(names)} {norm} ({_some(names)}): {reason}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def convert_norm(model: nn.Module, spec: str, *, max_iter: int | None = None) -> Conversion:
    """Swaps the BatchNorms of a model for ``build_norm(spec, channels)``, in place.

    Every ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm`` is converted, with the subclasses that
    compute the same in evaluation (norms of ours, detectron2's ``NaiveSyncBatchNorm``). The new
    layers hold the very parameters and buffers of the old ones, so that an optimizer made before
    goes on updating them, evaluation does not change and checkpoints fit both ways; they keep eps
    and momentum (unless ``spec`` sets them), training mode, device and dtype, and are bound to the
    convolutions that feed them. Convert before the model is wrapped in DistributedDataParallel or
    compiled.

    Other norms (GroupNorm, FrozenBatchNorm2d, BatchNorm1d), and BatchNorms that do more than
    BatchNorm (timm's ``BatchNormAct2d`` has its activation inside) or lack something (running
    statistics), are left alone and listed with the reason.

    Args:
        model: any module that contains BatchNorms.
        spec: a registered name, with options or without: ``"CBN(window=8)"``.
        max_iter: optimiser steps of the schedule that a fractional burn-in is a fraction of;
            without it, call :func:`cbn_det.norms.resolve_burn_in` before training.

    Returns:
        What was converted and what was left; ``print`` it.

    Raises:
        ValueError: the model is itself a BatchNorm, nothing could be converted, an unknown norm or
            option, a norm that is no BatchNorm, or a layer that must know its convolution and
            follows none. The model is then as it was.
    """
    if isinstance(model, _BatchNorm):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be swapped in place:"
            " convert the module that contains it, or call build_norm"
        )
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"max_iter={max_iter!r}: expected a positive number of optimiser steps")
    name, given = parse_spec(spec)
    if "affine" in given:
        raise ValueError(f"norm {spec!r}: layers keep their weights: leave the option affine out")
    sites, left = _survey(model)
    if not sites:
        found = "\n".join(_reasons(left)) or "  it has no norm layers"
        raise ValueError(f"no BatchNorm2d to convert in this {type(model).__name__}:\n{found}")
    layers = [_replacement(site.layer, spec, name) for site in sites]
    needing = [s for s, new in zip(sites, layers, strict=True) if _needs_conv(new)]
    unbound = [site.name for site in needing if site.conv is None]
    if unbound:
        raise ValueError(_unbound(unbound, len(sites), name, given))

    # Nothing has touched the model so far, and nothing below refuses.
    names = {id(module): module_name for module_name, module in model.named_modules()}
    rows = []
    for site, layer in zip(sites, layers, strict=True):
        _hand_over(site.layer, layer, given)
        for parent, key in site.places:
            setattr(parent, key, layer)
        if _needs_conv(layer):
            layer.bind(site.conv)  # also where registration alone does not show it
        bound = layer.conv if isinstance(layer, ConvBound) else None
        rows.append(
            ConvertedNorm(
                name=site.name,
                before=name_of(type(site.layer)) or type(site.layer).__name__,
                after=spec.strip(),
                channels=site.layer.num_features,
                conv="" if bound is None else names.get(id(bound), "(outside this model)"),
            )
        )
    if max_iter is not None:
        resolve_burn_in(model, max_iter)
    return Conversion(tuple(rows), tuple(left))


@dataclass
class _Site:
    """A BatchNorm, everywhere it is used, and the convolution that feeds it."""

    name: str
    layer: nn.Module
    places: list[tuple[nn.Module, str]]  # (parent, the parent's name for it)
    conv: nn.Conv2d | None


def _survey(model: nn.Module) -> tuple[list[_Site], list[LeftNorm]]:
    """What can be converted, in the model's order, and what is to be left."""
    places: _Places = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    sites, left = [], []
    for name, layer in model.named_modules():
        leaf = not list(layer.children())
        if not (isinstance(layer, _BatchNorm) or ("Norm" in type(layer).__name__ and leaf)):
            continue
        reason = _why_left(layer)
        if reason:
            left.append(LeftNorm(name, type(layer).__name__, reason))
        else:
            conv = _conv_of(layer, places)
            sites.append(_Site(name, layer, places[id(layer)], conv))
    return sites, left


def _why_left(layer: nn.Module) -> str:
    """Why a norm layer cannot be converted, "" if it can."""
    if not isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return "frozen" if "Frozen" in type(layer).__name__ else "no BatchNorm2d"
    inside = [name for name, _ in layer.named_children()]
    if inside:
        return f"does more than BatchNorm, it contains {', '.join(inside)}"
    more = sorted((layer._parameters.keys() | layer._buffers.keys()) - set(_STATE))
    if more:
        return f"does more than BatchNorm, it has {', '.join(more)}"
    if layer.running_mean is None or layer.running_var is None:
        return "keeps no running statistics"
    if (layer.weight is None) != (layer.bias is None):
        return "has only one of weight and bias"
    if any(getattr(layer, hooks, None) for hooks in _HOOKS):
        return "has hooks on it, which would be lost"
    if type(layer).forward in _FORWARDS:
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


def _conv_of(layer: nn.Module, places: _Places) -> nn.Conv2d | None:
    """The convolution that feeds a layer; None where there is none, or another at each place."""
    if isinstance(layer, ConvBound) and layer.conv is not None:
        return layer.conv
    convs = {id(conv): conv for conv in (_conv_at(*at, places) for at in places[id(layer)])}
    conv = next(iter(convs.values())) if len(convs) == 1 else None
    return conv if conv is not None and conv.out_channels == layer.num_features else None


def _conv_at(parent: nn.Module, key: str, places: _Places) -> nn.Conv2d | None:
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


def _replacement(layer: nn.Module, spec: str, name: str) -> nn.BatchNorm2d:
    """A new norm of the layer's options and width, not yet with its state."""
    known = options_of(name) if name in known_norms() else {}
    carried = {key: getattr(layer, key) for key in _CARRIED if key in known}
    new = build_norm(spec, layer.num_features, **carried)
    if not isinstance(new, nn.BatchNorm2d):
        raise ValueError(
            f"norm {spec!r}: {type(new).__name__} is no BatchNorm2d, so it cannot take over a"
            " BatchNorm's statistics"
        )
    return new.to(layer.running_mean.device, layer.running_mean.dtype)


def _hand_over(old: nn.Module, new: nn.BatchNorm2d, given: dict[str, Any]) -> None:
    """Gives a new layer the old one's parameters and buffers, the same objects, and attributes."""
    for name in _STATE:
        setattr(new, name, getattr(old, name))
    for name in _CARRIED:
        if name not in given:
            setattr(new, name, getattr(old, name))
    new.train(old.training)


def _needs_conv(layer: nn.Module) -> bool:
    return isinstance(layer, ConvBound) and layer.needs_conv


def _unbound(unbound: list[str], total: int, name: str, given: dict[str, Any]) -> str:
    remedy = "another norm"
    if "compensation" in options_of(name):
        options = given | {"compensation": "none"}
        remedy = f'"{name}({", ".join(f"{key}={value!r}" for key, value in options.items())})"'
    return (
        f"{len(unbound)} of {total} BatchNorms are fed by no nn.Conv2d, or by several, and {name}"
        f" must know it: {_some(unbound)}. Nothing was converted. Use {remedy}, or convert only"
        " the parts of the model whose norms follow a convolution: convert_norm(model.part, ...)."
    )
