"""Mean and variance, pushed through one operation of a network: activations and convolutions.

ReLU and LeakyReLU of a Gaussian have closed forms. Others are integrated by the trapezoid rule on
49 fixed nodes. Mean and standard deviation of smooth ones (SiLU, GELU, Mish) are right to 1e-6 of
the larger of the input's standard deviation and 1, up to a standard deviation of 4; with a kink
(Hardswish, ELU, Hardtanh with ReLU6) they are off by at most 0.005 of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import functional

Pair = tuple[Tensor, Tensor]

# in units of the statistics: below it a standard deviation counts as none
_TINY = 1e-10


#: by the name of the operation in an autograd graph, which options its node keeps
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "LeakyRelu": ("negative_slope",),
    "Silu": (),
    "Mish": (),
    "Hardswish": (),
    "Gelu": ("approximate",),
    "Hardtanh": ("min_val", "max_val"),
    "Elu": ("alpha", "scale", "input_scale"),
}


def _rectified(mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    """Both moments; ``Phi``, twice ``1 - Phi`` and ``phi / std``, of which derivatives are made."""
    std = (var + _TINY).sqrt()
    a = mean / std * math.sqrt(0.5)
    a = torch.stack((-a, a))
    # twice the distribution function at mean / std, and at the negative of it
    if torch.jit.is_tracing():  # ONNX knows erf alone, whose digits far below 0 are few
        tails = 1.0 - torch.erf(a)
    else:
        tails = torch.special.erfc(a)
    density = torch.exp(a[0] * a[1]) * (0.5 / math.pi) ** 0.5
    # integrals of the distribution function up to there
    up_to, beyond = torch.addcmul(density, a, tails, value=-math.sqrt(0.5))
    first, below = std * up_to, 0.5 * tails[0]
    second = var * torch.addcmul(below, up_to, beyond, value=-1.0).clamp(min=0.0)
    return first, second, below, tails[1], density / std


def rectified(mean: Tensor, var: Tensor) -> Pair:
    """Mean and variance of ``max(x, 0)`` of a Gaussian ``x``; any shape.

    With ``a = mean / std``, ``Phi`` and ``phi`` the standard normal's distribution and density::

        E[max(x, 0)]   = r = mean Phi + std phi
        var[max(x, 0)] = s = var (Phi - (a Phi + phi) (phi - a (1 - Phi)))

    The second is ``E[max(x, 0)^2] - r^2`` rearranged so that nothing cancels where the mean exceeds
    the standard deviation by far. Their derivatives are as short: ``dr/dmean = Phi``, ``dr/dvar =
    phi / (2 std)``, ``ds/dmean = 2 r (1 - Phi)``, ``ds/dvar = Phi - r phi / std``.
    """
    return _rectified(mean, var)[:2]


def activated(mean: Tensor, var: Tensor, operation: str, options: tuple[Any, ...]) -> Pair:
    """Mean and variance of an activation of a Gaussian, by :data:`ACTIVATIONS`; any shape."""
    if operation == "Relu":
        return rectified(mean, var)
    if operation == "LeakyRelu":  # slope x + (1 - slope) max(x, 0), whose covariance is var Phi
        slope, rest = options[0], 1.0 - options[0]
        first, second, below, *_ = _rectified(mean, var)
        second = slope**2 * var + rest**2 * second + (2.0 * slope * rest) * var * below
        return slope * mean + rest * first, second
    nodes = torch.linspace(-6.0, 6.0, 49, dtype=mean.dtype, device=mean.device)
    weights = torch.exp(-0.5 * nodes.square())
    weights = (weights / weights.sum()).view(-1, *[1] * mean.dim())
    std = (var + _TINY).sqrt()
    function = getattr(torch.ops.aten, operation.lower())
    named = dict(zip(ACTIVATIONS[operation], options, strict=True))
    values = function(mean + std * nodes.view_as(weights), **named)
    first = (weights * values).sum(0)
    return first, (weights * (values - first).square()).sum(0)


def activated_with_slopes(
    pair: Tensor, operation: str, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Mean and variance [2, N] after an activation, and their derivatives [2, 2, N] by those before
    it, ``pair`` [2, N]; without a graph."""
    if operation == "Relu":
        first, second, below, above, slope = _rectified(*pair)
        by_var = torch.addcmul(below, first, slope, value=-1.0)
        both = torch.stack((first, second, below, 0.5 * slope, first * above, by_var))
        return both[:2], both[2:].unflatten(0, (2, 2))
    with torch.enable_grad():
        before = pair.detach().requires_grad_()
        after = activated(*before, operation, options)
        rows = [torch.autograd.grad(a.sum(), before, retain_graph=True)[0] for a in after]
    return torch.stack(after).detach(), torch.stack(rows)


def tap_sums(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over a kernel's taps of the weight [..., C_out, C_in / groups, h, w] and of its square,
    [..., 2, C_out, C_in / groups]."""
    taps = weight.to(dtype).flatten(-2)
    if taps.shape[-1] == 1:
        return torch.stack((taps, taps.square()), -4).squeeze(-1)
    if taps.device.type in functional.FUSED:
        return torch.stack((taps, taps.square()), -4).sum(-1)
    flat = taps.flatten(0, -2)  # sums of a few neighbours are slow on the CPU, products are not
    ones = flat.new_ones(flat.shape[1])
    both = flat @ ones, flat.square() @ ones
    return torch.stack([sums.view(taps.shape[:-1]) for sums in both], -3)


def convolved(pair: Tensor, sums: Tensor, bias: Tensor | None = None) -> Tensor:
    """Moments [..., 2, C_out] of a convolution's output away from borders, from those of its input,
    ``pair`` [..., 2, C_in]; ``sums`` are from :func:`tap_sums`, ``bias`` is [..., C_out].

    ``m_j = sum_c m_c sum_ab W_jcab + b_j`` and ``v_j = sum_c v_c sum_ab W_jcab^2``, which hold for
    every stride and dilation.
    """
    rows, sums_of_groups = _of_groups(pair, sums)
    out = torch.bmm(rows, sums_of_groups.mT).view(sums.shape[:-1])
    if bias is None:
        return out
    return torch.stack((out[..., 0, :] + bias.to(out.dtype), out[..., 1, :]), -2)


def _of_groups(pair: Tensor, sums: Tensor) -> Pair:
    """Both as the operands of one product for each group of both moments; rows, as the CPU's
    product of a batch of matrices with rows is many times as fast as that with columns."""
    rows = pair.reshape(-1, 1, sums.shape[-1])
    return rows, sums.reshape(rows.shape[0], -1, sums.shape[-1])


def convolution_gradient(
    d: Tensor, pair: Tensor, weight: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``pair`` [2, C_in] and of the weight from that of the moments after the
    convolution, ``d`` [2, C_out]; its bias has ``d[0]``."""
    rows, sums_of_groups = _of_groups(pair, sums)
    d_rows = d.reshape(rows.shape[0], 1, -1)
    d_pair = torch.bmm(d_rows, sums_of_groups).view_as(pair)
    d_first, d_second = (d_rows.mT * rows).view(2, *weight.shape[:2], 1, 1)
    return d_pair, torch.addcmul(d_first, weight.to(d.dtype), d_second, value=2.0)
