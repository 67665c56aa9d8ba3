"""Predictions of a model's layers, what they have in common evaluated once a forward pass.

What precedes the layers of a model is made of the same norms, and of few kinds of activations.
:class:`Shared` evaluates all of it in one go: affine parameters side by side, then activations,
those that follow upon the same number of others together. That a pass is another one than the
latest shows in an optimiser's step, in parameters that changed, or in the first layer asking again.

Values are shared, graphs are not. Each layer's prediction has one node of its own
(:class:`_Predicted`), whose backward pass walks its expression in closed form; backward passes that
run one by one, recomputation in checkpoints, and DDP's buckets find what they would without.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import clock
from .expression import At, Expression, Held, Unusable
from .prediction import Activation, Conv, FrozenNorm, NormOutput
from .propagation import (
    activated_with_slopes,
    convolution_gradient,
    convolved,
    pulled_through,
    tap_sums,
)

State = list[tuple[Tensor, int, int]]


class _Layout:
    """Which parts of some expressions are equal, and which can be evaluated together."""

    def __init__(self, sources: list[Expression]) -> None:
        self.sources = sources
        self.same: dict[Expression, Expression] = {}  # each part's representative
        self.norms: list[NormOutput] = []
        self.levels: dict[tuple[Any, ...], list[Activation]] = {}  # by depth, operation, options
        self._known: dict[tuple[Any, ...], tuple[Expression, int]] = {}
        for source in sources:
            self._add(source)
        self.levels = dict(sorted(self.levels.items(), key=lambda item: item[0][0]))

    def _add(self, part: Expression) -> tuple[Expression, int]:
        added = [self._add(p) for p in part.parts()]
        own = (v for v in part._values() if not isinstance(v, Expression))
        key = (type(part), *(id(p) for p, _ in added), *map(_identity, own))
        if key not in self._known:
            depth = max((d for _, d in added), default=0) + isinstance(part, Activation)
            self._known[key] = part, depth
            if isinstance(part, Activation):
                self.levels.setdefault((depth, part.operation, part.options), []).append(part)
            elif isinstance(part, NormOutput) and not isinstance(part, FrozenNorm):
                self.norms.append(part)
        self.same[part] = self._known[key][0]
        return self._known[key]


def _identity(value: Any) -> Any:
    if isinstance(value, Held):
        return (id(value.module), value.name) if value.module is not None else id(value.now())
    return value if isinstance(value, (int, float, str)) or value is None else id(value)


class Shared(At):
    """Moments of expressions as they are now, and the derivatives of the activations in them.

    Args:
        made_of: the expressions, with the tensors that each is made of.
        like: a tensor of the dtype and device of the moments.
        layout: of an earlier pass.
    """

    def __init__(
        self, made_of: dict[Expression, list[Tensor]], like: Tensor, layout: _Layout | None
    ) -> None:
        super().__init__(like)
        sources = list(made_of)
        fits = layout is not None and len(layout.sources) == len(sources)
        if not (fits and all(a is b for a, b in zip(layout.sources, sources, strict=True))):
            layout = _Layout(sources)
        self.layout = layout
        self.clock = clock.now()
        self.first: weakref.ref[Any] | None = None
        self._own: dict[Expression, tuple[Tensor | None, ...]] = {}
        self._moments: dict[Expression, Tensor] = {}
        self._slopes: dict[Expression, Tensor] = {}
        self._made_of = {source: _state(tensors) for source, tensors in made_of.items()}
        # not in a caller's inference mode: a backward pass could not use its tensors
        with torch.inference_mode(False), torch.no_grad():
            self._evaluate()

    def _evaluate(self) -> None:
        norms = [n for n in self.layout.norms if all(t is not None for t in self.own(n))]
        if norms:
            pairs = zip(*map(self.own, norms), strict=True)
            weights, biases = (torch.cat(tensors).to(self.like.dtype) for tensors in pairs)
            self._keep(self._moments, norms, torch.stack((biases, weights.square())))
        for (_, operation, options), parts in self.layout.levels.items():
            before = [self(part.source) for part in parts]
            before = before[0] if len(before) == 1 else torch.cat(before, 1)
            moments, slopes = activated_with_slopes(before, operation, options)
            self._keep(self._moments, parts, moments)
            self._keep(self._slopes, parts, slopes)
        for source in self.layout.sources:
            self(source)

    def _keep(self, where: dict[Any, Tensor], parts: list[Any], values: Tensor) -> None:
        widths = [part.width for part in parts]
        where.update(zip(parts, values.split(widths, -1), strict=True))

    def __call__(self, expression: Expression) -> Tensor:
        expression = self.layout.same[expression]
        if expression not in self._moments:
            self._moments[expression] = expression.moments(self)
        return self._moments[expression]

    def own(self, expression: Expression) -> tuple[Tensor | None, ...]:
        expression = self.layout.same[expression]
        if expression not in self._own:
            self._own[expression] = expression.own()
        return self._own[expression]

    def is_past(self, layer: Any) -> bool:
        """Whether another forward pass runs when ``layer`` asks."""
        return self.clock != clock.now() or self.first() is layer

    def serves(self, layer: Any, source: Expression, like: Tensor) -> bool:
        """Whether these are the moments of ``source`` in the forward pass that runs."""
        return (
            not self.is_past(layer)
            and (self.like.dtype, self.like.device) == (like.dtype, like.device)
            and source in self._made_of
            and _equal(self._made_of[source], _state(source.made_of()))
        )

    def trained(self, source: Expression) -> Iterable[Tensor]:
        """The tensors that ``source`` is made of and that are trained."""
        return {id(t): t for t, *_ in self._made_of[source] if t.requires_grad}.values()

    def pull(self, source: Expression, d: Tensor) -> dict[Tensor, Tensor]:
        """Gradients of the parameters from that of the moments of ``source``, ``d`` [2, C]."""
        found: dict[Tensor, Tensor] = {}
        waiting: list[tuple[Expression | Tensor, Tensor]] = [(source, d)]
        while waiting:
            target, gradient = waiting.pop()
            if isinstance(target, Tensor):
                found[target] = found[target] + gradient if target in found else gradient
            elif isinstance(target, Activation):
                slopes = self._slopes[self.layout.same[target]]
                waiting.append((target.source, pulled_through(slopes, gradient)))
            else:
                waiting.extend(target.pull(gradient, self))
        return found


def _state(tensors: Iterable[Tensor]) -> State:
    # a tensor that is kept here does not give its id away
    return [(t, t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _equal(a: State, b: State) -> bool:
    return all(s[0] is t[0] and s[1:] == t[1:] for s, t in zip(a, b, strict=True))


def share(layers: Iterable[Any], first: Any, like: Tensor) -> Shared:
    """Evaluates for ``first`` and the other layers, which are ``Chained``; those whose parameters
    are not to be had, or on another device, are left out.

    Raises:
        Unusable: a parameter of ``first`` is not to be had.
    """
    sources = {}
    for layer in layers:
        chain = layer.chain
        if layer is first or isinstance(chain, Conv) and layer.training and layer.predicts:
            try:
                tensors = list(chain.source.made_of())
                if all(tensor.device == like.device for tensor in tensors):
                    sources[layer] = chain.source, tensors
            except Unusable:
                if layer is first:
                    raise
    latest = first._shared
    layout = None if latest is None else latest.layout
    shared = Shared(dict(sources.values()), like, layout)
    shared.first = weakref.ref(first)
    for layer in sources:
        layer.__dict__["_shared"] = shared
    return shared


def _apart(gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The same, no two of which are one memory (both norms of a sum have the same gradient by their
    biases): torch takes them for ``.grad`` as they are, and adds to them in place later."""
    taken = set()
    for target, gradient in gradients.items():
        place = gradient.untyped_storage()._cdata, gradient.storage_offset()
        gradients[target] = gradient.clone() if place in taken else gradient
        taken.add(place)
    return gradients


class _Predicted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shared: Shared, source: Expression, weight: Tensor, bias: Any, *others: Tensor
    ) -> Tensor:
        sums, pair = tap_sums(weight, shared.like.dtype), shared(source)
        ctx.shared, ctx.source, ctx.others = shared, source, others
        ctx.save_for_backward(weight, sums, pair)
        return convolved(pair, sums, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        weight, sums, pair = ctx.saved_tensors
        d_pair, d_weight = convolution_gradient(d, pair, weight, sums)
        found = ctx.shared.pull(ctx.source, d_pair) if ctx.others else {}
        found = _apart(found)
        d_bias = d[0] if ctx.needs_input_grad[3] else None
        return None, None, d_weight, d_bias, *(found.get(tensor) for tensor in ctx.others)


def predicted(shared: Shared, chain: Conv) -> Tensor:
    """Moments [2, C] of a convolution's output, with the gradients of all parameters in them."""
    weight, *bias = chain.own()
    others = shared.trained(chain.source)
    return _Predicted.apply(shared, chain.source, weight, *(bias or [None]), *others)
