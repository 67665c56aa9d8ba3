"""What a norm's input should look like, from what precedes it: moments pushed through a network.

The prediction of Kalman Normalization in closed form. Activations are taken for Gaussian and
independent, between channels and between positions, as the authors' sampling code draws them; its
expectation is computed here instead of a sample. An :class:`Expression` is a small tree that says
how a convolution's input is made of the outputs of norm layers: references and operations, no
values. ``expression.moments(like)`` evaluates it to the mean and variance per channel, ``[C]``
each, differentiably, with the parameters that the modules have then.

What the rules leave out: padding (at the border fewer taps contribute), correlations, and what
pooling does to the moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .functional import mixture
from .propagation import Pair, activated, convolved


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


def _whole(value: Tensor) -> Tensor:
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
        for value in self._values():
            if isinstance(value, Held):
                yield value.now()
            elif isinstance(value, Expression):
                yield from value.made_of()

    def _values(self) -> Iterator[Any]:
        for value in (getattr(self, f.name) for f in fields(self)):
            yield from value if isinstance(value, tuple) else (value,)

    def moments(self, like: Tensor) -> Pair:
        """Mean and variance [C] of the activations here, of the dtype and device of ``like``.

        Raises:
            Unusable: a parameter is not to be had.
        """
        return self.parts()[0].moments(like)

    def describe(self, names: dict[int, str]) -> str:
        """As text; ``names`` are those of layers and parameters, by ``id``."""
        return self.parts()[0].describe(names)


def _affine_pair(weight: Tensor | None, bias: Tensor | None, width: int, like: Tensor) -> Pair:
    mean = like.new_zeros(width) if bias is None else _whole(bias).to(like.dtype)
    if weight is None:
        return mean, like.new_ones(width)
    return mean, _whole(weight).to(like.dtype).square()


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@dataclass(frozen=True, eq=False)
class Norm(Expression):
    """The output of a KN or GKN layer."""

    layer: nn.Module

    @property
    def width(self) -> int:
        return self.layer.channels

    def made_of(self) -> Iterator[Tensor]:
        yield from _present(self.layer.weight, self.layer.bias)

    def moments(self, like: Tensor) -> Pair:
        return _affine_pair(self.layer.weight, self.layer.bias, self.width, like)

    def describe(self, names: dict[int, str]) -> str:
        return names.get(id(self.layer), "(outside this model)")


@dataclass(frozen=True, eq=False)
class OtherNorm(Expression):
    """The output of another norm layer, seen by its affine parameters."""

    weight: Held
    bias: Held

    @property
    def width(self) -> int:
        return len(self.weight.now())

    def moments(self, like: Tensor) -> Pair:
        return _affine_pair(self.weight.now(), self.bias.now(), self.width, like)

    def describe(self, names: dict[int, str]) -> str:
        return self.weight.describe(names)


@dataclass(frozen=True, eq=False)
class FrozenNorm(Expression):
    """The output of a norm that is not trained and normalises by its running statistics, of an
    input that is distributed as they say. ``eps`` makes its variance smaller than weight^2, which
    matters in channels that are nearly constant."""

    layer: nn.Module

    @property
    def width(self) -> int:
        return len(self.layer.running_mean)

    def made_of(self) -> Iterator[Tensor]:
        layer = self.layer
        yield from _present(layer.weight, layer.bias, layer.running_var)

    def moments(self, like: Tensor) -> Pair:
        layer = self.layer
        var = layer.running_var.to(like.dtype)
        mean, scale = _affine_pair(layer.weight, layer.bias, self.width, like)
        return mean, scale * (var / (var + layer.eps))

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

    def moments(self, like: Tensor) -> Pair:
        return self.through(*self.source.moments(like))

    def through(self, mean: Tensor, var: Tensor) -> Pair:
        """Moments of the output from those of the input."""
        bias = None if self.bias is None else self.bias.now()
        return convolved(mean, var, self.weight.now(), bias, self.groups)

    def describe(self, names: dict[int, str]) -> str:
        return f"{self.weight.describe(names)}({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Activation(Expression):
    """An activation function of :mod:`.activations`."""

    source: Expression
    operation: str
    options: tuple[Any, ...] = ()

    def moments(self, like: Tensor) -> Pair:
        return activated(*self.source.moments(like), self.operation, self.options)

    def describe(self, names: dict[int, str]) -> str:
        return f"{self.operation.lower()}({self.source.describe(names)})"


@dataclass(frozen=True, eq=False)
class Scaled(Expression):
    """A product with a number."""

    source: Expression
    factor: float

    def moments(self, like: Tensor) -> Pair:
        mean, var = self.source.moments(like)
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

    def moments(self, like: Tensor) -> Pair:
        left, right = self.left.moments(like), self.right.moments(like)
        return left[0] + right[0], left[1] + right[1]

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

    def moments(self, like: Tensor) -> Pair:
        mean, var = self.source.moments(like)
        value = self.parameter.now().to(mean.dtype).flatten()
        return (mean * value, var * value.square()) if self.multiplies else (mean + value, var)


@dataclass(frozen=True, eq=False)
class Pooled(Expression):
    """RoIs cut out of images: moments are kept."""

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

    def moments(self, like: Tensor) -> Pair:
        pairs = zip(*(source.moments(like) for source in self.sources), strict=True)
        means, variances = (torch.stack(values) for values in pairs)
        return mixture(means, variances, means.new_full((), 1.0 / len(means)))

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

    def moments(self, like: Tensor) -> Pair:
        pairs = zip(*(source.moments(like) for source in self.sources), strict=True)
        mean, var = (torch.cat(values) for values in pairs)
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

    def moments(self, like: Tensor) -> Any:
        raise RuntimeError(f"no prediction where a chain ends: {self.reason}")

    def describe(self, names: dict[int, str]) -> str:
        return f"- ({self.reason})"


class Constant:
    """Moments of an expression, kept while it is made of tensors that are not trained and have not
    changed: behind frozen parts."""

    def __init__(self, made_of: list[Tensor], like: Tensor, pair: Pair) -> None:
        self._made_of = made_of  # also keeps their ids from being given away
        self._state = _state(made_of, like)
        self.pair = pair

    def holds(self, made_of: list[Tensor], like: Tensor) -> bool:
        return self._state == _state(made_of, like)


def _state(tensors: list[Tensor], like: Tensor) -> tuple[Any, ...]:
    return like.dtype, like.device, [(id(t), t.data_ptr(), t._version) for t in tensors]


def constant_moments(source: Expression, like: Tensor, kept: Constant | None) -> Constant | None:
    """The :class:`Constant` of an expression, ``kept`` if it still holds; None where anything that
    the moments are computed from is trained."""
    made_of = []
    for tensor in source.made_of():
        if tensor.requires_grad or tensor.is_inference():
            return None
        made_of.append(tensor)
    if kept is not None and kept.holds(made_of, like):
        return kept
    with torch.inference_mode(False), torch.no_grad():
        return Constant(made_of, like, source.moments(like))
