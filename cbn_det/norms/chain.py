"""Which norms precede a norm: what Kalman Normalization predicts a layer's statistics from.

Found by walking ``grad_fn`` from a norm's input, once, and kept as an
:class:`~.prediction.Expression`. The rules:

- the norm's own convolution, and convolutions without a norm on the way: moments go through their
  weight, which must be a plain parameter that is trained;
- ReLU: rectified moments; any other activation ends the chain;
- sums of two branches (residual connections, FPN): moments add;
- concatenation of channels: side by side;
- a number that multiplies or divides: scaled moments;
- max and average pooling, nearest and bilinear upsampling, dropout and drop path, clones and casts:
  moments stay as they are. Dropout and drop path are told by the mask that multiplies: zeros and
  one number above 1, for each sample its own. A mask that a non-re-entrant activation checkpoint
  stores cannot be looked at, and ends the chain;
- RoIAlign: they stay, and RoIs taken from several feature levels are an equal mixture of them;
- KN and GKN layers are where predictions start from; other norm layers with trained affine
  parameters likewise, as N(beta, gamma^2).

Parts of a model that are called one by one, in evaluation, without the whole end chains at their
borders, which are looked through when the whole is called.

Frozen parts have no ``grad_fn``. Before the first training forward of a model that has any, one
forward in evaluation mode is traced in which all parameters take part (:func:`find_chain`), so that
what is frozen is followed like the rest. The norms in it that normalise by running statistics and
are not trained (detectron2's and torchvision's FrozenBatchNorm2d, ``nn.BatchNorm2d`` in evaluation)
are where predictions start from: they put out N(bias, weight^2), as far as their input is
distributed as their statistics say. Those that never gathered any (mean 0 and variance 1
everywhere, as in untrained models and in weights into which statistics were folded) do not know,
and end the chain. Where that forward fails there is a warning, and frozen parts end the chain; so
they do for layers that it does not reach.

What torch.compile made has no graph of single operations. A compiled model, and one with compiled
parts, is traced like one with frozen parts, as it was written. Where no module's call tells that
something was compiled (``torch.compile`` of a function), there is a warning, and layers are
BatchNorm or GroupNorm until :func:`find_chain` was called.

Everything else ends the chain: inputs of the model, segments of a re-entrant activation checkpoint,
multiplications of two activations or by other masks, unknown operations. A layer behind such an end
is the first of a chain and takes the statistics of the mini-batch as they are.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from . import clock
from .base import in_backward
from .binding import past_hooks
from .prediction import (
    Affine,
    Concat,
    Constant,
    Conv,
    End,
    Expression,
    FrozenNorm,
    Mixture,
    Norm,
    OtherNorm,
    Pair,
    Pooled,
    Relu,
    Scaled,
    Sum,
)

_MARK = "cbn_det norm"
_HANDED = "cbn_det handed on"

_KEEPS = {
    "MaxPool2DWithIndices",
    "AvgPool2D",
    "UpsampleNearest2D",
    "UpsampleBilinear2D",
    "ToCopy",
    "Clone",
    "NativeDropout",
    "_ScaleGradient",  # of detectron2's cascade heads; forward it is the identity
}
#: norm layers with the edges (input, weight, bias, ...)
_OTHER_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm"}


_NO_STATISTICS = "a frozen norm without statistics"
_COMPILED = "compiled before it could be followed"


class _ChainEnds(Exception):
    """Carries the reason."""


def mark(output: Tensor, layer: nn.Module, handed: Pair | None = None) -> None:
    """Lets :func:`follow` recognise ``output`` as that of ``layer``, and :func:`handed_before` find
    what the layer handed on with it."""
    if not torch.compiler.is_compiling() and output.grad_fn is not None:
        output.grad_fn.metadata[_MARK] = layer
        output.grad_fn.metadata[_HANDED] = handed


def handed_before(y: Tensor) -> dict[nn.Module, Pair]:
    """What the layers that ``y`` follows handed on in the forward that made it, as far as its graph
    reaches."""
    found, seen, nodes = {}, set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        layer, handed = (node.metadata.get(key) for key in (_MARK, _HANDED))
        if layer is None:
            nodes += [edge[0] for edge in node.next_functions]
        elif handed is not None:
            found[layer] = handed
    return found


def follow(y: Tensor, channels: int) -> Expression:
    """What makes the input ``y`` [N, channels, H, W] of a norm: its convolution, and what comes
    before that as far as it can be told; an :class:`~.prediction.End` where it cannot."""
    try:
        if y.grad_fn is None:
            raise _ChainEnds("its convolution is frozen")
        node = past_hooks(y.grad_fn, y.output_nr)
        while _operation(node) in ("ToCopy", "Clone") and _edges(node)[0] is not None:
            node = _edges(node)[0]
        if _operation(node) not in ("Convolution", "CompiledFunction"):
            raise _ChainEnds(f"fed by {_operation(node)}, not by a convolution")
        found = _expression(node)
        if found.width != channels:
            raise _ChainEnds("channels are regrouped on the way")
        return found
    except _ChainEnds as end:
        return End(str(end))


def _operation(node: Any) -> str:
    """``"Relu"`` of a ``ReluBackward0``."""
    return re.sub(r"Backward\d*$", "", node.name())


def _edges(node: Any) -> list[Any]:
    return [past_hooks(*edge) for edge in node.next_functions]


def _expression(node: Any) -> Expression:
    if node is None:
        raise _ChainEnds("a model input, or frozen")
    layer = node.metadata.get(_MARK)
    if layer in _thread.frozen_norms:
        if _without_statistics(layer):
            raise _ChainEnds(_NO_STATISTICS)
        return FrozenNorm(layer)
    if layer is not None:
        return Norm(layer)
    operation = _operation(node)
    edges = _edges(node)
    if operation in _KEEPS:
        return _expression(edges[0])
    if operation == "Relu":
        return Relu(_expression(edges[0]))
    if operation == "Add" and node._saved_alpha == 1:
        return _either(edges, False)
    if operation == "Mul" and None not in edges:
        return _either(edges, True)
    if operation in ("Mul", "Div"):
        return _multiplied(node)
    if operation == "Convolution" and not node._saved_transposed:
        weight = _parameter(edges[1])
        if weight is None or weight.dim() != 4:
            raise _ChainEnds("a convolution whose weight is frozen or computed")
        bias = _parameter(edges[2])
        if bias is None and edges[2] is not None:
            raise _ChainEnds("a convolution whose bias is computed")
        return Conv(_expression(edges[0]), weight, bias, node._saved_groups)
    if operation in _OTHER_NORMS:
        return _other_norm(edges[1:3])
    if operation == "_Normalize":  # of a norm of ours that predicts nothing
        return _other_norm([_without_correction(edge) for edge in edges[3:5]])
    if operation == "Cat" and node._saved_dim in (1, 2**64 - 3):
        return Concat(tuple(_expression(edge) for edge in edges))
    if "roi_align" in node.name().lower():
        return Pooled(_expression(edges[0]))
    if operation == "IndexPut":
        return Mixture(tuple(_levels(node)))
    if operation == "torch::autograd::AccumulateGrad":
        raise _ChainEnds("a model input, or the border of a checkpointed segment")
    raise _ChainEnds(_COMPILED if operation == "CompiledFunction" else f"no rule for {operation}")


def _levels(node: Any) -> Iterator[Expression]:
    """The feature levels whose RoIs were put into one tensor, one after another."""
    before, *_, values = _edges(node)
    if before is not None and _operation(before) == "IndexPut":
        yield from _levels(before)
    elif before is not None:
        raise _ChainEnds("no rule for IndexPut into activations")
    yield _expression(values)


def _either(edges: list[Any], multiplies: bool) -> Expression:
    """A sum of branches, or a sum or product of one and a parameter per channel."""
    parameters = [_parameter(edge, of_any_shape=True) for edge in edges]
    for k, parameter in enumerate(parameters):
        if parameter is not None:
            return Affine(_expression(edges[1 - k]), parameter, multiplies)
    if multiplies:
        raise _ChainEnds("no rule for a product of activations")
    return Sum(_expression(edges[0]), _expression(edges[1]))


def _multiplied(node: Any) -> Expression:
    """A product with a number, or with a mask of mean 1."""
    factor, source = _constant_factor(node)
    samples = _samples(node)
    if _is_mask(factor, samples):
        return _expression(source)
    if source is not None and _operation(source) in ("Mul", "Div"):
        if None in _edges(source):  # drop path in two steps: x / keep * mask
            inner, before = _constant_factor(source)
            if not _is_mask(inner, samples) and _is_mask(factor * inner, samples):
                return _expression(before)
    if factor.numel() == 1 and factor != 0:
        return Scaled(_expression(source), float(factor))
    raise _ChainEnds("a product with a tensor that is no mask of dropout")


def _constant_factor(node: Any) -> tuple[Tensor, Any]:
    """What has no gradient in a product or quotient, as a factor, and the edge of what has."""
    divides = _operation(node) == "Div"
    left, right = _edges(node)
    if right is not None and (divides or left is not None):
        raise _ChainEnds("no rule for a quotient or product of activations")
    name = "other" if right is None else "self"
    # a checkpoint would run its segment again to show it
    if getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", None) is not None:
        raise _ChainEnds("a product with a tensor in a checkpointed segment")
    try:
        factor = getattr(node, f"_saved_{name}")
    except RuntimeError as error:
        raise _ChainEnds("a product with a tensor that was changed since, or released") from error
    return (1.0 / factor if divides else factor), left if right is None else right


def _samples(node: Any) -> int | None:
    """How many the output of an operation has; None where this version of torch does not say."""
    metadata = getattr(node, "_input_metadata", None)
    return metadata[0].shape[0] if metadata else None


def _is_mask(factor: Tensor, samples: int | None) -> bool:
    """Whether it is one of dropout or drop path: of each sample its own, zeros and one number above
    1. (Of a single sample that number may be all there is, and one sample may be all of them.)"""
    if factor.dim() != 4 or len(factor) != (samples or len(factor)):
        return False
    kept = factor[factor != 0]
    return len(kept) == 0 or bool(kept[0] > 1) and bool((kept == kept[0]).all())


def _without_correction(node: Any) -> Any:
    """The edge of a weight or bias, before an estimate's scale and shift were taken into it (Batch
    Renormalization's, which on average change nothing)."""
    if node is not None and _operation(node) in ("Add", "Mul"):
        return node.next_functions[0][0]
    return node


def _other_norm(edges: list[Any]) -> Expression:
    weight, bias = (_parameter(edge) for edge in edges)
    if weight is None or bias is None:
        raise _ChainEnds("a norm without trained affine parameters")
    return OtherNorm(weight, bias)


def _parameter(node: Any, of_any_shape: bool = False) -> Tensor | None:
    """The parameter behind an edge, None if there is none; casts of autocast lie between."""
    passed = ("ToCopy", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Expand")
    while node is not None and _operation(node) in passed[: None if of_any_shape else 1]:
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    return variable if isinstance(variable, nn.Parameter) else None


# ---- replaced modules and parameters ---------------------------------------------------------

_revision = 0  # counts what was put in the place of others: chains found before may be out of date
_watching = False


def _on_registration(parent: nn.Module, name: str, new: nn.Module | Tensor | None) -> None:
    global _revision
    replaced = parent._modules.get(name, parent._parameters.get(name))
    if replaced is not None and replaced is not new:
        _revision += 1


def watch() -> None:
    """Starts watching, in this process, for replaced modules and parameters, and for forwards of
    models with layers that do not know what precedes them; calling it again does nothing."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_on_registration)
        register_module_parameter_registration_hook(_on_registration)
        register_module_forward_pre_hook(_before_forward)
        register_module_forward_hook(_after_forward, always_call=True)
        _watching = True


# ---- layers ----------------------------------------------------------------------------------


class Chained:
    """Mixin of a norm (an ``nn.Module``) that knows what precedes it.

    The expression lives in ``__dict__`` and refers to layers and parameters; deepcopy and pickling
    carry it over, and the copy looks anew where it can. It is found in the first forward with a
    graph, and again after modules were replaced (``freeze()``, say) or other parameters assigned.
    """

    training: bool
    _chain: Expression | None
    _chain_revision: int
    _chain_unsure: bool  # copied or moved: look anew as soon as there is a graph
    _chain_from: int | None  # found inside a backward pass: not before the clock has moved on
    _chain_traced: int | None  # the revision for which a forward was traced through frozen parts
    _chain_within: int | None  # how many modules the traced model had, if that was the latest look
    _constant: Constant | None  # what is predicted from frozen parts, computed once
    handed: Pair | None

    def _start_chain(self) -> None:
        self.__dict__.update(
            _chain=None,
            _chain_revision=_revision,
            _chain_unsure=False,
            _chain_from=None,
            _chain_traced=None,
            _chain_within=None,
            _constant=None,
        )
        self.handed = None
        watch()

    @property
    def channels(self) -> int:
        raise NotImplementedError

    @property
    def predicts(self) -> bool:
        """Whether the layer needs to know what precedes it."""
        return True

    @property
    def predicts_in_evaluation(self) -> bool:
        """Whether it does in evaluation, too."""
        return False

    @property
    def chain(self) -> Expression | None:
        """What precedes this layer; None while that is unknown."""
        return self._chain if self._chain_revision == _revision else None

    def forget_chain(self) -> None:
        """Has the layer look anew, at its next forward with a graph."""
        self.__dict__.update(_chain=None, _chain_from=None, _chain_traced=None)

    def _find_chain(self, y: Tensor) -> Expression | None:
        """What precedes this layer, for its input ``y``; None where nothing is to be predicted."""
        if not torch.compiler.is_compiling():
            self._look_for_chain(y)
            if self._chain_from is not None and self._chain_from == clock.now():
                return None
        elif self.chain is None:
            _warn_of_compilation()
        chain = self.chain
        return None if isinstance(chain, End) else chain

    def _look_for_chain(self, y: Tensor) -> None:
        known = self.chain
        again = recomputing()
        if known is not None and (again or not (self._chain_unsure or _may_go_on(known, y))):
            return
        if not torch.is_grad_enabled():
            return
        found = follow(y, self.channels)
        if isinstance(found, End) and isinstance(known, End) and self._traced and not tracing():
            return  # the tracing forward saw more
        if isinstance(found, End) and found.reason == _COMPILED and known is None:
            _warn_of_compilation()
        self.__dict__.update(
            _chain=found,
            _chain_revision=_revision,
            _chain_unsure=False,
            _chain_within=None,
            # the forward that this one recomputes knew nothing, and both must give the same
            _chain_from=clock.now() if again else None,
        )

    @property
    def _traced(self) -> bool:
        """Whether the modules are those through which a forward was traced."""
        return self._chain_traced == _revision and not self._chain_unsure

    def _may_go_on_outside(self, modules: int) -> bool:
        """Whether a chain ended in a part, traced alone, of a model of so many modules."""
        within = self._chain_within
        return isinstance(self.chain, End) and within is not None and within < modules

    # ---- what the previous layers know, handed on within a forward ----

    def hands_on(self) -> Pair | None:
        """Mean and variance of this layer's input, as it estimated them in the latest forward."""
        return self.handed

    def _hand_on(self, handed: Pair | None, output: Tensor) -> None:
        """Keeps this layer's estimate for those that follow: with the graph of ``output``, and as
        the latest, until the backward pass has come back to ``output`` (which the estimate's graph
        must not outlive)."""
        mark(output, self, handed)
        if handed is None:
            return
        self.handed = handed
        if output.grad_fn is not None and handed[0].requires_grad:
            output.grad_fn.register_prehook(self._release)

    def _release(self, grads: tuple[Tensor, ...]) -> None:
        if self.handed is not None:
            self.handed = tuple(value.detach() for value in self.handed)

    # ---- copies ----

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)
        state = dict(inherited() if inherited else self.__dict__)
        handed = None if self.handed is None else tuple(v.detach() for v in self.handed)
        return state | {
            "_chain": self.chain,
            "_chain_unsure": self.chain is not None,
            "_chain_from": None,
            "_chain_traced": None,
            "_constant": None,
            "handed": handed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_chain_revision"] = _revision
        watch()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        # new parameters in some modes
        self.__dict__.update(_chain_unsure=self._chain is not None, _constant=None)
        if self.handed is not None:
            self.handed = tuple(fn(value.detach()) for value in self.handed)
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *args: Any):
        if _hangs_on_statistics(self._chain):
            self.forget_chain()
        return super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def recomputing() -> bool:
    """Whether a backward pass is running: a forward in it is a checkpoint's."""
    return not torch.compiler.is_compiling() and in_backward()


@torch.compiler.assume_constant_result  # called while compiling, and no more
def _warn_of_compilation() -> None:
    warnings.warn(
        "KN and GKN layers cannot see in compiled code what precedes them: they are BatchNorm and"
        " GroupNorm. Call cbn_det.norms.find_chain(model, ...) with inputs of the model before.",
        stacklevel=2,
    )


def _may_go_on(known: Expression, y: Tensor) -> bool:
    """Whether a chain that ended may have been prolonged (a frozen part was released)."""
    return isinstance(known, End) and y.grad_fn is not None


def _hangs_on_statistics(known: Expression | None) -> bool:
    """Whether a chain may end or go on with other running statistics in frozen norms."""
    parts = [] if known is None else known.walk()
    return any(
        isinstance(part, FrozenNorm) or isinstance(part, End) and part.reason == _NO_STATISTICS
        for part in parts
    )


# ---- tracing a forward --------------------------------------------------------------


class _Outermost:
    """A forward that contains all others, while it runs."""

    def __init__(self, module: nn.Module, call: FrameType) -> None:
        self._module, self._call = weakref.ref(module), call

    def is_of(self, module: nn.Module) -> bool:
        return self._module() is module

    def is_running(self) -> bool:
        """Whether the call is on this thread's stack: of Ctrl-C, torch tells no hook."""
        frame = sys._getframe()
        while frame is not None and frame is not self._call:
            frame = frame.f_back
        return frame is not None


class _State(threading.local):
    outermost: _Outermost | None = None  # in evaluation
    outermost_training: _Outermost | None = None
    tracing = False
    frozen_norms: set[nn.Module] = frozenset()  # of the model that is being traced


_thread = _State()


def tracing() -> bool:
    """Whether a forward runs only to find out what precedes what."""
    return not torch.compiler.is_compiling() and _thread.tracing


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Traces a forward before that of a model with layers that need it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if _thread.tracing or _runs(_thread.outermost) or _wraps(module):
        return
    if module.training:
        if torch.is_grad_enabled() and not _runs(_thread.outermost_training):
            _thread.outermost_training = _Outermost(module, sys._getframe(1))
            _trace_training(module, args)
        return
    _thread.outermost = _Outermost(module, sys._getframe(1))
    layers = _ignorant(module)
    if not layers:
        return
    try:
        find_chain(module, *args)
    except Exception as error:
        text = (
            f"cannot tell which norms precede which in this {type(module).__name__}: tracing"
            f" one forward in evaluation failed ({error}). Call"
            " cbn_det.norms.find_chain(model, ...) with inputs of your own before."
        )
        if any(layer.chain is None for layer in layers):
            raise RuntimeError(text) from error
        warnings.warn(f"{text} Until then chains end as in the parts of it.", stacklevel=2)
        for layer in layers:
            layer.__dict__["_chain_within"] = None  # and not again


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if module in _thread.frozen_norms and isinstance(output, Tensor):
        mark(output, module)
    if _thread.outermost is not None and _thread.outermost.is_of(module):
        _thread.outermost = None
    if _thread.outermost_training is not None and _thread.outermost_training.is_of(module):
        _thread.outermost_training = None


def _runs(forward: _Outermost | None) -> bool:
    return forward is not None and forward.is_running()


def _wraps(module: nn.Module) -> bool:
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def _ignorant(module: nn.Module) -> list[Chained]:
    """Layers that work in evaluation as in training, and do not know what precedes them, or not in
    the whole of this model."""
    modules = list(module.modules())
    layers = [m for m in modules if isinstance(m, Chained) and m.predicts_in_evaluation]
    return [m for m in layers if m.chain is None or m._may_go_on_outside(len(modules))]


def _trace_training(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Has the layers of a model with frozen or compiled parts look through them, once. Where a
    forward cannot be traced they will look as far as the graph of the training forward reaches."""
    if in_backward():
        return
    modules = list(model.modules())
    layers = [m for m in modules if isinstance(m, Chained) and m.predicts]
    if all(
        (m._traced or (m.chain is not None and not m._chain_unsure))
        and not m._may_go_on_outside(len(modules))
        for m in layers
    ):
        return
    parameters = list(model.parameters())
    if not all(type(p) is nn.Parameter for p in parameters):
        return  # sharded ones, which are whole in a forward of their own only
    frozen = not all(p.requires_grad for p in parameters) or _norms_that_are_frozen(model)
    if not (frozen or any(map(_is_compiled, modules))):
        return
    try:
        find_chain(model, *args)
    except Exception as error:
        warnings.warn(
            f"no look through the frozen parts, or compiled ones, of this {type(model).__name__}:"
            f" tracing one forward in evaluation failed ({error}). KN and GKN layers behind them"
            " take the statistics of the mini-batch; cbn_det.norms.find_chain(model, ...) takes"
            " inputs of your own.",
            stacklevel=2,
        )
        for layer in layers:
            layer.__dict__.update(_chain_traced=_revision, _chain_within=None)  # and not again


def _is_compiled(module: nn.Module) -> bool:
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None
    return compiled_in_place or hasattr(module, "_orig_mod")


def _as_written(model: nn.Module) -> nn.Module:
    """The model in what compiles it or spreads it over devices."""
    while hasattr(model, "_orig_mod") or _wraps(model):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _norms_that_are_frozen(model: nn.Module) -> set[nn.Module]:
    """Those that normalise by running statistics and are not trained."""
    averaged = not any(p.requires_grad for p in model.parameters())
    return {m for m in model.modules() if _is_frozen_norm(m, averaged)}


def _is_frozen_norm(module: nn.Module, averaged: bool) -> bool:
    if isinstance(module, nn.BatchNorm2d):
        # of a model of which nothing is trained, all layers would be
        released = averaged or any(p.requires_grad for p in module.parameters())
        own = isinstance(module, Chained)
        return not (own or released or module.training or module.running_mean is None)
    buffers = module._buffers
    tensors = [buffers.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    return all(isinstance(t, Tensor) and t.dim() == 1 for t in tensors)


def _without_statistics(norm: Any) -> bool:
    mean, var = norm.running_mean, norm.running_var
    return not bool(mean.any()) and bool((var == var[0]).all())


@contextmanager
def _with_gradients(module: nn.Module) -> Iterator[None]:
    """Of all parameters, of a model in parts or as a whole not trained."""
    parameters = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast keeps no casts of weights, which would be part of a graph of no use."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _compiled_parts_as_written() -> AbstractContextManager[Any]:
    """From torch 2.6 on."""
    available = hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if available else nullcontext()


def find_chain(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Runs ``model(*args, **kwargs)`` once in evaluation mode, with gradients enabled, so that its
    KN and GKN layers find what precedes them, through frozen parts, too.

    A training forward does that by itself, and so does the first forward in evaluation of a model
    with GKN, on its own input. Random state, modes and what is trained are left as they were.
    """
    modes = {module: module.training for module in model.modules()}
    handed = {module: module.handed for module in modes if isinstance(module, Chained)}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    previous = _thread.tracing, _thread.frozen_norms
    _thread.tracing, _thread.frozen_norms = True, _norms_that_are_frozen(model)
    try:
        model.eval()
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=list(devices)),
            _without_cached_casts(),
            _with_gradients(model),
            _compiled_parts_as_written(),
        ):
            _as_written(model).forward(*_plain(args), **_plain(kwargs))
        for layer in handed:
            layer.__dict__.update(_chain_traced=_revision, _chain_within=len(modes))
    finally:
        _thread.tracing, _thread.frozen_norms = previous
        for module, training in modes.items():
            module.training = training
        for layer, value in handed.items():
            layer.handed = value


def _plain(value: Any) -> Any:
    """The same with copies of inference tensors, which take no part in a graph."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


# ---- for users -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainRow:
    """What precedes one KN or GKN layer.

    Attributes:
        name: of the layer in the model.
        follows: what its convolution's input is made of, such as
            ``"relu(layer1.0.bn2 + layer1.0.downsample.1)"``; ``"- (reason)"`` where nothing is
            predicted; ``"?"`` before the first forward with a graph.
        sources: names of the norm layers in it.
    """

    name: str
    follows: str
    sources: tuple[str, ...]


def kn_chain(model: nn.Module) -> list[ChainRow]:
    """Which norms the KN and GKN layers of a model predict their statistics from, in the model's
    order."""
    names = {id(m): n for n, m in model.named_modules(remove_duplicate=True)}
    names |= {id(p): n for n, p in model.named_parameters()}
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, Chained):
            continue
        chain = layer.chain
        if chain is None:
            rows.append(ChainRow(name, "?", ()))
            continue
        shown = chain.source if isinstance(chain, Conv) else chain
        found = [part for part in chain.walk() if isinstance(part, (Norm, OtherNorm, FrozenNorm))]
        sources = dict.fromkeys(part.describe(names) for part in found)
        rows.append(ChainRow(name, shown.describe(names), tuple(sources)))
    return rows


def format_chain(rows: list[ChainRow]) -> str:
    """The rows as text, a line for each layer."""
    width = max((len(row.name) for row in rows), default=0)
    return "\n".join(f"{row.name:<{width}}  <-  {row.follows}" for row in rows)
