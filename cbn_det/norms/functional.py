"""Tensor functions behind the norms: moments, mixtures of them, and normalisation with an exact
backward pass.

Statistics are per channel and in float32 (float64 for float64 input), whatever the dtype of the
activations. On CUDA the kernels are those of ``nn.SyncBatchNorm``; nothing waits for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: mean, in standard deviations, up to which the fast sums of :func:`moments` lose no digit
_LARGEST_MEAN = 2.0
#: numbers from which on they are faster than torch's kernel
_LARGE = 2**15
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
    return _filled(number, values.shape[0], values.dtype, values.device)


@lru_cache(maxsize=1024)
def _filled(number: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
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
    large = x.numel() >= _LARGE and x.is_contiguous()
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


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        estimate: Estimate,
        eps: float,
    ) -> Tensor:
        dtype = mean.dtype
        mean, var = mean.contiguous(), var.contiguous()  # the kernels do not look at strides
        w = filled_like(mean, 1.0) if weight is None else weight.to(dtype)
        b = filled_like(mean, 0.0) if bias is None else bias.to(dtype)
        invstd = inverse_std(var, eps) if estimate.invstd is None else estimate.invstd
        scale, shift, scaled = estimate.scale, estimate.shift, invstd
        if scale is not None:
            zero = filled_like(mean, 0.0)
            w, b, scaled = torch._foreach_addcmul(
                [zero, b, zero], [w, w, invstd], [scale, shift, scale]
            )
        of_groups = estimate.of_groups or ()
        ctx.groups = None if estimate.groups == len(mean) else estimate.groups
        ctx.fused = x.device.type in FUSED and ctx.groups is None
        if ctx.fused:
            x = x if _is_nhwc(x) else x.contiguous()
            out = torch.batch_norm_elemt(x, w, b, mean, invstd, eps)
        else:
            out = F.batch_norm(x, mean, var, w, b, training=False, eps=eps)
        ctx.save_for_backward(x, mean, var, invstd, scaled, w, scale, shift, *of_groups)
        ctx.share = estimate.share
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, invstd, scaled, w, scale, shift, *of_groups = ctx.saved_tensors
        layout = torch.channels_last if _is_nhwc(x) else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        if ctx.fused:
            dx, sum_gx, sum_g = _fused_backward(ctx, grad, x, mean, invstd, scaled, w)
        else:
            dx, sum_gx, sum_g = _plain_backward(ctx, grad, x, mean, var, invstd, w, of_groups)
            sum_gx = sum_gx if scale is None else sum_gx * scale
        d_mean = d_var = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            gain = w * invstd
            d_mean, d_var = torch._foreach_mul([gain, gain * invstd], [sum_g, sum_gx])
            torch._foreach_mul_([d_mean, d_var], [-1.0, -0.5])
        if shift is not None:
            sum_gx = torch.addcmul(sum_gx, sum_g, shift)
        _, _, _, by_weight, by_bias, *_ = ctx.needs_input_grad
        d_affine = sum_gx if by_weight else None, sum_g if by_bias else None
        return dx, d_mean, d_var, *d_affine, None, None


Gradients = tuple[Tensor | None, Tensor, Tensor]


def _fused_backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scaled: Tensor,
    w: Tensor,
) -> Gradients:
    """With SyncBatchNorm's kernels: gradient by x, sums over positions of ``grad * (x - mean) *
    scaled`` and of grad."""
    sum_dy, sum_dy_xmu, sum_gx, sum_g = torch.batch_norm_backward_reduce(
        grad, x, mean, scaled, w, True, True, True
    )
    if not ctx.needs_input_grad[0]:
        return None, sum_gx, sum_g
    count = x.numel() // x.shape[1]
    sums, share = [sum_dy, sum_dy_xmu], ctx.share
    if isinstance(share, Tensor):
        torch._foreach_mul_(sums, share.view(()) if share.numel() == 1 else [share, share])
    elif share and (1.0 / share).is_integer():
        count = round(count / share)  # as of several mini-batches, all others of which are 0
    else:
        torch._foreach_mul_(sums, share)
    count = _filled(count, 1, torch.int, x.device)
    dx = torch.batch_norm_backward_elemt(grad, x, mean, invstd, w, *sums, count)
    return dx, sum_gx, sum_g


def _plain_backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    invstd: Tensor,
    w: Tensor,
    of_groups: list[Tensor],
) -> Gradients:
    """The same with BatchNorm's own kernels, with invstd for scaled."""
    share, groups, wanted = ctx.share, ctx.groups, ctx.needs_input_grad[0]
    whole = groups is None and not isinstance(share, Tensor) and share == 1.0
    mixed = x.dtype != mean.dtype
    in_one = whole or (groups is None and (mixed or x.numel() < _LARGE))
    # BatchNorm's backward kernel with our statistics: the sums that every gradient below is made of
    # and, with the weight times the share, that share of its gradient
    part = w * share if in_one and not whole else w
    dx, sum_gx, sum_g = torch.ops.aten.native_batch_norm_backward(
        *(grad, x, part, None, None, mean, invstd, True, ctx.eps),
        [wanted and in_one, True, True],
    )
    if not wanted or whole:
        return dx, sum_gx, sum_g
    if in_one:  # the rest passes as behind fixed statistics
        rest = (w - part).mul_(invstd)
        if not mixed:
            return dx.addcmul_(grad, rest.view(1, -1, 1, 1)), sum_gx, sum_g
        zero, one = filled_like(mean, 0.0), filled_like(mean, 1.0)
        return dx.add_(F.batch_norm(grad, zero, one, rest, zero, eps=0.0)), sum_gx, sum_g
    if of_groups:
        return _backward_of_groups(grad, x, of_groups, w, ctx.eps), sum_gx, sum_g
    # the projection terms are affine in x_hat, so they are a batch norm of their own, whose kernel
    # is fused and computes in float32 also for 16-bit x
    scale, per = w * invstd, -x.shape[1] / x.numel()
    if groups is None:
        factor = scale * (share * per)
        gain, offset = factor * sum_gx, factor * sum_g
    else:
        factor = invstd * (share * per)
        gain, offset = (factor * group_mean(w * total, groups) for total in (sum_gx, sum_g))
    terms = F.batch_norm(x, mean, var, gain, offset, eps=ctx.eps)
    return terms.addcmul_(grad, scale.view(1, -1, 1, 1)), sum_gx, sum_g


def _backward_of_groups(
    grad: Tensor, x: Tensor, of_groups: list[Tensor], w: Tensor, eps: float
) -> Tensor:
    """BatchNorm's gradient by ``x`` whose groups are channels of more rows."""
    rows = (len(x), len(of_groups[0]), -1, x.shape[3])
    grad = (grad * w.view(1, -1, 1, 1)).to(x.dtype)
    pair = (values.contiguous().view(rows) for values in (grad, x))
    known = (None, None, None, *of_groups, True, eps, [True, False, False])
    dx = torch.ops.aten.native_batch_norm_backward(*pair, *known)[0].view(x.shape)
    return dx.contiguous(memory_format=torch.channels_last) if _is_nhwc(x) else dx


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def normalize(
    x: Tensor, estimate: Estimate, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the exact gradient of an estimate.

    With ``g`` the gradient at the normalised value, ``dL/dx = (g - share * E[g] - share * x_hat *
    E[g * x_hat]) / std``: BatchNorm's backward pass with both projection terms multiplied by
    ``share`` (1 gives BatchNorm, 0 a frozen norm). The estimate's other parts receive their
    gradient through ``mean`` and ``var`` where those require one. With groups the expectations are
    over groups of neighbouring channels.

    Args:
        x: [N, C, H, W], non-empty; the output has its dtype and memory format.
        estimate: of its statistics, in ``statistics_dtype(x)``.
        weight, bias: [C] or None.
        eps: added to the variance.
    """
    return _Normalize.apply(x, estimate.mean, estimate.var, weight, bias, estimate, eps)
