"""What a norm's input should look like, from what precedes it: moments pushed through a network.

The prediction of Kalman Normalization in closed form. Activations are taken for Gaussian and
independent, between channels and between positions, as the authors' sampling code draws them; its
expectation is computed here instead of a sample. An :class:`Expression` is a small tree that says
how a convolution's input is made of the outputs of norm layers: references and operations, no
values. ``expression.moments(...)`` evaluates it to the mean and variance per channel, ``[C]`` or,
where a norm works sample by sample, ``[N, C]``, differentiably.

What the rules leave out: padding (at the border fewer taps contribute), correlations, and what
pooling does to the moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .functional import mixture

Pair = tuple[Tensor, Tensor]

# in units of the statistics: below it a standard deviation counts as none
_TINY = 1e-10


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> Pair:
        std = (var + _TINY).sqrt()
        a = (mean / std).clamp(-30.0, 30.0)
        below, above = torch.special.ndtr(a), torch.special.ndtr(-a)
        density = torch.exp(-0.5 * a.square()) / math.sqrt(2.0 * math.pi)
        first = mean * below + std * density
        relative = below + a.square() * below * above + a * density * (above - below)
        ctx.save_for_backward(first, below, above, density / std)
        return first, var * (relative - density.square()).clamp(min=0.0)

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
    return _Rectified.apply(mean, var)


class _TapSums(torch.autograd.Function):
    """Sums over a kernel's taps of the weight and of its square, [C_out, C_in / groups] each, with
    a backward pass that goes over the weight once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        taps = weight.to(dtype).flatten(2)
        if taps.device.type == "cpu":  # sums of a few neighbours are slow, products are not
            ones = taps.new_ones(taps.shape[2])
            return taps @ ones, taps.square() @ ones
        return taps.sum(2), taps.square().sum(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        d_first, d_second = (d[..., None, None] for d in (d_first, d_second))
        full = torch.addcmul(d_first, weight.to(d_first.dtype), d_second, value=2.0)
        return full.to(weight.dtype), None


def convolved(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Pair:
    """Moments of a convolution's output away from borders, from those of its input.

    ``m_j = sum_c m_c sum_ab W_jcab + b_j`` and ``v_j = sum_c v_c sum_ab W_jcab^2``, which hold for
    every stride and dilation.

    Args:
        mean, var: [..., C_in].
        weight: [C_out, C_in / groups, kh, kw].
        bias: [C_out] or None.
        groups: of the convolution.

    Returns:
        [..., C_out] each.
    """
    first, second = _TapSums.apply(weight, mean.dtype)
    if groups == 1:
        mean, var = F.linear(mean, first), F.linear(var, second)
    else:
        mean, var = (
            torch.einsum(
                "...gi,goi->...go",
                value.unflatten(-1, (groups, -1)),
                matrix.unflatten(0, (groups, -1)),
            ).flatten(-2)
            for value, matrix in ((mean, first), (var, second))
        )
    return (mean if bias is None else mean + bias.to(mean.dtype)), var


def pooled_samples(mean: Tensor, var: Tensor) -> Pair:
    """Moments of all samples together, [1, C], from each one's, [N, C]; [C] stays as it is."""
    if mean.dim() == 1:
        return mean, var
    mean, var = mixture(mean, var, mean.new_full((1, 1), 1.0 / len(mean)))
    return mean[None], var[None]


@dataclass(frozen=True, eq=False)
class Setting:
    """How an expression is to be evaluated.

    Attributes:
        like: a tensor of the device and dtype of the result.
        authors: whether norm layers hand on the estimate of their input (the authors' code), or
            the distribution N(beta, gamma^2) of their output.
        handed: what layers handed on, by layer, where it is not what they handed on last.
    """

    like: Tensor
    authors: bool
    handed: dict[nn.Module, Pair] = field(default_factory=dict)


class Expression:
    """A node of the tree; subclasses hold references to layers, parameters and other nodes."""

    @property
    def width(self) -> int | None:
        """Number of channels; None where parts do not fit together."""
        return self.parts()[0].width

    def parts(self) -> list[Expression]:
        values = [getattr(self, f.name) for f in fields(self)]
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        return [value for value in flat if isinstance(value, Expression)]

    def walk(self) -> Iterator[Expression]:
        yield self
        for part in self.parts():
            yield from part.walk()

    def made_of(self, setting: Setting) -> Iterator[Tensor | None]:
        """The tensors that the moments are computed from; None for what a forward hands on."""
        for value in (getattr(self, f.name) for f in fields(self)):
            if isinstance(value, Tensor):
                yield value
        for part in self.parts():
            yield from part.made_of(setting)

    def moments(self, setting: Setting) -> Pair:
        """Mean and variance of the activations here."""
        return self.parts()[0].moments(setting)

    def describe(self, names: dict[int, str]) -> str:
        """As text; ``names`` are those of layers and parameters, by ``id``."""
        return self.parts()[0].describe(names)


def _affine_pair(weight: Tensor | None, bias: Tensor | None, width: int, like: Tensor) -> Pair:
    mean = like.new_zeros(width) if bias is None else bias.to(like.dtype)
    return mean, like.new_ones(width) if weight is None else weight.to(like.dtype).square()


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@dataclass(frozen=True, eq=False)
class Norm(Expression):
    """The output of a KN or GKN layer."""

    layer: nn.Module

    @property
    def width(self) -> int:
        return self.layer.channels

    def made_of(self, setting: Setting) -> Iterator[Tensor | None]:
        if setting.authors:
            yield None
        yield from _present(self.layer.weight, self.layer.bias)

    def moments(self, setting: Setting) -> Pair:
        handed = None
        if setting.authors:
            handed = setting.handed.get(self.layer) or self.layer.hands_on()
        if handed is not None:
            return handed[0].to(setting.like.dtype), handed[1].to(setting.like.dtype)
        return _affine_pair(self.layer.weight, self.layer.bias, self.width, setting.like)

    def describe(self, names: dict[int, str]) -> str:
        return names.get(id(self.layer), "(outside this model)")


@dataclass(frozen=True, eq=False)
class OtherNorm(Expression):
    """The output of another norm layer, seen by its affine parameters."""

    weight: Tensor
    bias: Tensor

    @property
    def width(self) -> int:
        return len(self.weight)

    def moments(self, setting: Setting) -> Pair:
        return _affine_pair(self.weight, self.bias, self.width, setting.like)

    def describe(self, names: dict[int, str]) -> str:
        return names.get(id(self.weight), "(outside this model)").removesuffix(".weight")


@dataclass(frozen=True, eq=False)
class FrozenNorm(Expression):
    """The output of a norm that is not trained and normalises by its running statistics, of an
    input that is distributed as they say. ``eps`` makes its variance smaller than weight^2, which
    matters in channels that are nearly constant."""

    layer: nn.Module

    @property
    def width(self) -> int:
        return len(self.layer.running_mean)

    def made_of(self, setting: Setting) -> Iterator[Tensor | None]:
        layer = self.layer
        yield from _present(layer.weight, layer.bias, layer.running_mean, layer.running_var)

    def moments(self, setting: Setting) -> Pair:
        dtype, layer = setting.like.dtype, self.layer
        mean, var = layer.running_mean.to(dtype), layer.running_var.to(dtype)
        if setting.authors:
            return mean, var
        mean, scale = _affine_pair(layer.weight, layer.bias, self.width, setting.like)
        return mean, scale * (var / (var + layer.eps))

    def describe(self, names: dict[int, str]) -> str:
        return names.get(id(self.layer), "(outside this model)")


@dataclass(frozen=True, eq=False)
class Conv(Expression):
    """A convolution; the one before a norm, or one that has no norm."""

    source: Expression
    weight: Tensor
    bias: Tensor | None
    groups: int

    @property
    def width(self) -> int | None:
        fits = self.source.width == self.weight.shape[1] * self.groups
        return len(self.weight) if fits else None

    def moments(self, setting: Setting) -> Pair:
        return self.through(*self.source.moments(setting))

    def through(self, mean: Tensor, var: Tensor) -> Pair:
        """Moments of the output from those of the input."""
        return convolved(mean, var, self.weight, self.bias, self.groups)

    def describe(self, names: dict[int, str]) -> str:
        name = names.get(id(self.weight), "?").removesuffix(".weight")
        return f"{name}({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Relu(Expression):
    source: Expression

    def moments(self, setting: Setting) -> Pair:
        return rectified(*self.source.moments(setting))

    def describe(self, names: dict[int, str]) -> str:
        return f"relu({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Scaled(Expression):
    """A product with a number."""

    source: Expression
    factor: float

    def moments(self, setting: Setting) -> Pair:
        mean, var = self.source.moments(setting)
        return mean * self.factor, var * self.factor**2

    def describe(self, names: dict[int, str]) -> str:
        return f"{self.factor:g} ({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Sum(Expression):
    """Residual connections and the sums of an FPN: moments add."""

    left: Expression
    right: Expression

    @property
    def width(self) -> int | None:
        return self.left.width if self.left.width == self.right.width else None

    def moments(self, setting: Setting) -> Pair:
        left, right = self.left.moments(setting), self.right.moments(setting)
        return left[0] + right[0], left[1] + right[1]

    def describe(self, names: dict[int, str]) -> str:
        return f"{self.left.describe(names)} + {self.right.describe(names)}"


@dataclass(frozen=True, eq=False)
class Affine(Expression):
    """A product with, or a sum with, a parameter per channel, outside a norm layer (detectron2's
    norms of several levels have theirs in common). The authors' reading leaves out the affine
    parameters of norms, so these, too."""

    source: Expression
    parameter: Tensor
    multiplies: bool

    @property
    def width(self) -> int | None:
        return self.source.width if self.source.width == self.parameter.numel() else None

    def moments(self, setting: Setting) -> Pair:
        mean, var = self.source.moments(setting)
        if setting.authors:
            return mean, var
        value = self.parameter.to(mean.dtype).flatten()
        return (mean * value, var * value.square()) if self.multiplies else (mean + value, var)


@dataclass(frozen=True, eq=False)
class Pooled(Expression):
    """RoIs cut out of images: moments are kept, those of several samples become one mixture
    (whose RoI is of which image is not known here)."""

    source: Expression

    def moments(self, setting: Setting) -> Pair:
        return pooled_samples(*self.source.moments(setting))

    def describe(self, names: dict[int, str]) -> str:
        return f"roi({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Mixture(Expression):
    """RoIs of several feature levels in one tensor: each level counts the same."""

    sources: tuple[Expression, ...]

    @property
    def width(self) -> int | None:
        widths = {source.width for source in self.sources}
        return widths.pop() if len(widths) == 1 else None

    def moments(self, setting: Setting) -> Pair:
        pairs = [source.moments(setting) for source in self.sources]
        means = torch.stack(torch.broadcast_tensors(*[mean for mean, _ in pairs]))
        variances = torch.stack(torch.broadcast_tensors(*[var for _, var in pairs]))
        return mixture(means, variances, means.new_full((), 1.0 / len(pairs)))

    def describe(self, names: dict[int, str]) -> str:
        return f"mixture({', '.join(source.describe(names) for source in self.sources)})"


@dataclass(frozen=True, eq=False)
class Concat(Expression):
    """Channels side by side."""

    sources: tuple[Expression, ...]

    @property
    def width(self) -> int | None:
        widths = [source.width for source in self.sources]
        return None if None in widths else sum(widths)

    def moments(self, setting: Setting) -> Pair:
        pairs = [source.moments(setting) for source in self.sources]
        samples = max((mean.shape[:-1] for mean, _ in pairs), key=len)
        mean, var = (
            torch.cat([pair[k].expand(*samples, -1) for pair in pairs], -1) for k in (0, 1)
        )
        return mean, var

    def describe(self, names: dict[int, str]) -> str:
        return f"concat({', '.join(source.describe(names) for source in self.sources)})"


@dataclass(frozen=True, eq=False)
class End(Expression):
    """Nothing is known: the layer that this precedes is the first of a chain."""

    reason: str

    @property
    def width(self) -> None:
        return None

    def moments(self, setting: Setting) -> Any:
        raise RuntimeError(f"no prediction where a chain ends: {self.reason}")

    def describe(self, names: dict[int, str]) -> str:
        return f"- ({self.reason})"


class Constant:
    """Moments of an expression, kept while it is made of tensors that are not trained and have not
    changed: behind frozen parts."""

    def __init__(self, made_of: list[Tensor], setting: Setting, pair: Pair) -> None:
        self._made_of = made_of  # also keeps their ids from being given away
        self._state = _state(made_of, setting)
        self.pair = pair

    def holds(self, made_of: list[Tensor], setting: Setting) -> bool:
        return self._state == _state(made_of, setting)


def _state(tensors: list[Tensor], setting: Setting) -> tuple[Any, ...]:
    like = setting.like
    return like.dtype, like.device, [(id(t), t.data_ptr(), t._version) for t in tensors]


def constant_moments(source: Expression, setting: Setting, kept: Constant | None) -> Any:
    """The :class:`Constant` of an expression, ``kept`` if it still holds; None where anything that
    the moments are computed from is trained or changes from forward to forward."""
    made_of = []
    for tensor in source.made_of(setting):
        if tensor is None or tensor.requires_grad or tensor.is_inference():
            return None
        made_of.append(tensor)
    if kept is not None and kept.holds(made_of, setting):
        return kept
    with torch.inference_mode(False), torch.no_grad():
        return Constant(made_of, setting, source.moments(setting))
