"""What a norm's input should look like, from what precedes it: moments pushed through a network.

The prediction of Kalman Normalization in closed form. Activations are taken for Gaussian and
independent, between channels and between positions, as the authors' sampling code draws them; its
expectation is computed here instead of a sample. An :class:`Expression` is a small tree that says
how a convolution's input is made of the outputs of norm layers: references and operations, no
values. ``At(like)(expression)`` evaluates it to the mean and variance per channel, ``[C]``
each, differentiably, with the parameters that the modules have then.

What the rules leave out: padding (at the border fewer taps contribute), correlations, and what
pooling does to the moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .functional import mixture
from .propagation import activated, convolution_gradient, convolved, tap_sums


class Unusable(Exception):
    """A parameter that nothing can be predicted with as it is now; carries the reason."""


class Held:
    """A parameter, as the module that holds it has it at each use: what replaces it (pruning, FSDP,
    an assignment) counts from then on.

    Args:
        parameter: as it was found.
        module: that holds it; None where nobody knows, and then it stays as it was found.
        name: under which the module holds it.
    """

    def __init__(self, parameter: Tensor, module: nn.Module | None, name: str = "") -> None:
        self.module, self.name = module, name
        self._parameter = parameter if module is None else None

    def now(self) -> Tensor:
        """The parameter.

        Raises:
            Unusable: the module computes it now, or it is distributed.
        """
        if self.module is None:
            return self._parameter
        value = self.module._parameters.get(self.name)
        if value is None:
            raise Unusable(f"the {self.name} is computed")
        return _whole(value)

    def describe(self, names: dict[int, str]) -> str:
        if self.module is not None:
            return names.get(id(self.module), "(outside this model)")
        return names.get(id(self._parameter), "?").removesuffix(".weight")


def _whole(value: Tensor | None) -> Tensor | None:
    if type(value) is not nn.Parameter and hasattr(value, "device_mesh"):
        raise Unusable("a parameter is sharded while it is needed")
    return value


class Expression:
    """A node of the tree; subclasses hold references to layers, parameters and other nodes."""

    @property
    def width(self) -> int | None:
        """Number of channels; None where parts do not fit together."""
        return self.parts()[0].width

    def parts(self) -> list[Expression]:
        return [value for value in self._values() if isinstance(value, Expression)]

    def walk(self) -> Iterator[Expression]:
        yield self
        for part in self.parts():
            yield from part.walk()

    def held(self) -> Iterator[Held]:
        """The parameters in it, those of norm layers aside that it knows as modules."""
        for part in self.walk():
            yield from (value for value in part._values() if isinstance(value, Held))

    def modules(self) -> Iterator[nn.Module]:
        """Those in it."""
        yield from (held.module for held in self.held() if held.module is not None)
        for part in self.walk():
            yield from (value for value in part._values() if isinstance(value, nn.Module))

    def made_of(self) -> Iterator[Tensor]:
        """The tensors that the moments are computed from."""
        for part in self._owners:
            yield from _present(*part.own())

    @cached_property
    def _owners(self) -> list[Expression]:
        return [p for p in self.walk() if not isinstance(p, (Activation, Sum, Pooled))]

    def own(self) -> tuple[Tensor | None, ...]:
        """The tensors of this node alone, as they are now.

        Raises:
            Unusable: a parameter is not to be had.
        """
        return tuple(value.now() for value in self._values() if isinstance(value, Held))

    def _values(self) -> Iterator[Any]:
        for value in (getattr(self, f.name) for f in fields(self)):
            yield from value if isinstance(value, tuple) else (value,)

    def moments(self, at: At) -> Tensor:
        """Mean and variance [2, C] of the activations here; ``at`` knows those of the parts.

        Raises:
            Unusable: a parameter is not to be had.
        """
        return at(self.parts()[0])

    def pull(self, d: Tensor, at: At) -> Iterator[tuple[Expression | Tensor, Tensor]]:
        """From the gradient of the moments here, ``d`` [2, C], those of the parts' moments and of
        parameters."""
        with torch.enable_grad():
            known = {part: at(part).detach().requires_grad_() for part in self.parts()}
            here = self.moments(Known(at.like, known))
        yield from zip(known, torch.autograd.grad(here, known.values(), d), strict=True)

    def describe(self, names: dict[int, str]) -> str:
        """As text; ``names`` are those of layers and parameters, by ``id``."""
        return self.parts()[0].describe(names)


class At:
    """Knows the moments of expressions, called with one of them.

    Attributes:
        like: a tensor of their dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like.detach().new_empty(0)

    def __call__(self, expression: Expression) -> Tensor:
        return expression.moments(self)

    def own(self, expression: Expression) -> tuple[Tensor | None, ...]:
        """The tensors of an expression's own node."""
        return expression.own()


class Known(At):
    """Of some expressions, given."""

    def __init__(self, like: Tensor, moments: dict[Expression, Tensor]) -> None:
        super().__init__(like)
        self.moments = moments

    def __call__(self, expression: Expression) -> Tensor:
        return self.moments[expression]


class NormOutput(Expression):
    """The output of a norm, N(bias, weight^2) for its affine parameters."""

    def moments(self, at: At) -> Tensor:
        weight, bias = at.own(self)[:2]
        mean = at.like.new_zeros(self.width) if bias is None else bias.to(at.like.dtype)
        var = at.like.new_ones(self.width) if weight is None else weight.to(at.like.dtype).square()
        return torch.stack((mean, var))

    def pull(self, d: Tensor, at: At) -> Iterator[tuple[Expression | Tensor, Tensor]]:
        weight, bias = at.own(self)[:2]
        if weight is not None and weight.requires_grad:
            yield weight, 2.0 * d[1] * weight
        if bias is not None and bias.requires_grad:
            yield bias, d[0]


def _of_shape(per_channel: Tensor, parameter: Tensor) -> Tensor:
    total = per_channel.sum() if parameter.numel() == 1 else per_channel
    return total.view_as(parameter)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@dataclass(frozen=True, eq=False)
class Norm(NormOutput):
    """The output of a KN or GKN layer."""

    layer: nn.Module

    @property
    def width(self) -> int:
        return self.layer.channels

    def own(self) -> tuple[Tensor | None, ...]:
        return _whole(self.layer.weight), _whole(self.layer.bias)

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
        return _whole(self.layer.weight), _whole(self.layer.bias), self.layer.running_var

    def moments(self, at: At) -> Tensor:
        mean, scale = super().moments(at)
        return torch.stack((mean, scale * self._kept(at)))

    def pull(self, d: Tensor, at: At) -> Iterator[tuple[Expression | Tensor, Tensor]]:
        return super().pull(torch.stack((d[0], d[1] * self._kept(at))), at)

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

    left: Expression
    right: Expression

    @property
    def width(self) -> int | None:
        return self.left.width if self.left.width == self.right.width else None

    def moments(self, at: At) -> Tensor:
        return at(self.left) + at(self.right)

    def pull(self, d: Tensor, at: At) -> Iterator[tuple[Expression | Tensor, Tensor]]:
        yield from ((self.left, d), (self.right, d))

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

    source: Expression

    def pull(self, d: Tensor, at: At) -> Iterator[tuple[Expression | Tensor, Tensor]]:
        yield self.source, d

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
