"""Which norms precede a norm: what Kalman Normalization predicts a layer's statistics from.

Found by walking ``grad_fn`` from a norm's input, once, and kept as an
:class:`~.prediction.Expression`. The rules:

- the norm's own convolution, and convolutions without a norm on the way: moments go through their
  weight, which must be a plain parameter that is trained;
- ReLU: rectified moments; any other activation ends the chain;
- sums of two branches (residual connections, FPN): moments add;
- concatenation of channels: side by side;
- max and average pooling, nearest and bilinear upsampling, dropout and drop path, clones and casts:
  moments stay as they are;
- RoIAlign: they stay, and RoIs taken from several feature levels are an equal mixture of them;
- KN and GKN layers are where predictions start from; other norm layers with trained affine
  parameters likewise, as N(beta, gamma^2).

Everything else ends the chain: inputs of the model, frozen parts (they have no ``grad_fn``;
detectron2's FrozenBN gives it no parameters), segments of a re-entrant activation checkpoint,
multiplications of two activations, unknown operations. A layer behind such an end is the first of
a chain and takes the statistics of the mini-batch as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
)

from . import clock
from .prediction import (
    Affine,
    Concat,
    Conv,
    End,
    Expression,
    Mixture,
    Norm,
    OtherNorm,
    Pair,
    Pooled,
    Relu,
    Sum,
)

_MARK = "cbn_det norm"

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


class _ChainEnds(Exception):
    """Carries the reason."""


def mark(output: Tensor, layer: nn.Module) -> None:
    """Lets :func:`follow` recognise ``output`` as that of ``layer``."""
    if not torch.compiler.is_compiling() and output.grad_fn is not None:
        output.grad_fn.metadata[_MARK] = layer


def follow(y: Tensor, channels: int) -> Expression:
    """What makes the input ``y`` [N, channels, H, W] of a norm: its convolution, and what comes
    before that as far as it can be told; an :class:`~.prediction.End` where it cannot."""
    try:
        if y.grad_fn is None:
            raise _ChainEnds("its convolution is frozen")
        node = y.grad_fn
        while _operation(node) in ("ToCopy", "Clone") and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]
        if _operation(node) != "Convolution":
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


def _expression(node: Any) -> Expression:
    if node is None:
        raise _ChainEnds("a model input, or frozen")
    layer = node.metadata.get(_MARK)
    if layer is not None:
        return Norm(layer)
    operation = _operation(node)
    edges = [edge[0] for edge in node.next_functions]
    if operation in _KEEPS:
        return _expression(edges[0])
    if operation == "Relu":
        return Relu(_expression(edges[0]))
    if operation == "Add" and node._saved_alpha == 1:
        return _either(edges, False)
    if operation == "Mul":
        # by what has no gradient: the mask of dropout and drop path, of mean 1
        activations = [edge for edge in edges if edge is not None]
        return _expression(activations[0]) if len(activations) == 1 else _either(edges, True)
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
    raise _ChainEnds(f"no rule for {operation}")


def _levels(node: Any) -> Iterator[Expression]:
    """The feature levels whose RoIs were put into one tensor, one after another."""
    before, values = (node.next_functions[k][0] for k in (0, -1))
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


# ---- replaced modules ------------------------------------------------------------------------

_revision = 0  # counts modules put in the place of others: chains found before may be out of date
_watching = False


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    global _revision
    replaced = parent._modules.get(name)
    if replaced is not None and replaced is not child:
        _revision += 1


def watch() -> None:
    """Starts watching for replaced modules in this process; calling it again does nothing."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_on_registration)
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
    handed: Pair | None

    def _start_chain(self) -> None:
        self.__dict__.update(
            _chain=None, _chain_revision=_revision, _chain_unsure=False, _chain_from=None
        )
        self.handed = None
        watch()

    @property
    def channels(self) -> int:
        raise NotImplementedError

    @property
    def predicts_in_evaluation(self) -> bool:
        """Whether the layer needs to know what precedes it in evaluation, too."""
        return False

    @property
    def chain(self) -> Expression | None:
        """What precedes this layer; None while that is unknown."""
        return self._chain if self._chain_revision == _revision else None

    def forget_chain(self) -> None:
        """Has the layer look anew, at its next forward with a graph."""
        self.__dict__.update(_chain=None, _chain_from=None)

    def _find_chain(self, y: Tensor) -> Expression | None:
        """What precedes this layer, for its input ``y``; None where nothing is to be predicted."""
        if not torch.compiler.is_compiling():
            self._look_for_chain(y)
            if self._chain_from is not None and self._chain_from == clock.now():
                return None
        chain = self.chain
        return None if isinstance(chain, End) else chain

    def _look_for_chain(self, y: Tensor) -> None:
        known = self.chain
        recomputing = torch._C._current_graph_task_id() != -1
        if known is not None and (recomputing or not (self._chain_unsure or _may_go_on(known, y))):
            return
        if not torch.is_grad_enabled():
            return
        self.__dict__.update(
            _chain=follow(y, self.channels),
            _chain_revision=_revision,
            _chain_unsure=False,
            # the forward that this one recomputes knew nothing, and both must give the same
            _chain_from=clock.now() if recomputing else None,
        )

    # ---- what the previous layers know, handed on within a forward ----

    def hands_on(self) -> Pair | None:
        """Mean and variance of this layer's input, as it estimated them in the latest forward."""
        return self.handed

    def _hand_on(self, mean: Tensor, var: Tensor, output: Tensor | None) -> None:
        """Keeps this layer's estimate for those that follow, until the backward pass has come back
        to ``output`` (which the estimate's graph must not outlive)."""
        self.handed = (mean, var)
        if output is not None and output.grad_fn is not None and mean.requires_grad:
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
            "handed": handed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_chain_revision"] = _revision
        watch()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.__dict__["_chain_unsure"] = self._chain is not None  # new parameters in some modes
        if self.handed is not None:
            self.handed = tuple(fn(value.detach()) for value in self.handed)
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *args: Any):
        if metadata.get("assign_to_params_buffers"):
            self.forget_chain()
        return super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def _may_go_on(known: Expression, y: Tensor) -> bool:
    """Whether a chain that ended may have been prolonged (a frozen part was released)."""
    return isinstance(known, End) and y.grad_fn is not None


# ---- evaluation without a graph --------------------------------------------------------------

_watching_evaluation = False
_outermost: int | None = None  # id of the module whose forward in evaluation contains all others
_tracing = False


def tracing() -> bool:
    """Whether a forward runs only to find out what precedes what."""
    return _tracing


def watch_evaluation() -> None:
    """From now on, a model in evaluation that contains a layer which does not know its chain yet
    runs once more, with gradients enabled, before its forward."""
    global _watching_evaluation
    if not _watching_evaluation:
        register_module_forward_pre_hook(_before_forward)
        register_module_forward_hook(_after_forward, always_call=True)
        _watching_evaluation = True


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    global _outermost
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if _outermost is not None or _tracing or module.training or _wraps(module):
        return
    _outermost = id(module)
    if _ignorant(module):
        try:
            find_chain(module, *args)
        except Exception as error:
            raise RuntimeError(
                f"cannot tell which norms precede which in this {type(module).__name__}: tracing"
                f" one forward in evaluation failed ({error}). Call"
                " cbn_det.norms.find_chain(model, ...) with inputs of your own before."
            ) from error


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    global _outermost
    if not torch.compiler.is_compiling() and id(module) == _outermost:
        _outermost = None


def _wraps(module: nn.Module) -> bool:
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def _ignorant(module: nn.Module) -> list[Chained]:
    """Layers that work in evaluation as in training, and do not know what precedes them."""
    layers = (m for m in module.modules() if isinstance(m, Chained))
    return [m for m in layers if m.predicts_in_evaluation and m.chain is None]


@contextmanager
def _with_gradients(module: nn.Module) -> Iterator[None]:
    """Of a model of which nothing is trained (an average of weights), all parameters."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    if any(p.requires_grad for p in parameters):
        parameters = []
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def find_chain(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Runs ``model(*args, **kwargs)`` once in evaluation mode, with gradients enabled, so that its
    KN and GKN layers find what precedes them.

    A training forward does that by itself, and so does the first forward in evaluation of a model
    with GKN, on its own input. Random state and modes are left as they were.
    """
    global _tracing
    modes = {module: module.training for module in model.modules()}
    target = getattr(model, "_orig_mod", model)  # of a compiled model, the one that was compiled
    previous, _tracing = _tracing, True
    try:
        model.eval()
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            _with_gradients(model),
        ):
            target.forward(*_plain(args), **_plain(kwargs))
    finally:
        _tracing = previous
        for module, training in modes.items():
            module.training = training


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
        found = [part for part in chain.walk() if isinstance(part, (Norm, OtherNorm))]
        sources = dict.fromkeys(part.describe(names) for part in found)
        rows.append(ChainRow(name, shown.describe(names), tuple(sources)))
    return rows


def format_chain(rows: list[ChainRow]) -> str:
    """The rows as text, a line for each layer."""
    width = max((len(row.name) for row in rows), default=0)
    return "\n".join(f"{row.name:<{width}}  <-  {row.follows}" for row in rows)
