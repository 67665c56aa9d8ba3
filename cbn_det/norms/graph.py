"""What precedes a norm, read off the autograd graph of its input.

:func:`follow` walks ``grad_fn`` from a norm's input and gives an
:class:`~.prediction.Expression`. The rules:

- the norm's own convolution, and convolutions without a norm on the way: moments go through their
  weight, which must be a plain parameter that is trained;
- activations of a Gaussian: :mod:`.propagation` has them; any other ends the chain;
- sums of two branches (residual connections, FPN): moments add;
- concatenation of channels: side by side;
- a number that multiplies or divides: scaled moments;
- pooling, RoIAlign, nearest and bilinear upsampling, padding, dropout and drop path, clones and
  casts: moments stay as they are. Dropout and drop path are told by the mask that multiplies: zeros
  and one number above 1, for each sample its own. A mask that a non-re-entrant activation
  checkpoint stores cannot be looked at, and ends the chain;
- RoIs taken from several feature levels: an equal mixture;
- KN and GKN layers are where predictions start from; other norm layers with trained affine
  parameters likewise, as N(beta, gamma^2).

Everything else ends the chain: inputs of the model, frozen and compiled parts (unless
:func:`~.trace.find_chain` looks through them), segments of a re-entrant activation checkpoint,
blocks of ``fully_shard``, parameters of modules none of which is running (a script that calls each
layer itself), unknown operations, and what these rules take for something it is not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import prediction as nodes
from .conv_call import past_hooks, saved
from .prediction import End, Expression, Held, NormOutput, Unusable
from .propagation import ACTIVATIONS

_MARK = "cbn_det norm"

_KEEPS = {
    "MaxPool2DWithIndices",
    "AvgPool2D",
    "UpsampleNearest2D",
    "UpsampleBilinear2D",
    "ToCopy",
    "Clone",
    "NativeDropout",
    "_ScaleGradientBackward",  # of detectron2's cascade heads; forward it is the identity
}
#: norm layers with the edges (input, weight, bias, ...)
_OTHER_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm"}
_LONGEST = 500  # operations in a chain; one that joins and parts again and again has no end

FROZEN_INPUT = "a model input, or frozen"
NO_STATISTICS = "a frozen norm without statistics"
COMPILED = "compiled before it could be followed"
_ENDS = {
    "CompiledFunctionBackward": COMPILED,
    "RegisterPostBackwardFunctionBackward": "the border of a block of fully_shard",
    "torch::autograd::AccumulateGrad": "a model input, or the border of a checkpointed segment",
}


class _ChainEnds(Exception):
    """Carries the reason."""


def mark(output: Tensor, layer: nn.Module, frozen: bool = False) -> None:
    """Lets :func:`follow` recognise ``output`` as that of ``layer``, a norm."""
    if not torch.compiler.is_compiling() and output.grad_fn is not None:
        output.grad_fn.metadata[_MARK] = layer, frozen


def follow(y: Tensor, channels: int) -> Expression:
    """What makes the input ``y`` [N, channels, H, W] of a norm: its convolution, and what comes
    before that as far as it can be told; an :class:`~.prediction.End` where it cannot."""
    try:
        return _Walk().from_norm(y, channels)
    except (_ChainEnds, Unusable) as end:
        reason = str(end)
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        # other versions and other people's operations have graphs of other shapes
        reason = f"a graph that the rules do not fit: {type(error).__name__}: {error}"
    return End(0, options=(reason,))


def _operation(node: Any) -> str:
    """``"Relu"`` of a ``ReluBackward0``; a Function written in Python, which may do anything, keeps
    its ``Backward``."""
    return re.sub(r"Backward\d+$", "", node.name())


def _edges(node: Any) -> list[Any]:
    return [past_hooks(*edge) for edge in node.next_functions]


class _Walk:
    """One walk through a graph."""

    def __init__(self) -> None:
        self._length = 0

    def from_norm(self, y: Tensor, channels: int) -> Expression:
        if y.grad_fn is None:
            raise _ChainEnds("its convolution is frozen")
        node = past_hooks(y.grad_fn, y.output_nr)
        while _operation(node) in ("ToCopy", "Clone") and _edges(node)[0] is not None:
            node = _edges(node)[0]
        if _operation(node) not in ("Convolution", "CompiledFunctionBackward"):
            raise _ChainEnds(f"fed by {_operation(node)}, not by a convolution")
        found = self._expression(node)
        _check(found.width == channels)
        return found

    def _expression(self, node: Any) -> Expression:
        self._length += 1
        if self._length > _LONGEST:
            raise _ChainEnds(f"more than {_LONGEST} operations without a norm")
        if node is None:
            raise _ChainEnds(FROZEN_INPUT)
        if _MARK in node.metadata:
            layer, frozen = node.metadata[_MARK]
            if not frozen:
                return nodes.Norm(layer.channels, options=(layer,))
            mean, var = layer.running_mean, layer.running_var
            if not mean.any() and (var == var[0]).all():
                raise _ChainEnds(NO_STATISTICS)
            return nodes.FrozenNorm(len(mean), options=(layer,))
        operation = _operation(node)
        edges = _edges(node)
        if operation in _KEEPS or "roi_align" in node.name().lower():
            return self._expression(edges[0])
        if operation == "ConstantPadNd" and not any(node._saved_pad[4:]):
            return self._expression(edges[0])  # as a convolution's own padding: not looked at
        if operation in ACTIVATIONS:
            options = (getattr(node, f"_saved_{key}") for key in ACTIVATIONS[operation])
            return _over(
                nodes.Activation, self._expression(edges[0]), options=(operation, *options)
            )
        if operation == "Add" and node._saved_alpha == 1:
            return self._either(edges, False)
        if operation == "Mul" and None not in edges:
            return self._either(edges, True)
        if operation in ("Mul", "Div"):
            return self._multiplied(node, edges)
        if operation == "Convolution" and not node._saved_transposed:
            return self._convolution(node, edges)
        if operation in _OTHER_NORMS:
            return self._other_norm(edges[1:3])
        if operation == "_NormalizeBackward":  # of a norm of ours that predicts nothing
            return self._other_norm(edges[3:5])
        if operation == "Cat" and node._saved_dim in (1, 2**64 - 3):
            sources = tuple(self._expression(edge) for edge in edges)
            return nodes.Concat(sum(source.width for source in sources), sources)
        if operation == "IndexPut":
            return _over(nodes.Mixture, *self._levels(node))
        raise _ChainEnds(_ENDS.get(operation, f"no rule for {operation}"))

    def _convolution(self, node: Any, edges: list[Any]) -> Expression:
        weight, bias = (self._parameter(edge) for edge in edges[1:3])
        if weight is None or weight.dim() != 4:
            raise _ChainEnds("a convolution whose weight is frozen or computed")
        if bias is None and edges[2] is not None:
            raise _ChainEnds("a convolution whose bias is computed")
        source = self._expression(edges[0])
        groups = node._saved_groups
        _check(source.width == weight.shape[1] * groups)
        held = tuple(self._held(p) for p in (weight, bias) if p is not None)
        return nodes.Conv(len(weight), (source,), held, (groups,))

    def _levels(self, node: Any) -> Iterator[Expression]:
        """The feature levels whose RoIs were put into one tensor, one after another."""
        before, *_, values = _edges(node)
        if before is not None and _operation(before) == "IndexPut":
            yield from self._levels(before)
        elif before is not None:
            raise _ChainEnds("no rule for IndexPut into activations")
        yield self._expression(values)

    def _either(self, edges: list[Any], multiplies: bool) -> Expression:
        """A sum of branches, or a sum or product of one and a parameter per channel."""
        left, right = edges
        for edge, other in ((left, right), (right, left)):
            parameter = self._parameter(edge, of_any_shape=True)
            if parameter is not None:
                source = self._expression(other)
                _check(parameter.numel() in (1, source.width))
                kind = nodes.Scaled if multiplies else nodes.Shifted
                return _over(kind, source, parameters=(self._held(parameter),))
        if multiplies:
            raise _ChainEnds("no rule for a product of activations")
        for edge, other in ((left, right), (right, left)):
            if _is_nothing(edge):
                return self._expression(other)
        return _over(nodes.Sum, self._expression(left), self._expression(right))

    def _multiplied(self, node: Any, edges: list[Any]) -> Expression:
        """A product with, or quotient by, a number or a mask of mean 1."""
        factor, source = _constant_factor(node, edges)
        if _is_mask(factor, node):
            return self._expression(source)
        before = _edges(source) if source and _operation(source) in ("Mul", "Div") else ()
        if None in before:  # drop path in two steps: x / keep * mask
            inner, first = _constant_factor(source, before)
            if not _is_mask(inner, node) and _is_mask(factor * inner, node):
                return self._expression(first)
        if factor.numel() == 1 and factor != 0:
            number = float(factor)
            return _over(nodes.Scaled, self._expression(source), options=(number,))
        raise _ChainEnds("a product with a tensor that is no mask of dropout")

    def _other_norm(self, edges: list[Any]) -> Expression:
        weight, bias = (self._parameter(edge) for edge in edges)
        if weight is None or bias is None:
            raise _ChainEnds("a norm without trained affine parameters")
        return NormOutput(len(weight), parameters=(self._held(weight), self._held(bias)))

    @staticmethod
    def _parameter(node: Any, of_any_shape: bool = False) -> Tensor | None:
        """The parameter behind an edge, None if there is none; casts of autocast lie between."""
        passed = ("ToCopy", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Expand")
        while node is not None and _operation(node) in passed[: None if of_any_shape else 1]:
            node = node.next_functions[0][0]
        variable = getattr(node, "variable", None)
        return variable if isinstance(variable, nn.Parameter) else None

    def _held(self, parameter: Tensor) -> Held:
        return Held(parameter, *self._owners.get(id(parameter), (None,)))

    @cached_property
    def _owners(self) -> dict[int, tuple[nn.Module, str]]:
        """By their ids, which module holds a parameter, and under which name: of the modules whose
        methods are running, and of all below them. (A graph tells parameters, and parameters don't
        tell who holds them.)"""
        found: dict[int, tuple[nn.Module, str]] = {}
        for module in dict.fromkeys(m for running in running_modules() for m in running.modules()):
            for name, parameter in module._parameters.items():
                found.setdefault(id(parameter), (module, name))
        return found


def _over(kind: type[Expression], *sources: Expression, **values: Any) -> Expression:
    """A node that leaves channels as they are."""
    width = sources[0].width
    _check(all(source.width == width for source in sources))
    return kind(width, sources, **values)


def _check(fits: bool) -> None:
    if not fits:
        raise _ChainEnds("channels are regrouped on the way")


def running_modules() -> Iterator[nn.Module]:
    """Those whose methods are running in this thread, the outermost last."""
    frame = sys._getframe()
    while frame is not None:
        # of methods only: a frame that was asked keeps what its locals were then alive
        if frame.f_code.co_varnames[:1] == ("self",):
            running = frame.f_locals.get("self")
            if isinstance(running, nn.Module):
                yield running
        frame = frame.f_back


def _constant_factor(node: Any, edges: list[Any]) -> tuple[Tensor, Any]:
    """What has no gradient in a product or quotient, as a factor, and the edge of what has."""
    left, right = edges
    divides = _operation(node) == "Div"
    if right is not None and (divides or left is not None):
        raise _ChainEnds("no rule for a quotient or product of activations")
    factor = saved(node, "other" if right is None else "self")
    if factor is None:
        raise _ChainEnds("a product with a tensor that was changed since, or is checkpointed")
    return (1.0 / factor if divides else factor), left if right is None else right


def _is_nothing(node: Any) -> bool:
    """Whether an edge is ``x.sum() * 0``, which keeps unused parameters in a graph."""
    if node is None or _operation(node) != "Mul" or node._input_metadata[0].shape:
        return False
    edges = _edges(node)
    return None in edges and not bool(_constant_factor(node, edges)[0].any())


def _is_mask(factor: Tensor, node: Any) -> bool:
    """Whether a factor of ``node`` is a mask of dropout or drop path: of each sample its own, zeros
    and one number above 1. (Of a single sample that number may be all there is, and one sample may
    be all of them.)"""
    if factor.dim() != 4 or len(factor) != node._input_metadata[0].shape[0]:
        return False
    kept = factor[factor != 0]
    return len(kept) == 0 or bool(kept[0] > 1) and bool((kept == kept[0]).all())
