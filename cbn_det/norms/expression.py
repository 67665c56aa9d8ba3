"""Expressions of what a norm's input is made of: small trees of references and operations, no
values. :class:`At` evaluates them; :mod:`.prediction` has the kinds of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


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
        return whole(value)

    def describe(self, names: dict[int, str]) -> str:
        if self.module is not None:
            return names.get(id(self.module), "(outside this model)")
        return names.get(id(self._parameter), "?").removesuffix(".weight")


def whole(value: Tensor | None) -> Tensor | None:
    if type(value) is not nn.Parameter and hasattr(value, "device_mesh"):
        raise Unusable("a parameter is sharded while it is needed")
    return value


class Expression:
    """A node of the tree; subclasses hold references to layers, parameters and other nodes."""

    #: whether it may have tensors of its own
    owns = True

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
        return [part for part in self.walk() if part.owns]

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
