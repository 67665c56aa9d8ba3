"""How the statistics of a convolution's output depend on its weight: what CBN is made of.

Throughout, ``y = W * x`` is a convolution's output ``[N, C_out, H, W]``, ``p`` the input patch
seen by one output position, and ``M = N * H * W`` the number of positions. Derivatives are in
float32 (float64 for float64 input), whatever the dtype of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import statistics_dtype, without_autocast


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


# So many positions of a map are taken together: small maps (RoIs) as a whole.
_MAP_POSITIONS = 256
# Neighbouring positions resemble each other: a large map gives several crops of so many at least.
_CROP_POSITIONS = 64
_MOST_CROPS = 4


def choose_crops(
    shape: tuple[int, ...], positions: int | None, turn: int
) -> tuple[Crop, ...] | None:
    """The output positions that a conv statistic is estimated on: the average over the crops.

    Contiguous positions only: scattered ones save no time in convolution kernels. Of many maps
    every so-manieth is taken (RoIs of one image follow each other). The map is cut into tiles, and
    the crops walk over them with ``turn`` along a low-discrepancy sequence: without random state,
    and visiting every position equally often, borders included.

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
    """Mean input patch ``E[p]`` over all output positions: ``d mu / dW``, as ``mean(y_j) = <E[p],
    w_j>`` is linear in W; the same for every output channel of a group.

    Which rows a row of the kernel sees is a matrix of zeros and ones, likewise the columns, so that
    two matrix products do it; on small maps one, of all positions at once.

    Args:
        x: [N, C_in, H_in, W_in], the convolution's input.
        geometry: of the convolution.
        out_size: (H, W) of the convolution's output.

    Returns:
        [groups, C_in / groups * kh * kw]
    """
    x = x.detach()
    dtype = statistics_dtype(x)
    left, _, top, _ = geometry.pad
    if geometry.pad_mode != "constant":
        x = geometry.padded(x)
        left = top = 0
    if geometry.kernel == (1, 1) and not any(geometry.pad):
        sh, sw = geometry.stride
        return x[:, :, ::sh, ::sw].mean((0, 2, 3), dtype=dtype).view(geometry.groups, -1)
    if x.shape[0] >= _MANY_MAPS:  # their sum takes fewer and longer rows
        x = x.mean(0, keepdim=True, dtype=dtype)
    elif x.dtype != dtype:
        x = x.to(dtype)
    n, channels, height, width = x.shape
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    along_rows = height, out_size[0], kh, sh, dh, top
    along_columns = width, out_size[1], kw, sw, dw, left
    if height * width <= _SMALL_MAP:
        seen = _seen_at_all(along_rows, along_columns, dtype, x.device)
        mean = torch.mm(x.reshape(n * channels, -1), seen).view(n, channels, -1)
    else:
        rows, columns = (_seen(*axis, dtype, x.device) for axis in (along_rows, along_columns))
        mean = rows @ (x @ columns.T)  # [N, C_in, kh, kw]
    if n > 1:
        mean = mean.mean(0)
    return mean.reshape(geometry.groups, -1)


_MANY_MAPS = 8
# positions up to which one product is as fast as two
_SMALL_MAP = 256


@lru_cache(maxsize=1024)
def _seen(
    size: int,
    outputs: int,
    kernel: int,
    stride: int,
    dilation: int,
    before: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """[kernel, size]: by what share of all outputs each row of the input is seen by each row of the
    kernel; ``before`` rows of zeros lie in front of it."""
    with torch.inference_mode(False):
        # on the device: a copy to it would wait, at each new size of a map
        rows, outs, taps = (torch.arange(n, device=device) for n in (size, outputs, kernel))
        at = (taps.unsqueeze(1) * dilation - before) + outs * stride
        return (at.unsqueeze(2) == rows).sum(1).to(dtype).div_(outputs)


@lru_cache(maxsize=256)
def _seen_at_all(
    rows: tuple[int, ...], columns: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[height * width, kh * kw]: the same of positions of a map."""
    with torch.inference_mode(False):
        of_rows, of_columns = (_seen(*axis, dtype, device) for axis in (rows, columns))
        return torch.kron(of_rows, of_columns).T.contiguous()


def variance_gradient(
    x: Tensor, y: Tensor, mean: Tensor, geometry: ConvGeometry, weight_shape: torch.Size
) -> Tensor:
    """``d var(y_j) / dw_j = 2 E[(p - E[p]) (y_j - mean_j)]``, without autograd.

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
    with without_autocast(x.device):
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


def sampled_variance_gradient(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    patch: Tensor,
    geometry: ConvGeometry,
    weight_shape: torch.Size,
    crops: tuple[Crop, ...] | None,
) -> Tensor:
    """The same derivative, estimated without bias on a few positions.

    Args:
        x, y, mean, geometry, weight_shape: as in :func:`variance_gradient`.
        patch: [groups, d] with ``d = C_in / groups * kh * kw``, from :func:`mean_patch`.
        crops: from :func:`choose_crops`; None: all positions.

    Returns:
        [C_out, d]
    """
    if crops is None:
        return variance_gradient(x, y, mean, geometry, weight_shape)
    x, y = x.detach(), y.detach()
    unpadded = replace(geometry, pad=(0, 0, 0, 0), pad_mode="constant")
    total, offset = None, None
    for crop in crops:  # each counts the same, whatever its size
        inputs, outputs = _cropped(x, y, geometry, crop)
        part = variance_gradient(inputs, outputs, mean, unpadded, weight_shape)
        centre = outputs.mean((0, 2, 3), dtype=mean.dtype)
        total = part if total is None else total.add_(part)
        offset = centre if offset is None else offset.add_(centre)
    # about E[p], not 0: the mean of the crops' y differs from that over all positions
    offset = (offset / len(crops)).sub_(mean).view(geometry.groups, -1, 1)
    total = total.view(geometry.groups, -1, patch.shape[1])
    total = torch.baddbmm(total, offset, patch.unsqueeze(1), beta=1.0 / len(crops), alpha=-2.0)
    return total.flatten(0, 1)
