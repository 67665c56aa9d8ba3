"""Any torch model's BatchNorms, swapped for a norm of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .binding import ConvBound
from .model import resolve_burn_in
from .sites import STATE, LeftNorm, reasons, some, survey
from .spec import build_norm, known_norms, name_of, norm_class, options_of, parse_spec

_CARRIED = ("eps", "momentum", "affine")  # attributes handed on beside the state


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
            f" {self.converted[0].after}"
        )
        if bound:  # the method does without, else
            line += f"; {bound} bound to their convolution"
        return "\n".join([line, *reasons(self.left)])


def convert_norm(model: nn.Module, spec: str, *, max_iter: int | None = None) -> Conversion:
    """Swaps the BatchNorms of a model for ``build_norm(spec, channels)``, in place.

    Every ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm`` is converted, with the subclasses that
    compute the same in evaluation (norms of ours, detectron2's ``NaiveSyncBatchNorm``). The new
    layers hold the very parameters and buffers of the old ones: an optimizer made before goes on
    updating them, evaluation does not change and checkpoints fit both ways. They keep eps and
    momentum (unless ``spec`` sets them), training mode, device and dtype, and are bound to the
    convolutions that feed them. Other norms, and BatchNorms that do more than BatchNorm (timm's
    ``BatchNormAct2d``) or keep no running statistics, are left and listed with the reason.

    Convert before the model is wrapped in DistributedDataParallel or compiled. After fine-tuning at
    a constant rate, or with ``CBN(compensation='none')``, running statistics lag behind the
    weights: recompute them before an evaluation (PreciseBN, ``update_bn``).

    Args:
        model: any module that contains BatchNorms.
        spec: a registered name, with options or without: ``"CBN(window=8)"``.
        max_iter: optimiser steps of the schedule that a fractional burn-in is a fraction of;
            without it, call :func:`cbn_det.norms.resolve_burn_in` before training.

    Returns:
        What was converted and what was left; ``print`` it.

    Raises:
        ValueError: nothing can be converted, the norm is unknown or no BatchNorm, or a layer that
            must know its convolution follows none. The model is then as it was.
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
    sites, left = survey(model)
    if not sites:
        found = "\n".join(reasons(left)) or "  it has no norm layers"
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


def _replacement(layer: nn.Module, spec: str, name: str) -> nn.BatchNorm2d:
    """A new norm of the layer's options and width, not yet with its state."""
    known = options_of(norm_class(name)) if name in known_norms() else {}
    carried = {key: getattr(layer, key) for key in _CARRIED if key in known}
    new = build_norm(spec, layer.num_features, **carried)
    if not isinstance(new, nn.BatchNorm2d):
        raise ValueError(
            f"norm {spec!r}: {type(new).__name__} is no BatchNorm2d, so it cannot take over a"
            " BatchNorm's statistics: build the model with it"
        )
    return new.to(layer.running_mean.device, layer.running_mean.dtype)


def _hand_over(old: nn.Module, new: nn.BatchNorm2d, given: dict[str, Any]) -> None:
    """Gives a new layer the old one's parameters and buffers, the same objects, and attributes."""
    for name in STATE:
        setattr(new, name, getattr(old, name))
    for name in _CARRIED:
        if name not in given:
            setattr(new, name, getattr(old, name))
    new.train(old.training)


def _needs_conv(layer: nn.Module) -> bool:
    return isinstance(layer, ConvBound) and layer.needs_conv


def _unbound(unbound: list[str], total: int, name: str, given: dict[str, Any]) -> str:
    remedy = "another norm"
    if "compensation" in options_of(norm_class(name)):
        options = given | {"compensation": "none"}
        remedy = f'"{name}({", ".join(f"{key}={value!r}" for key, value in options.items())})"'
    return (
        f"{len(unbound)} of {total} BatchNorms are fed by no nn.Conv2d, or by several, and {name}"
        f" must know it: {some(unbound)}. Nothing was converted. Use {remedy}, or convert only"
        " the parts of the model whose norms follow a convolution: convert_norm(model.part, ...)."
    )
