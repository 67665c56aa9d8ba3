"""Norm layers that see what a model's BatchNorms see, and change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cbn_det.norms import (
    Estimate,
    Moments,
    SmallBatchNorm2d,
    build_norm,
    convert_norm,
    resolve_burn_in,
)
from cbn_det.norms.binding import ConvBound
from cbn_det.norms.chain import Chained
from cbn_det.norms.functional import moments
from cbn_det.norms.graph import mark
from cbn_det.norms.remembering import RememberingNorm2d
from cbn_det.run.errors import ConfigError

#: what "BN" stands for among the shadows: BatchNorm, to the last bit
_BATCHNORM = "CBN(window=1, ema='batch')"

OnInput = Callable[["Site", Tensor], None]
OnEstimate = Callable[["Site", str, SmallBatchNorm2d, Estimate], None]
Normalized = tuple[Tensor, Moments, Estimate]


class Site:
    """A BatchNorm of the model, its ``host``, and its shadows, by the norm they are asked for with.
    A Kalman norm finds it in the place of the BatchNorm."""

    def __init__(self, name: str, host: nn.BatchNorm2d) -> None:
        self.name = name
        self.host = host
        self.shadows: dict[str, SmallBatchNorm2d] = {}

    @property
    def channels(self) -> int:
        return self.host.num_features

    @property
    def weight(self) -> Tensor | None:
        return self.host.weight

    @property
    def bias(self) -> Tensor | None:
        return self.host.bias


class Shadows:
    """Layers of several norms beside every BatchNorm of a model: real layers, called with the input
    of each forward, whose output nobody uses.

    They hold the BatchNorm's own weight and bias, are bound to the convolution that feeds it, and
    live through the same iterations, so that their statistics are what these norms would have
    estimated on this model's way. They are no part of the model: neither parameters nor buffers nor
    gradients nor random numbers differ with them there. For the second pass of MBN hand
    :meth:`layers` to :meth:`cbn_det.norms.DoubleForward.include`. PreciseBN passes them by.
    Re-entrant activation checkpoints, whose first forward looks like that second pass, are not
    supported.

    Args:
        model: in training mode, its BatchNorms ``nn.BatchNorm2d`` or norms of ours.
        norms: as in a config, ``"CBN(window=8)"``; ``"BN"`` is BatchNorm.
        max_iter: what a fractional burn-in is a fraction of.

    Attributes:
        sites: in the order of the model's modules.
        asleep: whether no shadow is called, ``on_input`` alone.
        on_input: called with a site and the input of its BatchNorm, in training mode.
        on_estimate: called with site, norm, shadow and what the shadow has just estimated.

    Raises:
        ConfigError: a norm cannot be a shadow here; says why.
    """

    def __init__(self, model: nn.Module, norms: Sequence[str], max_iter: int) -> None:
        self.asleep = False
        self._seen: tuple[Tensor, Moments] | None = None
        self.on_input: OnInput | None = None
        self.on_estimate: OnEstimate | None = None
        self.sites: dict[str, Site] = {}
        for norm in norms:
            self._add(model, norm, max_iter)
        for site in self.sites.values():
            site.host.register_forward_pre_hook(partial(self._see, site))
            if any(isinstance(layer, Chained) for layer in site.shadows.values()):
                site.host.register_forward_hook(partial(self._mark, site))

    def layers(self) -> Iterator[SmallBatchNorm2d]:
        """Every shadow."""
        for site in self.sites.values():
            yield from site.shadows.values()

    def _add(self, model: nn.Module, norm: str, max_iter: int) -> None:
        spec = _BATCHNORM if norm == "BN" else norm
        try:  # what a conversion finds: which layers there are, and what feeds them
            found = convert_norm(copy.deepcopy(model), spec).converted
            for row in found:
                host = model.get_submodule(row.name)
                layer = build_norm(spec, row.channels, affine=host.affine)
                self._attach(layer, host, model.get_submodule(row.conv) if row.conv else None)
                resolve_burn_in(layer, max_iter)
                site = self.sites.setdefault(row.name, Site(row.name, host))
                site.shadows[norm] = layer
                layer._normalized = partial(self._normalized, layer._normalized, site, norm, layer)
                layer._is_plain = partial(self._is_plain, layer._is_plain)
                if type(layer).batch_moments is SmallBatchNorm2d.batch_moments:
                    layer.batch_moments = self._moments
        except ValueError as error:
            raise ConfigError(
                f"{norm} cannot be measured beside the model's norms: {error}"
            ) from error

    @staticmethod
    def _attach(layer: nn.Module, host: nn.BatchNorm2d, conv: nn.Module | None) -> None:
        known = {"weight", "bias", *dict(host.named_parameters())}
        learns = [name for name, _ in layer.named_parameters() if name not in known]
        if learns:
            raise ValueError(f"{', '.join(learns)} would never be trained")
        layer.to(host.running_mean.device, host.running_mean.dtype)
        layer.weight, layer.bias = host.weight, host.bias
        if isinstance(layer, ConvBound) and layer.needs_conv:
            layer.bind(conv)

    def _see(self, site: Site, host: nn.Module, args: tuple[Any, ...]) -> None:
        y = args[0]
        precise = host.momentum == 1.0 and not torch.is_grad_enabled()
        if not host.training or precise:
            return
        if self.on_input is not None:
            self.on_input(site, y)
        if self.asleep:
            return
        # without gradient and unless somebody asks, this is the second pass of Double Forward
        asked = torch.is_grad_enabled() or self.on_estimate is not None
        try:
            for layer in site.shadows.values():
                if asked or (isinstance(layer, RememberingNorm2d) and layer.double_forward):
                    layer(y)
        finally:
            self._seen = None

    def _is_plain(self, is_plain: Callable[[Tensor], bool], y: Tensor) -> bool:
        """Whether torch's BatchNorm takes a shadow's forward, which then makes no estimate."""
        return self.on_estimate is None and is_plain(y)

    def _moments(self, y: Tensor) -> Moments:
        """Of one input, which many shadows ask for."""
        if self._seen is None or self._seen[0] is not y:
            self._seen = (y, moments(y))
        return self._seen[1]

    def _mark(self, site: Site, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if host.training:
            mark(output, site)

    def _normalized(
        self, normalized: Callable[..., Normalized], site: Site, norm: str, layer: Any, *args: Any
    ) -> Normalized:
        output, batch, estimate = normalized(*args)
        if self.on_estimate is not None:
            self.on_estimate(site, norm, layer, estimate)
        return output, batch, estimate
