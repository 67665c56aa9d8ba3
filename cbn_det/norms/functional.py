"""Tensor functions behind the norms: moments, and mixtures of them.

Statistics are per channel and in float32 (float64 for float64 input), whatever the dtype of the
activations. On CUDA the kernels are those of ``nn.SyncBatchNorm``; nothing waits for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

#: mean, in standard deviations, up to which the fast sums of :func:`moments` lose no digit
_LARGEST_MEAN = 2.0
#: numbers from which on they are faster than torch's kernel
LARGE = 2**15
#: device types that have SyncBatchNorm's kernels; on "meta" a step can be run without any device
FUSED = ("cuda", "meta")


@dataclass
class Moments:
    """Per-channel moments of one mini-batch.

    Attributes:
        mean: [C], the mean.
        var: [C], the biased variance (divided by ``count``).
        count: number of values per channel, N * H * W.
    """

    mean: Tensor
    var: Tensor
    count: int


@dataclass
class Estimate:
    """What a method takes for a layer's statistics in one training forward.

    The moments of the mini-batch itself take part with ``share``: ``mean = share * E[x] + a`` and
    ``var + mean**2 = share * E[x**2] + b``.

    Attributes:
        mean: [C]. What depends on the current mini-batch is detached (``share`` stands for it);
            other dependencies, such as a conv bias, may carry gradient.
        var: [C], biased, not negative; likewise.
        share: number or [C], in [0, 1]; a constant for the gradient.
        groups: number of groups of neighbouring channels that have their statistics in common;
            None: every channel has its own.
        scale, shift: [C] each, or None: what the normalised values are multiplied by, and what is
            then added, before the affine parameters; constants for the gradient, to which mean and
            var then are constants as well.
        invstd: [C], ``1 / sqrt(var + eps)``, where it is known already.
        of_groups: mean and inverse standard deviation [groups] of each group, where they are known
            already and the share is 1.
    """

    mean: Tensor
    var: Tensor
    share: Tensor | float
    groups: int | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    invstd: Tensor | None = None
    of_groups: tuple[Tensor, Tensor] | None = None


@dataclass
class GroupMoments(Moments):
    """Those of groups of channels, a channel each.

    Attributes:
        invstd: [C], the inverse standard deviation.
        of_groups: mean and inverse standard deviation [groups] of each group.
    """

    invstd: Tensor
    of_groups: tuple[Tensor, Tensor]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype statistics of ``x`` are kept in: float64 for float64, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def filled_like(values: Tensor, number: float) -> Tensor:
    """[C], the same tensor at each call, to read only."""
    return filled(number, values.shape[0], values.dtype, values.device)


@lru_cache(maxsize=1024)
def filled(number: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size], likewise."""
    with torch.inference_mode(False):
        return torch.full((size,), number, dtype=dtype, device=device)


def inverse_std(var: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(var + eps)`` of variances [C]."""
    return (var + filled_like(var, eps)).rsqrt_()  # adding a number takes a CPU twice as long


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast would run the matrix products of a compensation in 16 bits."""
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


_has_autocast = lru_cache(torch.amp.is_autocast_available)
_NOTHING = nullcontext()


def moments(
    x: Tensor, running: tuple[Tensor, Tensor] | None = None, momentum: float = 0.0
) -> Moments:
    """Mean and biased variance over N, H, W of a non-empty ``x`` [N, C, H, W], without gradient.
    The variance is accumulated about the mean: ``mean(x * x) - mean(x) ** 2`` would lose digits.

    Args:
        x: the activations; of more than one value a channel where ``running`` is given.
        running: mean and variance [C] that are moved towards them by BatchNorm's rule.
        momentum: of that rule.
    """
    x = x.detach()
    count = x.numel() // x.shape[1]
    kind = x.device.type
    if kind not in FUSED:
        x = x.to(statistics_dtype(x))
    large = x.numel() >= LARGE and x.is_contiguous()
    if kind in FUSED or (kind == "cpu" and not large):
        old_mean, old_var = running or (None, None)
        mean, var = torch.batch_norm_update_stats(x, old_mean, old_var, momentum)
        return Moments(mean, var, count)
    if kind == "cpu":
        mean, var = _moments_on_cpu(x, count)
    else:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    if running is not None:
        unbiased = var * (count / (count - 1.0))
        torch._foreach_lerp_(list(running), [mean, unbiased], momentum)
    return Moments(mean, var, count)


def _moments_on_cpu(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same as torch's batch-norm kernel, in a fifth of the time: by the vectorised sums of
    BatchNorm's backward kernel. ``sum of x (x - mean)`` loses digits as ``mean / std`` grows, so
    that channels whose mean is large are left to the slow kernel."""
    mean = x.sum((0, 2, 3)) / count
    _, product, _ = torch.ops.aten.native_batch_norm_backward(
        x, x, None, None, None, mean, torch.ones_like(mean), True, 0.0, [False, True, False]
    )
    var = product.div_(count).clamp_(min=0.0)
    rough = mean.square() > _LARGEST_MEAN**2 * var
    if rough.any():
        exact = torch.batch_norm_update_stats(x[:, rough], None, None, 0.0)
        mean[rough], var[rough] = exact
    return mean, var


def mixture(mean: Tensor, var: Tensor, weights: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture.

    Args:
        mean, var: [parts, ...], of each part.
        weights: broadcastable to them; they sum to 1 over the first dimension.
    """
    mixed = _sum_of(weights * mean)
    difference = mean - mixed
    parts = torch.addcmul(var, difference, difference)
    return mixed, _sum_of(parts.mul_(weights))


def _sum_of(parts: Tensor) -> Tensor:
    """Over the first dimension, every column in the same order. On a CPU ``sum`` adds up columns at
    the end of a row otherwise than the rest; on CUDA ``cumsum`` is no deterministic algorithm."""
    return parts.cumsum(0)[-1] if parts.device.type == "cpu" else parts.sum(0)


def even_mixture(parts: Tensor) -> Tensor:
    """The same, [2, ...], of parts that count alike, given as ``parts`` [parts, 2, ...]."""
    if parts.device.type not in FUSED:  # across rows var_mean takes up to 40 times as long there
        return torch.stack(mixture(parts[:, 0], parts[:, 1], 1.0 / len(parts)))
    spread, mixed = torch.var_mean(parts, 0, correction=0)
    mixed[1] += spread[0]
    return mixed


def mixed_in(
    mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """The same for two parts, of which the first counts ``share`` and the other one the rest."""
    rest = 1.0 - share
    difference = other_mean - mean
    mean, var = torch._foreach_lerp([mean, var], [other_mean, other_var], rest)
    return mean, var.addcmul_(difference, difference, value=share * rest)


def group_mean(values: Tensor, groups: int) -> Tensor:
    """Means over ``groups`` equal groups of neighbouring channels, [C] expanded to [C]."""
    return values.view(groups, -1).mean(1).repeat_interleave(len(values) // groups)


def moments_of_groups(x: Tensor, groups: int, eps: float) -> GroupMoments:
    """Moments of groups of neighbouring channels of ``x`` [N, C, H, W], expanded to [C]; ``eps`` is
    added to the variance where its root is taken."""
    n, channels, height, width = x.shape
    size = channels // groups
    rows = n, groups, size * height, width  # a group is a channel of more rows
    whole = moments(x.contiguous().view(rows))
    invstd = inverse_std(whole.var, eps)
    mean, var, of_channels = to_channels([whole.mean, whole.var, invstd], channels)
    return GroupMoments(mean, var, whole.count, of_channels, (whole.mean, invstd))


def to_channels(values: list[Tensor], channels: int) -> tuple[Tensor, ...]:
    """What groups of neighbouring channels have, [groups] each, as [channels] each."""
    each = [value.view(-1, 1).expand(-1, channels // value.numel()) for value in values]
    return torch.cat(each).view(len(values), channels).unbind()
