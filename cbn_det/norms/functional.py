"""Tensor functions behind the norms: moments, normalisation with an exact backward pass, and how a
convolution's output statistics depend on its weight.

Throughout, ``y = W * x`` is a convolution's output ``[N, C_out, H, W]``, ``p`` the input patch
seen by one output position, and ``M = N * H * W`` the number of positions. Statistics are per
channel and in float32 (float64 for float64 input), whatever the dtype of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype statistics of ``x`` are kept in: float64 for float64, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def moments(x: Tensor) -> Moments:
    """Mean and biased variance over N, H, W of a non-empty ``x`` [N, C, H, W], without gradient.

    The variance is accumulated about the mean (torch's own batch-norm kernel), because
    ``mean(x * x) - mean(x) ** 2`` loses all digits once the mean exceeds the standard deviation by
    three orders of magnitude.
    """
    x = x.detach().to(statistics_dtype(x))
    if x.device.type in ("cpu", "cuda"):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return Moments(mean, var, x.numel() // x.shape[1])


def mixture(mean: Tensor, var: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture: the variance within its parts plus that between them.

    Args:
        mean, var: [parts, ...], of each part.
        weights: broadcastable to them; they sum to 1 over the first dimension.
    """
    mixed = (weights * mean).sum(0)
    return mixed, (weights * (var + (mean - mixed).square())).sum(0)


def group_mean(values: Tensor, groups: int) -> Tensor:
    """Means over ``groups`` equal groups of neighbouring channels, [C] expanded to [C]."""
    return values.view(groups, -1).mean(1).repeat_interleave(len(values) // groups)


def group_moments(batch: Moments, groups: int) -> Moments:
    """Moments of groups of neighbouring channels, expanded to [C], from those of the channels."""
    if groups == len(batch.mean):
        return batch
    mean = group_mean(batch.mean, groups)
    var = group_mean(batch.var + (batch.mean - mean).square(), groups)
    return Moments(mean, var, batch.count * (len(mean) // groups))


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        share: Tensor | float,
        eps: float,
        groups: int | None,
    ) -> Tensor:
        dtype = mean.dtype
        mean, var = mean.contiguous(), var.contiguous()  # the kernels do not look at strides
        w = None if weight is None else weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        out = F.batch_norm(x, mean, var, w, b, training=False, eps=eps)
        ctx.groups = None if groups == len(mean) else groups
        share_is_one = not isinstance(share, Tensor) and share == 1.0
        ctx.is_batchnorm = share_is_one and ctx.groups is None
        ctx.save_for_backward(x, mean, (var + eps).rsqrt(), w, torch.as_tensor(share, dtype=dtype))
        ctx.affine_dtypes = (
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
        )
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, invstd, w, share = ctx.saved_tensors
        w = torch.ones_like(mean) if w is None else w
        share = share.to(mean.device)
        grad = grad.contiguous(memory_format=torch.channels_last) if _is_nhwc(x) else grad
        # BatchNorm's own backward kernel with our statistics: the gradient for share 1 and no
        # groups, and the sums of grad and grad * x_hat that every other gradient below is made of,
        # in fused passes.
        dx, sum_gx, sum_g = torch.ops.aten.native_batch_norm_backward(
            grad, x, w, None, None, mean, invstd, True, ctx.eps, [True, True, True]
        )
        scale = w * invstd
        if not ctx.is_batchnorm and ctx.needs_input_grad[0]:
            # exchange the kernel's projection terms for ours; both are affine in x_hat, so their
            # difference is a batch norm of its own, whose kernel is fused and computes in float32
            # also for 16-bit x
            gain, offset = (_surplus(w * total, share, ctx.groups) for total in (sum_gx, sum_g))
            unit = invstd * (x.shape[1] / x.numel())
            var = invstd.square().reciprocal()
            dx = dx.add_(F.batch_norm(x, mean, var, unit * gain, unit * offset, eps=0.0))
        d_mean = -scale * sum_g if ctx.needs_input_grad[1] else None
        d_var = -0.5 * scale * invstd * sum_gx if ctx.needs_input_grad[2] else None
        weight_dtype, bias_dtype = ctx.affine_dtypes
        d_weight = sum_gx.to(weight_dtype) if ctx.needs_input_grad[3] else None
        d_bias = sum_g.to(bias_dtype) if ctx.needs_input_grad[4] else None
        return (
            dx if ctx.needs_input_grad[0] else None,
            d_mean,
            d_var,
            d_weight,
            d_bias,
            None,
            None,
            None,
        )


def _surplus(total: Tensor, share: Tensor, groups: int | None) -> Tensor:
    """By how much a sum over a channel, as BatchNorm projects it out, exceeds what an estimate of
    this share over groups of channels projects out."""
    return total - share * (total if groups is None else group_mean(total, groups))


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    share: Tensor | float,
    eps: float,
    groups: int | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the exact gradient of an estimate.

    ``mean`` and ``var`` are an estimate in which the moments of ``x`` itself take part with
    ``share``: ``mean = share * E[x] + a`` and ``var + mean**2 = share * E[x**2] + b``. With ``g``
    the gradient at the normalised value, ``dL/dx = (g - share * E[g] - share * x_hat * E[g *
    x_hat]) / std``: BatchNorm's backward pass with both projection terms multiplied by ``share``
    (1 gives BatchNorm, 0 a frozen norm). ``a`` and ``b`` receive their gradient through ``mean``
    and ``var`` where those require one. With ``groups`` the expectations are over groups of
    neighbouring channels.

    Args:
        x: [N, C, H, W], non-empty; the output has its dtype and memory format.
        mean: [C], in ``statistics_dtype(x)``; the part that depends on ``x`` must be detached.
        var: [C], likewise, not negative.
        weight: [C] or None.
        bias: [C] or None.
        share: number, or [C], in [0, 1]; a constant for the gradient.
        eps: added to ``var``.
        groups: number of groups of neighbouring channels that have their statistics in common;
            None: every channel has its own.
    """
    return _Normalize.apply(x, mean, var, weight, bias, share, eps, groups)


@dataclass(frozen=True)
class ConvGeometry:
    """What a convolution does to positions: everything about it but its weight."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pad: tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes them
    pad_mode: str
    groups: int

    @staticmethod
    def of(conv: nn.Conv2d) -> ConvGeometry:
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        if not isinstance(conv.padding, str):
            # the attribute above is symmetric, but a user may have changed `padding` since
            (top, left), (bottom, right) = conv.padding, conv.padding
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return ConvGeometry(
            tuple(conv.kernel_size),
            tuple(conv.stride),
            tuple(conv.dilation),
            (left, right, top, bottom),
            mode,
            conv.groups,
        )

    def padded(self, x: Tensor) -> Tensor:
        """``x`` with the convolution's padding made explicit."""
        return F.pad(x, self.pad, mode=self.pad_mode) if any(self.pad) else x


@dataclass(frozen=True)
class Crop:
    """A box of output positions of some images: images [n0, n1), rows [i0, i1), columns [j0,
    j1)."""

    n0: int
    n1: int
    i0: int
    i1: int
    j0: int
    j1: int


# Of a feature map at least this many positions are taken together, so that many small maps (RoIs)
# are sampled as a slice of whole maps and few large ones as a crop of each.
_CROP_POSITIONS = 256


def choose_crop(shape: tuple[int, ...], positions: int | None, turn: int) -> Crop | None:
    """The output positions that a conv statistic is estimated on.

    Contiguous positions only: strided or scattered ones save no time in convolution kernels. The
    map is cut into tiles, and the tile walks with ``turn`` along a low-discrepancy sequence, so
    that it is the same in a repeated run, needs no random state, and visits every position equally
    often: borders, where there is padding, count neither more nor less than the rest.

    Args:
        shape: (N, C, H, W) of the convolution's output.
        positions: about how many output positions to use, all together; None means all.
        turn: a counter, one more each iteration.

    Returns:
        The crop, or None when all positions are used.
    """
    n, _, height, width = shape
    if positions is None or positions >= n * height * width:
        return None
    each = min(height * width, max(positions // n, min(positions, _CROP_POSITIONS)))
    images = max(1, min(n, positions // each))
    rows = min(height, max(1, round((each * height / width) ** 0.5)))
    columns = min(width, max(1, each // rows))
    rows = min(height, max(1, each // columns))

    def tile(size: int, extent: int, step: float) -> tuple[int, int]:
        # tiles of nearly equal size, each as likely as it is large
        tiles = max(1, round(extent / size))
        at = (int((turn * step % 1.0) * extent) * tiles + tiles - 1) // extent
        return at * extent // tiles, (at + 1) * extent // tiles

    return Crop(
        *tile(images, n, 0.8191725134),
        *tile(rows, height, 0.6710436067),
        *tile(columns, width, 0.5497004779),
    )


def _cropped(x: Tensor, y: Tensor, geometry: ConvGeometry, crop: Crop) -> tuple[Tensor, Tensor]:
    """The crop of ``y`` and the part of the padded ``x`` that it is computed from."""
    y = y[crop.n0 : crop.n1, :, crop.i0 : crop.i1, crop.j0 : crop.j1]
    x = x[crop.n0 : crop.n1]
    left, _, top, _ = geometry.pad
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    if geometry.pad_mode != "constant":
        x = geometry.padded(x)
        left = top = 0
    r0, r1 = crop.i0 * sh - top, (crop.i1 - 1) * sh - top + dh * (kh - 1) + 1
    c0, c1 = crop.j0 * sw - left, (crop.j1 - 1) * sw - left + dw * (kw - 1) + 1
    height, width = x.shape[2:]
    x = x[:, :, max(r0, 0) : min(r1, height), max(c0, 0) : min(c1, width)]
    outside = (max(-c0, 0), max(c1 - width, 0), max(-r0, 0), max(r1 - height, 0))
    return (F.pad(x, outside) if any(outside) else x), y


def mean_patch(x: Tensor, geometry: ConvGeometry, out_size: tuple[int, int]) -> Tensor:
    """Mean input patch ``E[p]`` over all output positions, the exact derivative of a mean by W.

    ``mean(y_j) = <E[p], w_j>`` is linear in W, so this is ``d mu / dW`` of the compensated mean
    (arXiv 2002.05712) in closed form, the same for every output channel of a group.

    Args:
        x: [N, C_in, H_in, W_in], the convolution's input.
        geometry: of the convolution.
        out_size: (H, W) of the convolution's output.

    Returns:
        [groups, C_in / groups * kh * kw]
    """
    n, channels = x.shape[:2]
    total = geometry.padded(x.detach().sum(0, keepdim=True, dtype=statistics_dtype(x)))[0]
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    height, width = out_size
    patch = []
    for a in range(kh):
        row = total[:, a * dh : a * dh + (height - 1) * sh + 1 : sh].sum(1)
        for b in range(kw):
            patch.append(row[:, b * dw : b * dw + (width - 1) * sw + 1 : sw].sum(1))
    mean = torch.stack(patch, dim=1) / (n * height * width)  # [C_in, kh * kw]
    return mean.reshape(geometry.groups, -1)


def variance_gradient(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    patch: Tensor,
    geometry: ConvGeometry,
    weight_shape: torch.Size,
    crop: Crop | None,
) -> Tensor:
    """``d var(y_j) / dw_j = 2 E[(p - E[p]) (y_j - mean_j)]``, without autograd.

    One convolution weight gradient. With a crop it is an unbiased estimate from those positions.
    From it the derivative of the second moment, which CBN's equations use, follows as
    ``d E[y_j**2] / dw_j = d var / dw_j + 2 mean_j E[p]``.

    Args:
        x: [N, C_in, H_in, W_in], the convolution's input.
        y: [N, C_out, H, W], its output (with or without the conv bias).
        mean: [C_out], mean of ``y`` over all positions.
        patch: [groups, C_in / groups * kh * kw], from :func:`mean_patch`.
        geometry: of the convolution.
        weight_shape: [C_out, C_in / groups, kh, kw]
        crop: from :func:`choose_crop`.

    Returns:
        [C_out, C_in / groups * kh * kw]
    """
    left, right, top, bottom = geometry.pad
    x, y = x.detach(), y.detach()
    if crop is not None:
        x, y = _cropped(x, y, geometry, crop)
        padding = (0, 0)
    elif geometry.pad_mode == "constant" and (left, top) == (right, bottom):
        padding = (top, left)
    else:
        x, padding = geometry.padded(x), (0, 0)
    # bf16 has float32's range; float16 has not, and a sum over positions would overflow in it
    dtype = torch.bfloat16 if y.dtype == torch.bfloat16 else statistics_dtype(y)
    count = y.numel() // y.shape[1]
    centred = y.to(mean.dtype) - mean.view(1, -1, 1, 1)
    with torch.autocast(x.device.type, enabled=False):
        # spread 1/M over operand and result, or low precision underflows
        gradient = torch.nn.grad.conv2d_weight(
            x.to(dtype),
            weight_shape,
            (centred * (2.0 / count**0.5)).to(dtype),
            geometry.stride,
            padding,
            geometry.dilation,
            geometry.groups,
        )
    gradient = gradient.to(mean.dtype).flatten(1) / count**0.5
    if crop is not None:  # the crop's own mean differs from the mean over all positions
        offset = centred.mean((0, 2, 3)).view(patch.shape[0], -1, 1)
        gradient -= (2.0 * offset * patch.unsqueeze(1)).flatten(0, 1)
    return gradient


def patch_covariance(
    x: Tensor, y: Tensor, patch: Tensor, geometry: ConvGeometry, crop: Crop | None
) -> Tensor:
    """Covariance of the input patches, ``E[(p - E[p]) (p - E[p])^T]``: the variance for *any*
    weight.

    ``var(y_j) = w_j^T S w_j`` holds exactly, at ``d * d`` numbers a group with
    ``d = C_in / groups * kh * kw``.

    Args:
        x, y, patch, geometry, crop: as in :func:`variance_gradient`.

    Returns:
        [groups, d, d]
    """
    x, y = x.detach(), y.detach()
    x = geometry.padded(x) if crop is None else _cropped(x, y, geometry, crop)[0]
    groups, d = patch.shape
    total = patch.new_zeros(groups, d, d)
    count = 0
    for image in x.to(patch.dtype).split(8):
        columns = F.unfold(image, geometry.kernel, geometry.dilation, 0, geometry.stride)
        columns = columns.view(len(image), groups, d, -1) - patch.view(1, groups, d, 1)
        columns = columns.permute(1, 2, 0, 3).flatten(2)  # [groups, d, positions]
        total += columns @ columns.transpose(1, 2)
        count += columns.shape[2]
    return total / count
