"""Tensor functions behind the norms: moments, normalisation with an exact backward pass, and how a
convolution's output statistics depend on its weight.

Throughout, ``y = W * x`` is a convolution's output ``[N, C_out, H, W]``, ``p`` the input patch
seen by one output position, and ``M = N * H * W`` the number of positions. Statistics are per
channel and in float32 (float64 for float64 input), whatever the dtype of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: mean, in standard deviations, up to which the fast sums of :func:`moments` lose no digit
_LARGEST_MEAN = 2.0


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

    The variance is accumulated about the mean, because ``mean(x * x) - mean(x) ** 2`` loses all
    digits once the mean exceeds the standard deviation by three orders of magnitude.
    """
    x = x.detach().to(statistics_dtype(x))
    count = x.numel() // x.shape[1]
    if x.device.type == "cpu" and x.is_contiguous() and not torch.compiler.is_compiling():
        mean, var = _moments_on_cpu(x, count)
    elif x.device.type in ("cpu", "cuda"):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return Moments(mean, var, count)


def _moments_on_cpu(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same as torch's batch-norm kernel, which takes one value at a time for contiguous input:
    five times as long as the vectorised sums of BatchNorm's backward kernel that are used here.
    Those give ``sum of x (x - mean)``, in which digits are lost as ``mean / std`` grows, so that
    channels whose mean is large beside their deviation are left to the slow kernel."""
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
        wanted = ctx.needs_input_grad[0]
        in_one = wanted and (ctx.is_batchnorm or x.dtype != mean.dtype)
        dx, sum_gx, sum_g = torch.ops.aten.native_batch_norm_backward(
            grad, x, w, None, None, mean, invstd, True, ctx.eps, [in_one, True, True]
        )
        scale = w * invstd
        if wanted and not ctx.is_batchnorm:
            # the projection terms are affine in x_hat, so they are a batch norm of their own, whose
            # kernel is fused and computes in float32 also for 16-bit x
            projected = [_projected(w * total, share, ctx.groups) for total in (sum_gx, sum_g)]
            if in_one:  # 16 bits: exchange the kernel's terms for ours
                projected = [
                    own - w * total for own, total in zip(projected, (sum_gx, sum_g), strict=True)
                ]
            unit = invstd * (-x.shape[1] / x.numel())
            var = invstd.square().reciprocal()
            gain, offset = (unit * value for value in projected)
            terms = F.batch_norm(x, mean, var, gain, offset, eps=0.0)
            dx = dx.add_(terms) if in_one else terms.addcmul_(grad, scale.view(1, -1, 1, 1))
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


def _projected(total: Tensor, share: Tensor, groups: int | None) -> Tensor:
    """What an estimate of this share over groups of channels projects out of the gradient, from the
    sums over each channel."""
    return share * (total if groups is None else group_mean(total, groups))


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

    @staticmethod
    @lru_cache(maxsize=1024)
    def of_operation(
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> ConvGeometry:
        """Of ``F.conv2d`` with these arguments."""
        pad = (padding[1], padding[1], padding[0], padding[0])
        return ConvGeometry(kernel, stride, dilation, pad, "constant", groups)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of its output for an input of that size."""
        left, right, top, bottom = self.pad
        height, width = size[0] + top + bottom, size[1] + left + right
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1

    def padded(self, x: Tensor) -> Tensor:
        """``x`` with the convolution's padding made explicit."""
        return F.pad(x, self.pad, mode=self.pad_mode) if any(self.pad) else x


@dataclass(frozen=True)
class Crop:
    """A box of output positions of some images: images n0, n0 + step, ..., rows [i0, i1), columns
    [j0, j1)."""

    n0: int
    step: int
    i0: int
    i1: int
    j0: int
    j1: int

    @property
    def images(self) -> slice:
        return slice(self.n0, None, self.step)


# Of a feature map at least this many positions are taken together, so that many small maps (RoIs)
# are sampled as whole maps and few large ones as crops of each.
_MAP_POSITIONS = 256
# Neighbouring positions resemble each other, so a large map gives several crops, of at least so
# many positions each.
_CROP_POSITIONS = 64
_MOST_CROPS = 4


def choose_crops(
    shape: tuple[int, ...], positions: int | None, turn: int
) -> tuple[Crop, ...] | None:
    """The output positions that a conv statistic is estimated on: the average over the crops.

    Contiguous positions only: strided or scattered ones save no time in convolution kernels. Of
    many maps every so-manieth is taken (RoIs of one image follow each other). The map is cut into
    tiles, and the crops walk over them with ``turn`` along a low-discrepancy sequence, so that they
    are the same in a repeated run, need no random state, and visit every position equally often:
    borders, where there is padding, count neither more nor less than the rest.

    Args:
        shape: (N, C, H, W) of the convolution's output.
        positions: about how many output positions to use, all together; None means all.
        turn: a counter, one more each iteration.

    Returns:
        The crops, or None when all positions are used.
    """
    n, _, height, width = shape
    if positions is None or positions >= n * height * width:
        return None
    each = min(height * width, max(positions // n, min(positions, _MAP_POSITIONS)))
    step = max(1, n // max(1, positions // each))
    count = max(1, min(_MOST_CROPS, each // _CROP_POSITIONS, height * width // each))
    each //= count
    rows = min(height, max(1, round((each * height / width) ** 0.5)))
    columns = min(width, max(1, each // rows))
    rows = min(height, max(1, each // columns))

    def place(at: int, extent: int, ratio: float) -> int:
        return int((at * ratio % 1.0) * extent)

    def tile(size: int, extent: int, at: int) -> tuple[int, int]:
        # tiles of nearly equal size, each as likely as it is large
        tiles = max(1, round(extent / size))
        index = (at * tiles + tiles - 1) // extent
        return index * extent // tiles, (index + 1) * extent // tiles

    return tuple(
        Crop(
            place(turn, n, 0.8191725134) % step,
            step,
            *tile(rows, height, place(at, height, 0.6710436067)),
            *tile(columns, width, place(at, width, 0.5497004779)),
        )
        for at in range(turn * count, (turn + 1) * count)
    )


def _cropped(x: Tensor, y: Tensor, geometry: ConvGeometry, crop: Crop) -> tuple[Tensor, Tensor]:
    """The crop of ``y`` and the part of the padded ``x`` that it is computed from."""
    y = y[crop.images, :, crop.i0 : crop.i1, crop.j0 : crop.j1]
    x = x[crop.images]
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
    x = x.detach()
    dtype = statistics_dtype(x)
    if n >= 8:  # many small maps: their sum takes fewer and longer rows
        x = x.sum(0, keepdim=True, dtype=dtype)
    if geometry.pad_mode != "constant":
        x = geometry.padded(x)
        left = top = 0
    else:
        left, _, top, _ = geometry.pad
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    rows = [_taps(a * dh - top, sh, out_size[0], x.shape[2]) for a in range(kh)]
    columns = [_taps(b * dw - left, sw, out_size[1], x.shape[3]) for b in range(kw)]
    first, last = _middle(rows)
    if sh == 1 and first < last:
        # all rows of the kernel see the middle of the map, and most of its columns: one pass
        middle = torch.stack(_sums_over(x[:, :, first:last], columns, (0, 2, 3), dtype))
        outer = [_edges(x, row, first, last, 2) for row in rows]
        outer = [sum((e.sum((0, 2), dtype=dtype) for e in edges), 0.0) for edges in outer]
        outer = torch.stack([middle.new_zeros(x.shape[1], x.shape[3]) + edge for edge in outer])
        total = middle.unsqueeze(1) + torch.stack(_sums_over(outer, columns, (2,), dtype))
    else:
        total = torch.stack([x[:, :, row].sum((0, 2), dtype=dtype) for row in rows])
        total = torch.stack(_sums_over(total, columns, (2,), dtype))
    mean = total.permute(2, 1, 0) / (n * out_size[0] * out_size[1])  # total: [kw, kh, C_in]
    return mean.reshape(geometry.groups, -1)


def _middle(taps: list[slice]) -> tuple[int, int]:
    """The range that several ranges have in common; empty if the second is not larger."""
    return max(tap.start for tap in taps), min(tap.stop for tap in taps)


def _edges(x: Tensor, tap: slice, first: int, last: int, dim: int) -> list[Tensor]:
    """What a range sees of a dimension outside the middle."""
    before = (slice(None),) * dim
    parts = [slice(tap.start, first), slice(last, tap.stop)]
    return [x[(*before, part)] for part in parts if part.start < part.stop]


def _sums_over(
    x: Tensor, taps: list[slice], dims: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """Sums of ``x`` over dimensions, for each of several ranges of the last of them."""
    dim = dims[-1]
    before = (slice(None),) * dim
    first, last = _middle(taps)
    if len(taps) == 1 or taps[0].step != 1 or first >= last:
        return [x[(*before, tap)].sum(dims, dtype=dtype) for tap in taps]
    middle = x[(*before, slice(first, last))].sum(dims, dtype=dtype)
    edges = [_edges(x, tap, first, last, dim) for tap in taps]
    return [sum((e.sum(dims, dtype=dtype) for e in parts), middle) for parts in edges]


def _taps(start: int, step: int, count: int, size: int) -> slice:
    """Which of ``size`` input rows one row of a kernel sees: ``start + i * step``, i < count, less
    those that lie in the padding."""
    before = -(start // step) if start < 0 else 0  # of i, rounded up
    stop = start + (count - 1) * step + 1
    first = start + before * step
    return slice(first, max(first, min(stop, size)), step)


def variance_gradient(
    x: Tensor, y: Tensor, mean: Tensor, geometry: ConvGeometry, weight_shape: torch.Size
) -> Tensor:
    """``d var(y_j) / dw_j = 2 E[(p - E[p]) (y_j - mean_j)]``, without autograd.

    One convolution weight gradient. From it the derivative of the second moment, which CBN's
    equations use, follows as ``d E[y_j**2] / dw_j = d var / dw_j + 2 mean_j E[p]``.

    Args:
        x: [N, C_in, H_in, W_in], the convolution's input.
        y: [N, C_out, H, W], its output (with or without the conv bias).
        mean: [C_out], mean of ``y``.
        geometry: of the convolution.
        weight_shape: [C_out, C_in / groups, kh, kw]

    Returns:
        [C_out, C_in / groups * kh * kw]
    """
    x, y = x.detach(), y.detach()
    left, right, top, bottom = geometry.pad
    if geometry.pad_mode == "constant" and (left, top) == (right, bottom):
        padding = (top, left)
    else:
        padding, x = (0, 0), geometry.padded(x)
    count = y.numel() // y.shape[1]
    centred = y.to(mean.dtype) - mean.view(1, -1, 1, 1)
    # bf16 has float32's range; float16 has not, and a sum over positions would overflow in it
    dtype = torch.bfloat16 if y.dtype == torch.bfloat16 else statistics_dtype(y)
    # in low precision 1/M is spread over operand and result, or it underflows
    divisor = count if dtype == mean.dtype else count**0.5
    with torch.autocast(x.device.type, enabled=False):
        gradient = torch.nn.grad.conv2d_weight(
            x.to(dtype),
            weight_shape,
            (centred * (2.0 / divisor)).to(dtype),
            geometry.stride,
            padding,
            geometry.dilation,
            geometry.groups,
        ).flatten(1)
    return gradient if dtype == mean.dtype else gradient.to(mean.dtype).div_(count / divisor)


def variance_gradient_factors(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    patch: Tensor,
    geometry: ConvGeometry,
    crops: tuple[Crop, ...] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same derivative, of few positions, as two factors that are smaller than it.

    With crops it is an unbiased estimate of that of all positions. Numbers that are not finite
    count as 0: the forward they come from has no variance that could be carried over.

    Args:
        x, y, mean, geometry: as in :func:`variance_gradient`.
        patch: [groups, d] with ``d = C_in / groups * kh * kw``, from :func:`mean_patch`.
        crops: from :func:`choose_crops`; None: all positions.

    Returns:
        ``left`` [groups, C_out / groups, R] and ``right`` [groups, R, d], whose product is the
        derivative, with R one more than the number of positions; and [C_out], ``<derivative, w>``
        at the weight that ``y`` was computed with.
    """
    x, y = x.detach(), y.detach()
    if crops is None:
        parts = [(geometry.padded(x), y)]
    else:
        parts = [_cropped(x, y, geometry, crop) for crop in crops]
    positions = sum(outputs.numel() // outputs.shape[1] for _, outputs in parts)
    left = mean.new_empty(geometry.groups, len(mean) // geometry.groups, positions + 1)
    right = mean.new_empty(geometry.groups, positions + 1, patch.shape[1])
    products = torch.zeros_like(mean)
    start = 0
    for inputs, outputs in parts:
        centred = outputs.to(mean.dtype).movedim(1, 0).flatten(1) - mean.unsqueeze(1)
        centred = torch.nan_to_num(centred, 0.0, 0.0, 0.0)
        stop = start + centred.shape[1]
        # each crop counts the same, whatever its size
        weighted = centred * (2.0 / (len(parts) * centred.shape[1]))
        left[:, :, start:stop] = weighted.unflatten(0, left.shape[:2])
        # <p, w> and <E[p], w> are y and its mean, less the same bias: their difference is `centred`
        products += (weighted * centred).sum(1)
        finite = torch.nan_to_num(inputs.to(mean.dtype), 0.0, 0.0, 0.0)
        patches = F.unfold(finite, geometry.kernel, geometry.dilation, 0, geometry.stride)
        patches = patches.unflatten(1, (geometry.groups, -1))  # [n, groups, d, positions]
        rows = right[:, start:stop].unflatten(1, (len(inputs), -1))
        rows.copy_(patches.permute(1, 0, 3, 2))
        start = stop
    # about E[p], not 0: the mean of the crops' y differs from that over all positions
    left[:, :, -1] = -left[:, :, :-1].sum(2)
    right[:, -1] = torch.nan_to_num(patch, 0.0, 0.0, 0.0)
    return left, right, products


def patch_covariance(
    x: Tensor,
    y: Tensor,
    patch: Tensor,
    geometry: ConvGeometry,
    crops: tuple[Crop, ...] | None,
) -> Tensor:
    """Covariance of the input patches, ``E[(p - E[p]) (p - E[p])^T]``: the variance for *any*
    weight.

    ``var(y_j) = w_j^T S w_j`` holds exactly, at ``d * d`` numbers a group with
    ``d = C_in / groups * kh * kw``.

    Args:
        x, y, patch, geometry, crops: as in :func:`variance_gradient`.

    Returns:
        [groups, d, d]
    """
    x, y = x.detach(), y.detach()
    if crops is None:
        return _covariance(geometry.padded(x), patch, geometry)
    parts = [_covariance(_cropped(x, y, geometry, c)[0], patch, geometry) for c in crops]
    return torch.stack(parts).mean(0)


def _covariance(x: Tensor, patch: Tensor, geometry: ConvGeometry) -> Tensor:
    """Of all patches of an ``x`` that is padded already, about ``patch``."""
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
