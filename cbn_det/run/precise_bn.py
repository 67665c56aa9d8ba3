"""PreciseBN: running statistics of BatchNorm layers recomputed over many batches, weights fixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..norms import SmallBatchNorm2d, settle
from ..norms.functional import moments as moments_of
from ..norms.numbers import kept_numbers

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class PooledMoments:
    """Count, mean and sum of squared deviations per channel, in float64, of everything seen."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.deviation = torch.zeros(channels, dtype=torch.float64, device=device)

    def see(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook: every call counts, an empty input (no RoI) adds nothing."""
        x = args[0]
        if x.numel() == 0:
            return
        x = x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, 1)
        found = moments_of(x)
        count = torch.tensor(float(found.count), device=x.device)
        self.add(count, found.mean.double(), found.var.double() * found.count)

    def add(self, count: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        total = self.count + count
        if total == 0:
            return
        delta = mean - self.mean
        self.mean += delta * (count / total)
        self.deviation += deviation + delta.square() * (self.count * count / total)
        self.count = total


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    iterations: int,
    forward: Callable[[Any], Any] | None = None,
    layers: Sequence[nn.Module] | None = None,
) -> int:
    """Sets the running statistics of all BatchNorm layers in training mode to mean and variance
    of its inputs over ``iterations`` batches, exactly, of all ranks together.

    Unlike fvcore's ``update_bn_stats`` it takes layers that see no data in some batch (RoI heads)
    or are called more than once in a forward. A layer that saw no data at all keeps what it had.

    Args:
        model: the bare model; layers in evaluation mode are left alone. Every rank must call this.
        batches: what the training loader yields.
        iterations: how many batches, on each rank.
        forward: runs the model on a batch; the model itself by default.
        layers: of the model's, those to recompute; by default all that are in training mode.

    Returns:
        The number of layers recomputed.

    Raises:
        ValueError: ``batches`` ended early.
    """
    if layers is None:
        layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
        ]
    if not layers:
        return 0
    moments = [PooledMoments(m.num_features, m.running_mean.device) for m in layers]
    hooks = [m.register_forward_pre_hook(s.see) for m, s in zip(layers, moments, strict=True)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0  # as fvcore does; it tells a norm with memory to leave it out
    seen = 0
    try:
        with kept_statistics(model):
            for batch in itertools.islice(batches, iterations):
                (forward or model)(batch)
                seen += 1
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    if seen < iterations:
        raise ValueError(f"PreciseBN: the loader ended after {seen} of {iterations} batches")
    _pool(moments)
    for layer, found in zip(layers, moments, strict=True):
        if found.count > 0:
            if isinstance(layer, SmallBatchNorm2d):
                layer.set_statistics(found.mean, found.deviation / found.count)
            else:
                layer.running_mean.copy_(found.mean)
                layer.running_var.copy_(found.deviation / found.count)
    return len(layers)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Puts the running statistics of all BatchNorm layers back as they were, and numbers that
    other modules keep of training forwards (:func:`~cbn_det.norms.numbers.kept_numbers`)."""
    settle(model)
    saved = [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
        if name in _STATISTICS
    ]
    try:
        with kept_numbers(model):
            yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)


def _pool(moments: list[PooledMoments]) -> None:
    if not dist.is_available() or not dist.is_initialized():
        return
    mine = torch.cat([torch.cat([m.count.reshape(1), m.mean, m.deviation]) for m in moments])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    sizes = [size for m in moments for size in (1, m.mean.numel(), m.mean.numel())]
    # added up anew in the order of ranks, so that all ranks get the same bits
    for found in moments:
        found.count, found.mean, found.deviation = (
            torch.zeros_like(t) for t in (found.count, found.mean, found.deviation)
        )
    for rank in everyone:
        parts = iter(rank.split(sizes))
        for found in moments:
            found.add(next(parts)[0], next(parts), next(parts))
