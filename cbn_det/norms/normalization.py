"""Normalisation by an estimate of the statistics, with its exact gradient. On CUDA the kernels are
those of ``nn.SyncBatchNorm``; nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import functional
from .functional import LARGE, Estimate, filled, filled_like, group_mean, inverse_std


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
        ctx.fused = x.device.type in functional.FUSED and ctx.groups is None
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
    count = filled(count, 1, torch.int, x.device)
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
    is_one = not isinstance(share, Tensor) and share == 1.0
    if groups is None and (is_one or x.numel() < LARGE or x.dtype != mean.dtype):
        part = w if is_one else w * share
        return _backward_in_parts(ctx, grad, x, mean, invstd, w, part)
    # the sums that the gradient is made of
    _, sum_gx, sum_g = _batchnorm_backward(grad, x, w, mean, invstd, ctx.eps, False)
    if not wanted:
        return None, sum_gx, sum_g
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


def _batchnorm_backward(
    grad: Tensor, x: Tensor, w: Tensor, mean: Tensor, invstd: Tensor, eps: float, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's backward kernel with our statistics; ``wanted``: its gradient by x."""
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, w, None, None, mean, invstd, True, eps, [wanted, True, True]
    )


def _backward_in_parts(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    w: Tensor,
    part: Tensor,
) -> Gradients:
    """The share of BatchNorm's gradient, which its kernel gives with ``part``, the weight times the
    share; the rest passes as behind fixed statistics. On large maps this takes longer than the
    above."""
    wanted = ctx.needs_input_grad[0]
    dx, sum_gx, sum_g = _batchnorm_backward(grad, x, part, mean, invstd, ctx.eps, wanted)
    if not wanted:
        return None, sum_gx, sum_g
    if part is not w:
        rest = (w - part).mul_(invstd)
        if x.dtype == mean.dtype:
            dx.addcmul_(grad, rest.view(1, -1, 1, 1))
        else:  # a product of both dtypes takes four times as long
            zero, one = filled_like(mean, 0.0), filled_like(mean, 1.0)
            dx.add_(F.batch_norm(grad, zero, one, rest, zero, eps=0.0))
    return dx, sum_gx, sum_g


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
