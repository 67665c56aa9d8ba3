"""Predictions of a model's layers, what they have in common evaluated once a forward pass.

What precedes the layers of a model is made of the same norms, and of few kinds of activations and
convolutions. :class:`Shared` evaluates all of it in one go: affine parameters side by side, then
activations, those that follow upon the same number of others together, then convolutions, those of
one shape together. An optimiser's step, changed parameters, or the first layer asking again show
that another pass has begun.

Values are shared, graphs are not: each layer's prediction has one node of its own, with a backward
pass in closed form. Backward passes one by one, recomputation in checkpoints, and DDP's buckets
find what they would without. Between a convolution and the norms before it channels do not mix: the
derivatives of two moments by two parameters of a norm, 2x2 numbers a channel, are shared, too.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import clock
from .prediction import (
    Activation,
    Conv,
    Expression,
    FrozenNorm,
    NormOutput,
    Sum,
    Unusable,
)
from .propagation import activated_with_slopes, convolution_gradient, convolved, tap_sums


class _Layout:
    """Some expressions with equal parts made one, and which parts can be evaluated together."""

    def __init__(self, chains: list[Conv]) -> None:
        self.chains = chains
        self.norms: list[NormOutput] = []
        self.levels: dict[tuple[Any, ...], list[Activation]] = {}  # by depth and options
        self._known: dict[tuple[Any, ...], Expression] = {}
        self._depths: dict[Expression, int] = {}
        self.convs: dict[Conv, Conv] = {chain: self._unique(chain) for chain in chains}
        self.levels = dict(sorted(self.levels.items(), key=lambda item: item[0][0]))
        #: of what has a gradient: what its channels are made of one by one
        self.leaves: dict[Expression, list[Expression]] = {}
        for conv in self.convs.values():
            self._add_leaves(conv.source)

    def _unique(self, part: Expression) -> Expression:
        sources = tuple(map(self._unique, part.sources))
        own = (held.identity for held in part.parameters)
        key = (type(part), part.options, *map(id, sources), *own)
        if key not in self._known:
            self._known[key] = part = type(part)(part.width, sources, part.parameters, part.options)
            depth = max((self._depths[source] for source in sources), default=0)
            self._depths[part] = depth + isinstance(part, Activation)
            if isinstance(part, Activation):
                self.levels.setdefault((depth, *part.options), []).append(part)
            elif isinstance(part, NormOutput) and not isinstance(part, FrozenNorm):
                self.norms.append(part)
        return self._known[key]

    def _add_leaves(self, root: Expression) -> None:
        if root not in self.leaves:
            self.leaves[root] = list(_leaves(root))
            for leaf in self.leaves[root]:
                for source in leaf.sources:
                    self._add_leaves(source)


def _leaves(part: Expression) -> Iterator[Expression]:
    """Norms, and what mixes channels or has parameters of its own."""
    if isinstance(part, (Activation, Sum)):
        for source in part.sources:
            yield from _leaves(source)
    else:
        yield part


class Shared:
    """Moments of expressions as they are now, and their derivatives.

    Args:
        layers: ``Chained``. Those of them that predict take part, but for those whose parameters
            are not to be had, or on another device.
        first: the one that asked.
        like: a tensor of the dtype and device of the moments.

    Raises:
        Unusable: a parameter of ``first`` is not to be had.
    """

    def __init__(self, layers: Iterable[Any], first: Any, like: Tensor) -> None:
        self.like = like.detach().new_empty(0)
        latest = first._shared
        self._clock, self._first = clock.now(), weakref.ref(first)
        self._made_of: dict[Conv, list[Tensor]] = {}
        for layer in layers:
            chain = layer.chain
            if layer is first or isinstance(chain, Conv) and layer.training and layer.predicts:
                try:
                    tensors = list(chain.made_of())
                except Unusable:
                    if layer is first:
                        raise
                    continue
                if all(tensor.device == like.device for tensor in tensors):
                    self._made_of[chain] = tensors
                    layer.__dict__["_shared"] = self
        self._states = {chain: _state(tensors) for chain, tensors in self._made_of.items()}
        chains = list(self._made_of)  # equal only where they are the same
        known = latest is not None and latest.layout.chains == chains
        self.layout = latest.layout if known else _Layout(chains)
        self._own: dict[Expression, tuple[Tensor | None, ...]] = {}
        self._moments: dict[Expression, Tensor] = {}
        #: derivatives [2, 2, leaves, C] of an activation's moments by those of its leaves
        self._derivatives: dict[Expression, Tensor] = {}
        self._by_weight: dict[Expression, Tensor] = {}
        # not in a caller's inference mode: a backward pass could not use its tensors
        with torch.inference_mode(False), torch.no_grad():
            self._evaluate_norms()
            self._evaluate_activations()
            self._evaluate_convolutions()
            self._make_jacobians()

    def __call__(self, expression: Expression) -> Tensor:
        if expression not in self._moments:
            before = list(map(self, expression.sources))
            self._moments[expression] = expression.moments(before, self.own(expression), self.like)
        return self._moments[expression]

    def own(self, expression: Expression) -> tuple[Tensor | None, ...]:
        if expression not in self._own:
            self._own[expression] = expression.own()
        return self._own[expression]

    def _split(self, parts: list[Any], values: Tensor) -> dict[Any, Tensor]:
        values = values.split([part.width for part in parts], -1)
        return dict(zip(parts, values, strict=True))

    def _evaluate_norms(self) -> None:
        norms = [n for n in self.layout.norms if all(t is not None for t in self.own(n))]
        if norms:
            pairs = zip(*map(self.own, norms), strict=True)
            weights, biases = (torch.cat(tensors).to(self.like.dtype) for tensors in pairs)
            self._moments.update(self._split(norms, torch.stack((biases, weights.square()))))
            self._by_weight.update(self._split(norms, 2.0 * weights))

    def _evaluate_activations(self) -> None:
        for (_, operation, *options), parts in self.layout.levels.items():
            before = _side_by_side([self(part.source) for part in parts])
            moments, slopes = activated_with_slopes(before, operation, options)
            self._moments.update(self._split(parts, moments))
            for part, outer in self._split(parts, slopes.unsqueeze(2)).items():
                if isinstance(part.source, (Activation, Sum)):  # the chain rule
                    inner = torch.cat(self._by_leaf(part.source), 2)
                    outer = (outer.unsqueeze(2) * inner).sum(1)
                self._derivatives[part] = outer

    def _by_leaf(self, part: Expression) -> list[Tensor]:
        if isinstance(part, Sum):
            return [d for inner in part.sources for d in self._by_leaf(inner)]
        if part in self._derivatives:
            return [self._derivatives[part]]
        itself = torch.eye(2, dtype=self.like.dtype, device=self.like.device)
        return [itself[..., None, None].expand(2, 2, 1, part.width)]

    def _evaluate_convolutions(self) -> None:
        """Those before norms; of one shape together."""
        alike = defaultdict(list)
        for conv in dict.fromkeys(self.layout.convs.values()):
            weight, *bias = self.own(conv)
            alike[weight.shape, conv.options, len(bias)].append(conv)
        self.predictions: dict[Conv, tuple[Tensor, Tensor, Tensor]] = {}
        for convs in alike.values():
            weights, *biases = map(_stacked, zip(*map(self.own, convs), strict=True))
            sums = tap_sums(weights, self.like.dtype)
            pairs = _stacked([self(conv.source) for conv in convs])
            moments = convolved(pairs, sums, *biases)
            for i, conv in enumerate(convs):
                self.predictions[conv] = pairs[i], sums[i], moments[i]

    def _make_jacobians(self) -> None:
        """Of the moments of what has a gradient: by bias and weight of each norm in it, and by the
        moments of other leaves, [2, 2, leaves, C]."""
        roots = self.layout.leaves
        jacobians = torch.cat([d.flatten(2) for root in roots for d in self._by_leaf(root)], -1)
        factors = [self._factor(leaf) for leaves in roots.values() for leaf in leaves]
        jacobians[:, 1].mul_(_side_by_side(factors))
        parts = jacobians.split([len(of) * root.width for root, of in roots.items()], -1)
        self._jacobians = {
            root: part.unflatten(-1, (-1, root.width))
            for root, part in zip(roots, parts, strict=True)
        }

    def _factor(self, leaf: Expression) -> Tensor:
        """Derivative [C] of a norm's variance by its weight, 1 for other leaves."""
        if leaf in self._by_weight:
            return self._by_weight[leaf]
        if isinstance(leaf, NormOutput):
            return leaf.by_weight(self.own(leaf), self.like)
        return self.like.new_ones(leaf.width)

    # ---- for layers ----

    def is_past(self, layer: Any) -> bool:
        """Whether another forward pass runs when ``layer`` asks."""
        return self._clock != clock.now() or self._first() is layer

    def serves(self, layer: Any, chain: Conv, like: Tensor) -> bool:
        """Whether what is here of ``chain`` is of the forward pass that runs."""
        return (
            not self.is_past(layer)
            and (self.like.dtype, self.like.device) == (like.dtype, like.device)
            and chain in self._made_of
            and self._states[chain] == _state(chain.made_of())
        )

    def predict(self, chain: Conv) -> Tensor:
        """The moments [2, C_out] of a convolution's output, with the gradients of all parameters
        in them."""
        trained = {id(t): t for t in self._made_of[chain] if t.requires_grad}
        return _Predicted.apply(self, self.layout.convs[chain], *trained.values())

    def pull(self, conv: Conv, weight: Tensor, d: Tensor) -> dict[Tensor, Tensor]:
        """Gradients of the parameters from that of the moments after ``conv``, ``d`` [2, C]; no
        two in one memory, as torch takes them for ``.grad`` as they are, and later adds to them."""
        before, sums, _ = self.predictions[conv]
        d_before, d_weight = convolution_gradient(d, before, weight, sums)
        found: dict[Tensor, Tensor] = {}
        weight, *bias = self.own(conv)
        waiting = [(conv.source, d_before), (weight, d_weight), *((b, d[0]) for b in bias)]
        while waiting:
            target, d = waiting.pop()
            if isinstance(target, Tensor):
                found[target] = found[target] + d if target in found else d
                continue
            by_leaf = (self._jacobians[target] * d[:, None, None]).sum(0).unbind(1)
            for leaf, d in zip(self.layout.leaves[target], by_leaf, strict=True):
                own = self.own(leaf)
                if isinstance(leaf, NormOutput):
                    pairs = zip(own[:2], (d[1], d[0]), strict=True)
                    waiting.extend(pair for pair in pairs if pair[0] is not None)
                else:
                    waiting.extend(leaf.pull(d, list(map(self, leaf.sources)), own, self.like))
        return found


class _Predicted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Shared, conv: Conv, *trained: Tensor) -> Tensor:
        ctx.shared, ctx.conv, ctx.trained = shared, conv, trained
        ctx.save_for_backward(shared.own(conv)[0])
        return shared.predictions[conv][2].detach()  # a tensor of this call's own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.shared.pull(ctx.conv, *ctx.saved_tensors, d)
        return None, None, *(found[tensor] for tensor in ctx.trained)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _state(tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
