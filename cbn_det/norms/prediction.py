"""What a norm's input should look like, from what precedes it: moments pushed through a network.

The prediction of Kalman Normalization in closed form. Activations are taken for Gaussian and
independent, between channels and between positions, as the authors' sampling code draws them; its
expectation is computed here instead of a sample. An :class:`Expression` is a small tree of
references and operations, no values: it says how a convolution's input is made of the outputs of
norm layers. :func:`evaluated` gives mean and variance per channel, differentiably, with the
parameters that the modules have then.

What the rules leave out: padding (at the border fewer taps contribute), correlations, and what
pooling does to the moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .functional import mixture
from .propagation import activated, convolved, tap_sums

_ELSEWHERE = "(outside this model)"
Names = dict[int, str]  # of layers and parameters, by ``id``
Moments = Sequence[Tensor]  # of some sources, [2, C] each
Tensors = tuple[Tensor | None, ...]


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

    @property
    def identity(self) -> tuple[Any, str]:
        """Equal for equal parameters."""
        return id(self._parameter if self.module is None else self.module), self.name

    def describe(self, names: Names) -> str:
        if self.module is not None:
            return names.get(id(self.module), _ELSEWHERE)
        return names.get(id(self._parameter), "?").removesuffix(".weight")


def _whole(value: Tensor | None) -> Tensor | None:
    if type(value) is not nn.Parameter and hasattr(value, "device_mesh"):
        raise Unusable("a parameter is sharded while it is needed")
    return value


def evaluated(expression: Expression, like: Tensor) -> Tensor:
    """Mean and variance [2, C] of the activations that an expression describes, of the dtype of
    ``like``.

    Raises:
        Unusable: a parameter is not to be had.
    """
    before = [evaluated(source, like) for source in expression.sources]
    return expression.moments(before, expression.own(), like)


@dataclass(eq=False)
class Expression:
    """A node of the tree.

    Attributes:
        width: number of channels.
        sources: the nodes that it is made of.
        parameters, options: its own.
    """

    width: int
    sources: tuple[Expression, ...] = ()
    parameters: tuple[Held, ...] = ()
    options: tuple[Any, ...] = ()

    @property
    def source(self) -> Expression:
        """The only one."""
        return self.sources[0]

    def walk(self) -> Iterator[Expression]:
        yield self
        for part in self.sources:
            yield from part.walk()

    def held(self) -> Iterator[Held]:
        """The parameters in it, those of norm layers aside that it knows as modules."""
        for part in self.walk():
            yield from part.parameters

    def modules(self) -> Iterator[nn.Module]:
        """Those in it."""
        yield from (held.module for held in self.held() if held.module is not None)
        for part in self.walk():
            yield from (value for value in part.options if isinstance(value, nn.Module))

    def made_of(self) -> Iterator[Tensor]:
        """The tensors that the moments are computed from."""
        for part in self._owners:
            yield from (tensor for tensor in part.own() if tensor is not None)

    @cached_property
    def _owners(self) -> list[Expression]:
        return [part for part in self.walk() if part.own()]

    def own(self) -> Tensors:
        """The tensors of this node alone, as they are now.

        Raises:
            Unusable: a parameter is not to be had.
        """
        return tuple(held.now() for held in self.parameters)

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        """Mean and variance [2, C] of the activations here, of the dtype of ``like``, from those of
        the sources and the own tensors."""
        return before[0]

    def pull(
        self, d: Tensor, before: Moments, own: Tensors, like: Tensor
    ) -> Iterator[tuple[Expression | Tensor, Tensor]]:
        """From the gradient of the moments here, ``d`` [2, C], those of the sources' moments and of
        the own tensors."""
        count = len(before)
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (*before, *own)]
            here = self.moments(inputs[:count], tuple(inputs[count:]), like)
        yield from zip((*self.sources, *own), torch.autograd.grad(here, inputs, d), strict=True)

    def describe(self, names: Names) -> str:
        """As text."""
        return ", ".join(part.describe(names) for part in self.sources)


class NormOutput(Expression):
    """The output of a norm, N(bias, weight^2) for its affine parameters."""

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        weight, bias = own[:2]
        mean = like.new_zeros(self.width) if bias is None else bias.to(like.dtype)
        var = like.new_ones(self.width) if weight is None else weight.to(like.dtype).square()
        return torch.stack((mean, var * self.kept(own, like)))

    def by_weight(self, own: Tensors, like: Tensor) -> Tensor:
        """Derivative [C] of the variance by the weight, if there is one."""
        weight = like.new_ones(self.width) if own[0] is None else own[0].to(like.dtype)
        return 2.0 * weight * self.kept(own, like)

    def kept(self, own: Tensors, like: Tensor) -> Tensor | float:
        """What ``eps`` leaves of the variance."""
        return 1.0

    def describe(self, names: Names) -> str:
        return self.parameters[0].describe(names)


class Norm(NormOutput):
    """That of a KN or GKN layer, the only option."""

    @property
    def layer(self) -> nn.Module:
        return self.options[0]

    def own(self) -> Tensors:
        return _whole(self.layer.weight), _whole(self.layer.bias)

    def describe(self, names: Names) -> str:
        return names.get(id(self.layer), _ELSEWHERE)


class FrozenNorm(Norm):
    """That of a norm that is not trained and normalises by its running statistics, of an input that
    is distributed as they say. ``eps`` makes its variance smaller than weight^2, which matters in
    channels that are nearly constant."""

    def own(self) -> Tensors:
        return *super().own(), self.layer.running_var

    def kept(self, own: Tensors, like: Tensor) -> Tensor:
        var = own[2].to(like.dtype)
        return var / (var + self.layer.eps)


class Conv(Expression):
    """A convolution: its weight and, if it has one, its bias; the number of groups."""

    @property
    def weight(self) -> Held:
        return self.parameters[0]

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        weight, *bias = own
        return convolved(before[0], tap_sums(weight, like.dtype), *bias)

    def describe(self, names: Names) -> str:
        return f"{self.weight.describe(names)}({super().describe(names)})"


class Activation(Expression):
    """An activation function of :mod:`.propagation`: its name, and its own options."""

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        name, *options = self.options
        return torch.stack(activated(*before[0], name, options))

    def describe(self, names: Names) -> str:
        return f"{self.options[0].lower()}({super().describe(names)})"


class Sum(Expression):
    """Residual connections and the sums of an FPN: moments add."""

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        return before[0] + before[1]

    def describe(self, names: Names) -> str:
        return " + ".join(part.describe(names) for part in self.sources)


class Shifted(Expression):
    """A sum with a parameter per channel or for all of them, outside a norm layer."""

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        mean, var = before[0]
        return torch.stack((mean + own[0].to(mean.dtype).flatten(), var))


class Scaled(Expression):
    """A product with a number, or with such a parameter (detectron2's norms of several levels have
    theirs in common)."""

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        mean, var = before[0]
        factor = own[0].to(mean.dtype).flatten() if own else self.options[0]
        return torch.stack((mean * factor, var * factor**2))

    def describe(self, names: Names) -> str:
        source = super().describe(names)
        return f"{self.options[0]:g} ({source})" if self.options else source


class Mixture(Expression):
    """RoIs of several feature levels in one tensor: each level counts the same."""

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        means, variances = torch.stack(before, 1)
        return torch.stack(mixture(means, variances, means.new_full((), 1.0 / len(means))))

    def describe(self, names: Names) -> str:
        return f"mixture({super().describe(names)})"


class Concat(Expression):
    """Channels side by side."""

    def moments(self, before: Moments, own: Tensors, like: Tensor) -> Tensor:
        return torch.cat(before, 1)

    def describe(self, names: Names) -> str:
        return f"concat({super().describe(names)})"


class End(Expression):
    """Nothing is known: the layer that this precedes is the first of a chain."""

    @property
    def reason(self) -> str:
        return self.options[0]

    def describe(self, names: Names) -> str:
        return f"- ({self.reason})"
