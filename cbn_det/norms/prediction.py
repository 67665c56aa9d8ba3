"""What a norm's input should look like, from what precedes it: moments pushed through a network.

The prediction of Kalman Normalization in closed form. Activations are taken for Gaussian and
independent, between channels and between positions, as the authors' sampling code draws them; its
expectation is computed here instead of a sample. An :class:`~.expression.Expression` says how a
convolution's input is made of the outputs of norm layers; ``At(like)(expression)`` evaluates it to
the mean and variance per channel, differentiably, with the parameters that the modules have then.

What the rules leave out: padding (at the border fewer taps contribute), correlations, and what
pooling does to the moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .expression import At, Expression, Held, whole
from .functional import mixture
from .propagation import activated, convolution_gradient, convolved, tap_sums


class NormOutput(Expression):
    """The output of a norm, N(bias, weight^2) for its affine parameters."""

    def moments(self, at: At) -> Tensor:
        weight, bias = at.own(self)[:2]
        mean = at.like.new_zeros(self.width) if bias is None else bias.to(at.like.dtype)
        var = at.like.new_ones(self.width) if weight is None else weight.to(at.like.dtype).square()
        return torch.stack((mean, var))

    def by_weight(self, at: At) -> Tensor:
        """Derivative [C] of the variance by the weight, if there is one."""
        weight = at.own(self)[0]
        return at.like.new_ones(self.width) if weight is None else 2.0 * weight.to(at.like.dtype)


def _of_shape(per_channel: Tensor, parameter: Tensor) -> Tensor:
    total = per_channel.sum() if parameter.numel() == 1 else per_channel
    return total.view_as(parameter)


@dataclass(frozen=True, eq=False)
class Norm(NormOutput):
    """The output of a KN or GKN layer."""

    layer: nn.Module

    @property
    def width(self) -> int:
        return self.layer.channels

    def own(self) -> tuple[Tensor | None, ...]:
        return whole(self.layer.weight), whole(self.layer.bias)

    def describe(self, names: dict[int, str]) -> str:
        return names.get(id(self.layer), "(outside this model)")


@dataclass(frozen=True, eq=False)
class OtherNorm(NormOutput):
    """The output of another norm layer, seen by its affine parameters."""

    weight: Held
    bias: Held

    @property
    def width(self) -> int:
        return len(self.weight.now())

    def describe(self, names: dict[int, str]) -> str:
        return self.weight.describe(names)


@dataclass(frozen=True, eq=False)
class FrozenNorm(NormOutput):
    """The output of a norm that is not trained and normalises by its running statistics, of an
    input that is distributed as they say. ``eps`` makes its variance smaller than weight^2, which
    matters in channels that are nearly constant."""

    layer: nn.Module

    @property
    def width(self) -> int:
        return len(self.layer.running_mean)

    def own(self) -> tuple[Tensor | None, ...]:
        return whole(self.layer.weight), whole(self.layer.bias), self.layer.running_var

    def moments(self, at: At) -> Tensor:
        mean, scale = super().moments(at)
        return torch.stack((mean, scale * self._kept(at)))

    def by_weight(self, at: At) -> Tensor:
        return super().by_weight(at) * self._kept(at)

    def _kept(self, at: At) -> Tensor:
        var = at.own(self)[2].to(at.like.dtype)
        return var / (var + self.layer.eps)

    def describe(self, names: dict[int, str]) -> str:
        return names.get(id(self.layer), "(outside this model)")


@dataclass(frozen=True, eq=False)
class Conv(Expression):
    """A convolution; the one before a norm, or one that has no norm."""

    source: Expression
    weight: Held
    bias: Held | None
    groups: int

    @property
    def width(self) -> int | None:
        weight = self.weight.now()
        return len(weight) if self.source.width == weight.shape[1] * self.groups else None

    def moments(self, at: At) -> Tensor:
        weight, *bias = at.own(self)
        return convolved(at(self.source), tap_sums(weight, at.like.dtype), *bias)

    def pull(self, d: Tensor, at: At) -> Iterator[tuple[Expression | Tensor, Tensor]]:
        weight, *bias = at.own(self)
        sums = tap_sums(weight, at.like.dtype)
        d_pair, d_weight = convolution_gradient(d, at(self.source), weight, sums)
        yield from ((self.source, d_pair), (weight, d_weight), *((b, d[0]) for b in bias))

    def describe(self, names: dict[int, str]) -> str:
        return f"{self.weight.describe(names)}({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Activation(Expression):
    """An activation function of :mod:`.activations`."""

    owns = False

    source: Expression
    operation: str
    options: tuple[Any, ...] = ()

    def moments(self, at: At) -> Tensor:
        return torch.stack(activated(*at(self.source), self.operation, self.options))

    def describe(self, names: dict[int, str]) -> str:
        return f"{self.operation.lower()}({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Scaled(Expression):
    """A product with a number."""

    source: Expression
    factor: float

    def moments(self, at: At) -> Tensor:
        mean, var = at(self.source)
        return torch.stack((mean * self.factor, var * self.factor**2))

    def describe(self, names: dict[int, str]) -> str:
        return f"{self.factor:g} ({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Sum(Expression):
    """Residual connections and the sums of an FPN: moments add."""

    owns = False

    left: Expression
    right: Expression

    @property
    def width(self) -> int | None:
        return self.left.width if self.left.width == self.right.width else None

    def moments(self, at: At) -> Tensor:
        return at(self.left) + at(self.right)

    def describe(self, names: dict[int, str]) -> str:
        return f"{self.left.describe(names)} + {self.right.describe(names)}"


@dataclass(frozen=True, eq=False)
class Affine(Expression):
    """A product with, or a sum with, a parameter per channel or for all of them, outside a norm
    layer (detectron2's norms of several levels have theirs in common)."""

    source: Expression
    parameter: Held
    multiplies: bool

    @property
    def width(self) -> int | None:
        return self.source.width if self.parameter.now().numel() in (1, self.source.width) else None

    def moments(self, at: At) -> Tensor:
        mean, var = at(self.source)
        value = at.own(self)[0].to(mean.dtype).flatten()
        changed = (mean * value, var * value.square()) if self.multiplies else (mean + value, var)
        return torch.stack(changed)

    def pull(self, d: Tensor, at: At) -> Iterator[tuple[Expression | Tensor, Tensor]]:
        (mean, var), (parameter,) = at(self.source), at.own(self)
        if not self.multiplies:
            yield from ((self.source, d), (parameter, _of_shape(d[0], parameter)))
            return
        value = parameter.to(mean.dtype).flatten()
        yield self.source, d * torch.stack((value, value.square()))
        yield parameter, _of_shape(d[0] * mean + 2.0 * d[1] * var * value, parameter)


@dataclass(frozen=True, eq=False)
class Pooled(Expression):
    """RoIs cut out of images: moments are kept."""

    owns = False

    source: Expression

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

    def moments(self, at: At) -> Tensor:
        means, variances = torch.stack([at(source) for source in self.sources], 1)
        return torch.stack(mixture(means, variances, means.new_full((), 1.0 / len(means))))

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

    def moments(self, at: At) -> Tensor:
        return torch.cat([at(source) for source in self.sources], 1)

    def describe(self, names: dict[int, str]) -> str:
        return f"concat({', '.join(source.describe(names) for source in self.sources)})"


@dataclass(frozen=True, eq=False)
class End(Expression):
    """Nothing is known: the layer that this precedes is the first of a chain."""

    reason: str

    @property
    def width(self) -> None:
        return None

    def moments(self, at: At) -> Any:
        raise RuntimeError(f"no prediction where a chain ends: {self.reason}")

    def describe(self, names: dict[int, str]) -> str:
        return f"- ({self.reason})"
