"""What a norm's input should look like, from what precedes it: moments pushed through a network.

The prediction of Kalman Normalization in closed form. Activations are taken for Gaussian and
independent, between channels and between positions, as the authors' sampling code draws them; its
expectation is computed here instead of a sample. An :class:`Expression` is a small tree of
references and operations, no values: it says how a convolution's input is made of the outputs of
norm layers. ``At(like)(expression)`` evaluates it to the mean and variance per channel,
differentiably, with the parameters that the modules have then.

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
from .propagation import activated, convolved, tap_sums

_ELSEWHERE = "(outside this model)"
Names = dict[int, str]  # of layers and parameters, by ``id``


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

    def describe(self, names: Names) -> str:
        if self.module is not None:
            return names.get(id(self.module), _ELSEWHERE)
        return names.get(id(self._parameter), "?").removesuffix(".weight")


def _whole(value: Tensor | None) -> Tensor | None:
    if type(value) is not nn.Parameter and hasattr(value, "device_mesh"):
        raise Unusable("a parameter is sharded while it is needed")
    return value


class At:
    """Moments of expressions, called with one of them.

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


class _Given(At):
    """With those of one expression's parts, and its own tensors, given."""

    def __init__(self, like: Tensor, moments: dict[Expression, Tensor], own: list[Tensor]) -> None:
        super().__init__(like)
        self._moments, self._own = moments, tuple(own)

    def __call__(self, expression: Expression) -> Tensor:
        return self._moments[expression]

    def own(self, expression: Expression) -> tuple[Tensor | None, ...]:
        return self._own


# ---- nodes -----------------------------------------------------------------------------------


class Expression:
    """A node of the tree; subclasses hold references to layers, parameters and other nodes."""

    @property
    def width(self) -> int | None:
        """Number of channels; None where parts do not fit together."""
        widths = {part.width for part in self.parts()}
        return widths.pop() if len(widths) == 1 else None

    def parts(self) -> list[Expression]:
        return [value for value in self._values() if isinstance(value, Expression)]

    def walk(self) -> Iterator[Expression]:
        yield self
        for part in self.parts():
            yield from part.walk()

    def held(self) -> Iterator[Held]:
        """The parameters in it, those of norm layers aside that it knows as modules."""
        for part in self.walk():
            yield from part._held

    def modules(self) -> Iterator[nn.Module]:
        """Those in it."""
        yield from (held.module for held in self.held() if held.module is not None)
        for part in self.walk():
            yield from (value for value in part._values() if isinstance(value, nn.Module))

    def made_of(self) -> Iterator[Tensor]:
        """The tensors that the moments are computed from."""
        for part in self._owners:
            yield from (tensor for tensor in part.own() if tensor is not None)

    @cached_property
    def _owners(self) -> list[Expression]:
        return [part for part in self.walk() if part.own()]

    def own(self) -> tuple[Tensor | None, ...]:
        """The tensors of this node alone, as they are now.

        Raises:
            Unusable: a parameter is not to be had.
        """
        return tuple(held.now() for held in self._held)

    @cached_property
    def _held(self) -> list[Held]:
        return [value for value in self._values() if isinstance(value, Held)]

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
        this node's own tensors."""
        parts, own = self.parts(), at.own(self)
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (*map(at, parts), *own)]
            given = dict(zip(parts, inputs, strict=False))
            here = self.moments(_Given(at.like, given, inputs[len(parts) :]))
        yield from zip((*parts, *own), torch.autograd.grad(here, inputs, d), strict=True)

    def describe(self, names: Names) -> str:
        """As text."""
        return ", ".join(part.describe(names) for part in self.parts())


class NormOutput(Expression):
    """The output of a norm, N(bias, weight^2) for its affine parameters."""

    def _affine(self, at: At) -> tuple[Tensor, Tensor]:
        weight, bias = at.own(self)[:2]
        weight = at.like.new_ones(self.width) if weight is None else weight.to(at.like.dtype)
        bias = at.like.new_zeros(self.width) if bias is None else bias.to(at.like.dtype)
        return weight, bias

    def _kept(self, at: At) -> Tensor | float:
        """What ``eps`` leaves of the variance."""
        return 1.0

    def moments(self, at: At) -> Tensor:
        weight, bias = self._affine(at)
        return torch.stack((bias, weight.square() * self._kept(at)))

    def by_weight(self, at: At) -> Tensor:
        """Derivative [C] of the variance by the weight, if there is one."""
        return 2.0 * self._affine(at)[0] * self._kept(at)


@dataclass(frozen=True, eq=False)
class Norm(NormOutput):
    """The output of a KN or GKN layer."""

    layer: nn.Module

    @property
    def width(self) -> int:
        return self.layer.channels

    def own(self) -> tuple[Tensor | None, ...]:
        return _whole(self.layer.weight), _whole(self.layer.bias)

    def describe(self, names: Names) -> str:
        return names.get(id(self.layer), _ELSEWHERE)


@dataclass(frozen=True, eq=False)
class FrozenNorm(Norm):
    """The output of a norm that is not trained and normalises by its running statistics, of an
    input that is distributed as they say. ``eps`` makes its variance smaller than weight^2, which
    matters in channels that are nearly constant."""

    @property
    def width(self) -> int:
        return len(self.layer.running_mean)

    def own(self) -> tuple[Tensor | None, ...]:
        return *super().own(), self.layer.running_var

    def _kept(self, at: At) -> Tensor:
        var = at.own(self)[2].to(at.like.dtype)
        return var / (var + self.layer.eps)


@dataclass(frozen=True, eq=False)
class OtherNorm(NormOutput):
    """The output of another norm layer, seen by its affine parameters."""

    weight: Held
    bias: Held

    @property
    def width(self) -> int:
        return len(self.weight.now())

    def describe(self, names: Names) -> str:
        return self.weight.describe(names)


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

    def describe(self, names: Names) -> str:
        return f"{self.weight.describe(names)}({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Activation(Expression):
    """An activation function of :mod:`.propagation`."""

    source: Expression
    operation: str
    options: tuple[Any, ...] = ()

    def moments(self, at: At) -> Tensor:
        return torch.stack(activated(*at(self.source), self.operation, self.options))

    def describe(self, names: Names) -> str:
        return f"{self.operation.lower()}({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Sum(Expression):
    """Residual connections and the sums of an FPN: moments add."""

    left: Expression
    right: Expression

    def moments(self, at: At) -> Tensor:
        return at(self.left) + at(self.right)

    def describe(self, names: Names) -> str:
        return f"{self.left.describe(names)} + {self.right.describe(names)}"


@dataclass(frozen=True, eq=False)
class Affine(Expression):
    """A product with, or a sum with, a number or a parameter per channel or for all of them,
    outside a norm layer (detectron2's norms of several levels have theirs in common)."""

    source: Expression
    value: Held | float
    multiplies: bool = True

    @property
    def width(self) -> int | None:
        size = self.value.now().numel() if isinstance(self.value, Held) else 1
        return self.source.width if size in (1, self.source.width) else None

    def moments(self, at: At) -> Tensor:
        mean, var = at(self.source)
        own = at.own(self)
        value = own[0].to(mean.dtype).flatten() if own else self.value
        changed = (mean * value, var * value**2) if self.multiplies else (mean + value, var)
        return torch.stack(changed)

    def describe(self, names: Names) -> str:
        source = self.source.describe(names)
        return source if isinstance(self.value, Held) else f"{self.value:g} ({source})"


@dataclass(frozen=True, eq=False)
class Pooled(Expression):
    """RoIs cut out of images: moments are kept."""

    source: Expression

    def describe(self, names: Names) -> str:
        return f"roi({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Mixture(Expression):
    """RoIs of several feature levels in one tensor: each level counts the same."""

    sources: tuple[Expression, ...]

    def moments(self, at: At) -> Tensor:
        means, variances = torch.stack([at(source) for source in self.sources], 1)
        return torch.stack(mixture(means, variances, means.new_full((), 1.0 / len(means))))

    def describe(self, names: Names) -> str:
        return f"mixture({super().describe(names)})"


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

    def describe(self, names: Names) -> str:
        return f"concat({super().describe(names)})"


@dataclass(frozen=True, eq=False)
class End(Expression):
    """Nothing is known: the layer that this precedes is the first of a chain."""

    reason: str

    def describe(self, names: Names) -> str:
        return f"- ({self.reason})"
