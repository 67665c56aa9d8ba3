"""Which norms precede a norm: what Kalman Normalization predicts a layer's statistics from.

A layer reads it off the autograd graph in its first training forward (:mod:`.graph` has the rules),
and keeps it as an :class:`~.prediction.Expression`. Parts that are frozen or compiled have no such
graph: :func:`~.trace.find_chain` looks through them, and tells GKN layers, which predict in
evaluation, too. Nothing watches a model's forwards from outside.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from . import clock
from .expression import At, Expression, Unusable
from .graph import COMPILED, FROZEN_INPUT, NO_STATISTICS, follow, mark, running_modules
from .prediction import Conv, End, FrozenNorm, Norm, OtherNorm
from .recalibration import in_backward
from .shared import Shared, Use, predicted, share

# ---- replaced modules ------------------------------------------------------------------------

_revision = 0  # counts modules that were put in the place of others
#: in which modules, and when last
_replaced_in: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_watching = False


def _on_registration(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    global _revision
    replaced = parent._modules.get(name)
    if replaced is not None and replaced is not new:
        _revision += 1
        _replaced_in[parent] = _revision


def watch() -> None:
    """Starts watching for replaced modules in this process; calling it again does nothing."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_on_registration)
        _watching = True


class _State(threading.local):
    tracing = False


thread = _State()


def tracing() -> bool:
    """Whether a forward runs only to find out what precedes what."""
    return not torch.compiler.is_compiling() and thread.tracing


def recomputing() -> bool:
    """Whether a backward pass is running: a forward in it is a checkpoint's."""
    return not torch.compiler.is_compiling() and in_backward()


# ---- layers ----------------------------------------------------------------------------------


class Chained:
    """Mixin of a norm (an ``nn.Module``) that knows what precedes it.

    The expression lives in ``__dict__`` and refers to modules; deepcopy and pickling carry it over,
    and the copy looks anew where it can. It is found in the first training forward with a graph,
    and again after modules were replaced (``freeze()``, say).
    """

    training: bool
    _chain: Expression | None
    _chain_revision: int
    _chain_scope: Any  # weakref to the outermost module that was running when it was found, or None
    _chain_unsure: bool  # copied, moved or out of date: look anew as soon as there is a graph
    _chain_from: int | None  # found inside a backward pass: not before the clock has moved on
    _chain_traced: bool  # by find_chain, which sees more than a training forward
    _chain_counted: bool  # whether the report of what is predicted counts this layer already
    _shared: Shared | None  # what layers predict from in the latest forward pass

    def _start_chain(self) -> None:
        self.__dict__.update(
            _chain=None,
            _chain_revision=_revision,
            _chain_scope=None,
            _chain_unsure=False,
            _chain_from=None,
            _chain_traced=False,
            _chain_counted=False,
            _shared=None,
        )
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
        if self._chain_revision != _revision and self._chain is not None:
            if self._may_have_changed(self._chain):
                return None
            self.__dict__["_chain_revision"] = _revision
        return self._chain

    def _may_have_changed(self, chain: Expression) -> bool:
        """Whether modules were replaced since where the chain lies, or nobody knows where."""
        if not _lies_within(chain, self._chain_scope):
            return True
        modules = self._chain_scope().modules()
        return any(_replaced_in.get(module, 0) > self._chain_revision for module in modules)

    def forget_chain(self) -> None:
        """Has the layer look anew, at its next training forward with a graph."""
        self.__dict__.update(_chain=None, _chain_from=None, _chain_traced=False)

    def _find_chain(self, y: Tensor) -> Expression | None:
        """What precedes this layer, for its input ``y``; None where nothing is to be predicted.

        Raises:
            RuntimeError: it is not known, and a forward in evaluation cannot tell.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and (self.training or thread.tracing):
            if not thread.tracing:
                _count(self)
            self._look_for_chain(y)
            if self._chain_from is not None and self._chain_from == clock.now():
                return None
        chain = self.chain
        if chain is None and not self.training:
            raise RuntimeError(
                f"{type(self).__name__}({self.channels}) predicts in evaluation, too, and does not"
                " know what precedes it in this model: call cbn_det.norms.find_chain(model, batch)"
                " once, with a batch as the model takes it, before the model is evaluated"
            )
        if chain is None and compiling:
            _warn_of_compilation()
        return None if isinstance(chain, End) else chain

    def _predict(self, y: Tensor, like: Tensor, use: Use) -> tuple[Tensor, ...] | None:
        """What ``use`` makes of the predicted mean and variance [2, C] of the channels of ``y``, of
        the dtype of ``like``; None where nothing precedes it."""
        for _ in range(2):
            chain = self._find_chain(y)
            if chain is None:
                return None
            try:
                if torch.compiler.is_compiling() or thread.tracing or not self.training:
                    return use(At(like)(chain))
                return predicted(self._shared_moments(chain, like), chain, use)
            except Unusable:  # parameters became others: FSDP, pruning, a parametrisation
                self.__dict__.update(_chain_unsure=True, _chain_traced=False)
        return None

    def _shared_moments(self, chain: Conv, like: Tensor) -> Shared:
        shared = self._shared
        if shared is not None and shared.serves(self, chain, like):
            return shared
        scope = self._chain_scope and self._chain_scope()
        # alone if it asks in the middle of a pass: the next one begins where the latest began
        together = scope is not None and shared is not None and shared.is_past(self)
        modules = scope.modules() if together else ()
        return share([self, *(m for m in modules if isinstance(m, Chained))], self, like)

    def _look_for_chain(self, y: Tensor) -> None:
        known = self.chain
        again = recomputing()
        if known is not None and (again or not (self._chain_unsure or _may_go_on(known, y))):
            return
        if not torch.is_grad_enabled():
            return
        found = follow(y, self.channels)
        if isinstance(found, End) and known is not None and not thread.tracing:
            if isinstance(known, End) and (self._chain_traced or known.reason == found.reason):
                return
            scope = _outermost()
            if self._chain_traced and _lies_within(known, scope):  # a copy; find_chain saw more
                self.__dict__.update(_chain_unsure=False, _chain_scope=scope)
                return
        if isinstance(found, End) and found.reason == COMPILED and known is None:
            _warn_of_compilation()
        self.__dict__.update(
            _chain=found,
            _chain_revision=_revision,
            _chain_scope=_outermost(),
            # a parameter that no module is known to hold could be replaced without a trace
            _chain_unsure=any(held.module is None for held in found.held()),
            # the forward that this one recomputes knew nothing, and both must give the same
            _chain_from=clock.now() if again else None,
            _chain_traced=thread.tracing,
        )

    def _mark(self, output: Tensor) -> None:
        """Lets those that follow recognise this layer's output."""
        if not torch.compiler.is_compiling():
            mark(output, self)

    # ---- copies ----

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)
        state = dict(inherited() if inherited else self.__dict__)
        return state | {
            "_chain": self.chain,
            "_chain_scope": None,
            "_chain_unsure": self.chain is not None,
            "_chain_from": None,
            "_shared": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_chain_revision"] = _revision
        watch()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *args: Any):
        if _hangs_on_statistics(self._chain):
            self.forget_chain()
        return super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def _outermost() -> weakref.ref[nn.Module] | None:
    running = None
    for module in running_modules():
        running = module
    return None if running is None else weakref.ref(running)


def _lies_within(chain: Expression, scope: weakref.ref[nn.Module] | None) -> bool:
    """Whether all modules of a chain are known to lie in one."""
    outermost = None if scope is None else scope()
    return outermost is not None and set(outermost.modules()).issuperset(chain.modules())


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
        isinstance(part, FrozenNorm) or isinstance(part, End) and part.reason == NO_STATISTICS
        for part in parts
    )


# ---- what is not predicted -------------------------------------------------------------------

_counted: weakref.WeakSet[Chained] = weakref.WeakSet()  # layers that the next report is of
_counted_at: int | None = None  # in which iteration; None: none


def _count(layer: Chained) -> None:
    """Counts a layer in its first training forward; the first of them all in the iteration after
    it reports."""
    global _counted_at
    if _counted_at is not None and _counted_at != clock.now():
        _counted_at = None
        layers = list(_counted)
        _counted.clear()
        _report(layers)
    if not layer._chain_counted:
        layer.__dict__["_chain_counted"] = True
        _counted.add(layer)
        _counted_at = clock.now()


def _report(layers: list[Chained]) -> None:
    """Warns if nothing is predicted for all layers, or for more than a quarter of them, not
    counting one of each model, which its input goes into."""
    ends = [(layer.chain, layer._chain_scope) for layer in layers if isinstance(layer.chain, End)]
    count = len(ends)
    first = len({id(model and model()) for end, model in ends if end.reason == FROZEN_INPUT})
    if not count or (count < len(layers) and count - first <= len(layers) // 4):
        return
    reasons = Counter(end.reason for end, _ in ends)
    listed = "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common(4))
    more = "; ..." if len(reasons) > 4 else ""
    warnings.warn(
        f"KN and GKN predict nothing for {count} of {len(layers)} layers, which are BatchNorm and"
        f" GroupNorm therefore ({listed}{more}). cbn_det.norms.kn_chain(model) lists them. Where"
        " parts are frozen or compiled, cbn_det.norms.find_chain(model, batch) before training"
        " looks through them.",
        stacklevel=2,
    )


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
