"""Mean and variance, pushed through one operation of a network: activations and convolutions.

ReLU and LeakyReLU of a Gaussian have closed forms. Others are integrated by the trapezoid rule on
49 fixed nodes, a quarter of a standard deviation apart, out to six. Mean and standard deviation of
smooth ones (SiLU, GELU, Mish) are right to 1e-6 of the larger of the input's standard deviation and
1, up to a standard deviation of 4; with a kink (Hardswish, ELU, Hardtanh with ReLU6) they are off
by at most 0.005 of it. Everything is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]

# in units of the statistics: below it a standard deviation counts as none
_TINY = 1e-10
_SPACING, _REACH = 0.25, 6.0  # of the nodes, in standard deviations


def _below(a: Tensor) -> Tensor:
    """The standard normal's distribution function."""
    if torch.jit.is_tracing():  # ONNX knows erf alone, whose digits far below 0 are few
        return 0.5 + 0.5 * torch.erf(a / math.sqrt(2.0))
    return torch.special.ndtr(a)


def _rectified(mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    """Both moments, and what their derivatives are made of."""
    std = (var + _TINY).sqrt()
    a = (mean / std).clamp(-30.0, 30.0)
    below, above = _below(a), _below(-a)
    density = torch.exp(-0.5 * a.square()) / math.sqrt(2.0 * math.pi)
    first = mean * below + std * density
    relative = below + a.square() * below * above + a * density * (above - below)
    second = var * (relative - density.square()).clamp(min=0.0)
    return first, second, below, above, density / std


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> Pair:
        first, second, below, above, slope = _rectified(mean, var)
        ctx.save_for_backward(first, below, above, slope)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> Pair:
        first, below, above, slope = ctx.saved_tensors
        d_mean = d_first * below + d_second * (2.0 * first * above)
        d_var = d_first * (0.5 * slope) + d_second * (below - first * slope)
        return d_mean, d_var


def rectified(mean: Tensor, var: Tensor) -> Pair:
    """Mean and variance of ``max(x, 0)`` of a Gaussian ``x``; any shape.

    With ``a = mean / std``, ``Phi`` and ``phi`` the standard normal's distribution and density::

        E[max(x, 0)]   = r = mean Phi + std phi
        var[max(x, 0)] = s = var (Phi + a^2 Phi (1 - Phi) + a phi (1 - 2 Phi) - phi^2)

    The second is ``E[max(x, 0)^2] - r^2`` rearranged so that nothing cancels where the mean exceeds
    the standard deviation by far. Their derivatives are as short: ``dr/dmean = Phi``, ``dr/dvar =
    phi / (2 std)``, ``ds/dmean = 2 r (1 - Phi)``, ``ds/dvar = Phi - r phi / std``.
    """
    if torch.is_grad_enabled() and (mean.requires_grad or var.requires_grad):
        return _Rectified.apply(mean, var)
    return _rectified(mean, var)[:2]


def leaky(mean: Tensor, var: Tensor, slope: float) -> Pair:
    """Of ``slope x + (1 - slope) max(x, 0)``: the covariance of ``x`` and ``max(x, 0)`` is ``var
    Phi`` (Stein's lemma)."""
    first, second = rectified(mean, var)
    below = _below((mean / (var + _TINY).sqrt()).clamp(-30.0, 30.0))
    rest = 1.0 - slope
    return (
        slope * mean + rest * first,
        slope**2 * var + rest**2 * second + (2.0 * slope * rest) * var * below,
    )


#: by the name of the operation in an autograd graph, with that operation's own options
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "Silu": F.silu,
    "Mish": F.mish,
    "Hardswish": F.hardswish,
    "Gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
    "Hardtanh": F.hardtanh,
    "Elu": torch.ops.aten.elu,
}
#: the options that a node of an autograd graph keeps
OPTIONS = {
    "LeakyRelu": ("negative_slope",),
    "Gelu": ("approximate",),
    "Hardtanh": ("min_val", "max_val"),
    "Elu": ("alpha", "scale", "input_scale"),
}


def activated(mean: Tensor, var: Tensor, operation: str, options: tuple[Any, ...]) -> Pair:
    """Mean and variance of an activation of a Gaussian, by :data:`FUNCTIONS`; any shape."""
    if operation == "Relu":
        return rectified(mean, var)
    if operation == "LeakyRelu":
        return leaky(mean, var, *options)
    nodes = torch.arange(
        -_REACH, _REACH + 0.5 * _SPACING, _SPACING, dtype=mean.dtype, device=mean.device
    )
    weights = torch.exp(-0.5 * nodes.square())
    weights = (weights / weights.sum()).view(-1, *[1] * mean.dim())
    std = (var + _TINY).sqrt()
    values = FUNCTIONS[operation](mean + std * nodes.view_as(weights), *options)
    first = (weights * values).sum(0)
    return first, (weights * (values - first).square()).sum(0)


class _TapSums(torch.autograd.Function):
    """Sums over a kernel's taps of the weight and of its square, [C_out, C_in / groups] each, with
    a backward pass that goes over the weight once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        return _tap_sums(weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        d_first, d_second = (d[..., None, None] for d in (d_first, d_second))
        full = torch.addcmul(d_first, weight.to(d_first.dtype), d_second, value=2.0)
        return full.to(weight.dtype), None


def _tap_sums(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    taps = weight.to(dtype).flatten(2)
    if taps.device.type == "cpu":  # sums of a few neighbours are slow, products are not
        ones = taps.new_ones(taps.shape[2])
        return taps @ ones, taps.square() @ ones
    return taps.sum(2), taps.square().sum(2)


def convolved(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Pair:
    """Moments of a convolution's output away from borders, from those of its input.

    ``m_j = sum_c m_c sum_ab W_jcab + b_j`` and ``v_j = sum_c v_c sum_ab W_jcab^2``, which hold for
    every stride and dilation.

    Args:
        mean, var: [C_in].
        weight: [C_out, C_in / groups, kh, kw].
        bias: [C_out] or None.
        groups: of the convolution.

    Returns:
        [C_out] each.
    """
    trained = torch.is_grad_enabled() and weight.requires_grad
    sums = _TapSums.apply if trained else _tap_sums
    first, second = sums(weight, mean.dtype)
    if groups == 1:
        mean, var = F.linear(mean, first), F.linear(var, second)
    else:
        mean, var = (
            (matrix.unflatten(0, (groups, -1)) @ value.view(groups, -1, 1)).flatten()
            for value, matrix in ((mean, first), (var, second))
        )
    return (mean if bias is None else mean + bias.to(mean.dtype)), var
