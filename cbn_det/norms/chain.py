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
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from . import clock
from .graph import COMPILED, FROZEN_INPUT, NO_STATISTICS, follow, running_modules
from .prediction import Conv, End, Expression, FrozenNorm, Unusable, evaluated
from .recalibration import in_backward
from .shared import Shared

Scope = weakref.ref[nn.Module] | None

_revision = 0  # counts modules that were put in the place of others
#: in which modules, and when last
_replaced_in: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@cache
def _watch() -> None:
    """Starts watching for replaced modules in this process, once."""

    def see(parent: nn.Module, name: str, new: nn.Module | None) -> None:
        global _revision
        replaced = parent._modules.get(name)
        if replaced is not None and replaced is not new:
            _revision += 1
            _replaced_in[parent] = _revision

    register_module_module_registration_hook(see)


class _State(threading.local):
    tracing = False


thread = _State()


def tracing() -> bool:
    """Whether a forward runs only to find out what precedes what."""
    return not torch.compiler.is_compiling() and thread.tracing


@dataclass
class _Known:
    """What a layer knows of what precedes it."""

    chain: Expression
    scope: Scope  # the outermost module that was running when it was found
    revision: int  # of the modules in it
    at: int  # the clock when it was found
    traced: bool  # by find_chain, which sees more than a training forward
    repeated: bool  # in a backward pass: the forward that it repeats, to the same end, knew nothing
    unsure: bool = False  # copied or out of date: to be looked for anew once there is a graph

    def is_current(self) -> bool:
        """Whether no modules were replaced since where the chain lies."""
        if self.revision != _revision:
            if not _lies_within(self.chain, self.scope):
                return False
            modules = self.scope().modules()
            if any(_replaced_in.get(module, 0) > self.revision for module in modules):
                return False
            self.revision = _revision
        return True


class Chained:
    """Mixin of a norm (an ``nn.Module``) that knows what precedes it.

    What it knows lives in ``__dict__`` and refers to modules; deepcopy and pickling carry it over,
    and the copy looks anew where it can. It is found in the first training forward with a graph,
    and again after modules were replaced (``freeze()``, say).
    """

    training: bool
    channels: int
    predicts: bool  # whether the layer needs to know what precedes it
    predicts_in_evaluation = False
    _known: _Known | None
    _reported: bool  # whether a warning of what is not predicted has counted this layer
    _shared: Shared | None  # what layers predict from in the latest forward pass

    def _start_chain(self, channels: int) -> None:
        self.__dict__.update(channels=channels, _known=None, _reported=False, _shared=None)
        _watch()

    @property
    def chain(self) -> Expression | None:
        """What precedes this layer; None while that is unknown."""
        known = self._known
        return known.chain if known is not None and known.is_current() else None

    @property
    def chain_is_sure(self) -> bool:
        """Whether what precedes this layer is known, and nothing calls for another look."""
        return self.chain is not None and not self._known.unsure

    def look_anew(self) -> None:
        """Has the layer look again, as soon as there is a graph."""
        if self._known is not None:
            self._known.unsure = True

    def _predict(self, y: Tensor, like: Tensor) -> Tensor | None:
        """The predicted mean and variance [2, C] of the channels of ``y``, of the dtype of
        ``like``; None where nothing precedes it.

        Raises:
            RuntimeError: what precedes it is not known, and a forward in evaluation cannot tell.
        """
        for _ in range(2):
            chain = self._find_chain(y)
            if chain is None:
                return None
            try:
                if torch.compiler.is_compiling() or thread.tracing or not self.training:
                    return evaluated(chain, like)
                return self._shared_moments(chain, like).predict(chain)
            except Unusable:  # parameters became others: FSDP, pruning, a parametrisation
                self._known.unsure, self._known.traced = True, False
        return None

    def _find_chain(self, y: Tensor) -> Conv | None:
        compiling = torch.compiler.is_compiling()
        if not compiling and (self.training or thread.tracing):
            known = self._known is not None and not thread.tracing
            if known and self._known.at != clock.now() and not self._reported:
                _report(self._known.scope)
            self._look_for_chain(y)
            if self._known is not None and self._known.repeated and self._known.at == clock.now():
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

    def _shared_moments(self, chain: Conv, like: Tensor) -> Shared:
        shared = self._shared
        if shared is not None and shared.serves(self, chain, like):
            return shared
        scope = self._known.scope and self._known.scope()
        # alone if it asks in the middle of a pass: the next one begins where the latest began
        together = scope is not None and shared is not None and shared.is_past(self)
        return Shared([self, *(layers_of(scope) if together else ())], self, like)

    def _look_for_chain(self, y: Tensor) -> None:
        chain, repeated = self.chain, in_backward()
        # a chain that ended may be longer by now (a frozen part was released)
        longer = isinstance(chain, End) and y.grad_fn is not None
        if chain is not None and (repeated or not (self._known.unsure or longer)):
            return
        if not torch.is_grad_enabled():
            return
        found = follow(y, self.channels)
        *_, outermost = None, *running_modules()
        scope = None if outermost is None else weakref.ref(outermost)
        if isinstance(found, End):
            if chain is not None and self._known.traced and not thread.tracing:
                if isinstance(chain, End) or _lies_within(chain, scope):  # find_chain saw more
                    self._known.unsure, self._known.scope = False, scope
                    return
            if chain is None and found.reason == COMPILED:
                _warn_of_compilation()
        # a parameter that no module is known to hold could be replaced without a trace
        unsure = any(held.module is None for held in found.held())
        self.__dict__["_known"] = _Known(
            found, scope, _revision, clock.now(), thread.tracing, repeated, unsure
        )

    # ---- copies ----

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)
        state = dict(inherited() if inherited else self.__dict__)
        known = self.chain and replace(self._known, scope=None, unsure=True, repeated=False)
        return state | {"_known": known, "_shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._known is not None:
            self._known.revision = _revision
        _watch()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *args: Any):
        # with other running statistics in frozen norms a chain may end or go on
        for part in self._known.chain.walk() if self._known is not None else ():
            if isinstance(part, FrozenNorm) or part.options == (NO_STATISTICS,):
                self.__dict__["_known"] = None
        return super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def layers_of(model: nn.Module) -> list[Chained]:
    """The KN and GKN layers of a model."""
    return [m for m in model.modules() if isinstance(m, Chained)]


def _lies_within(chain: Expression, scope: Scope) -> bool:
    """Whether all modules of a chain are known to lie in one."""
    outermost = scope and scope()
    return outermost is not None and set(outermost.modules()).issuperset(chain.modules())


@torch.compiler.assume_constant_result  # called while compiling, and no more
def _warn_of_compilation() -> None:
    warnings.warn(
        "KN and GKN layers cannot see in compiled code what precedes them: they are BatchNorm and"
        " GroupNorm. Call cbn_det.norms.find_chain(model, ...) with inputs of the model before.",
        stacklevel=2,
    )


def _report(scope: Scope) -> None:
    """Warns, in the iteration after the first, if nothing is predicted for more than a quarter of
    a model's layers, not counting the one that its input goes into."""
    model = scope and scope()
    layers = [m for m in layers_of(model) if m.predicts] if model is not None else []
    for layer in layers:
        layer.__dict__["_reported"] = True
    chains = [layer.chain for layer in layers if layer.chain is not None]
    reasons = Counter(chain.reason for chain in chains if isinstance(chain, End))
    count = reasons.total()
    if count - (FROZEN_INPUT in reasons) <= len(chains) // 4:
        return
    listed = "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common(4))
    more = "; ..." if len(reasons) > 4 else ""
    warnings.warn(
        f"KN and GKN predict nothing for {count} of {len(chains)} layers, which are BatchNorm and"
        f" GroupNorm therefore ({listed}{more}). cbn_det.norms.kn_chain(model) lists them. Where"
        " parts are frozen or compiled, cbn_det.norms.find_chain(model, batch) before training"
        " looks through them.",
        stacklevel=2,
    )


# ---- for users -------------------------------------------------------------------------------


class ChainRow(NamedTuple):
    """What precedes one KN or GKN layer.

    Attributes:
        name: of the layer in the model.
        follows: what its convolution's input is made of, such as
            ``"relu(layer1.0.bn2 + layer1.0.downsample.1)"``; ``"- (reason)"`` where nothing is
            predicted; ``"?"`` before the first forward with a graph.
    """

    name: str
    follows: str

    @property
    def ends(self) -> bool:
        """Whether nothing is predicted."""
        return self.follows.startswith(("- ", "?"))


def kn_chain(model: nn.Module) -> list[ChainRow]:
    """Which norms the KN and GKN layers of a model predict their statistics from, in the model's
    order."""
    names = {id(m): n for n, m in model.named_modules()}
    names |= {id(p): n for n, p in model.named_parameters()}
    rows = []
    for layer in layers_of(model):
        shown = layer.chain.source if isinstance(layer.chain, Conv) else layer.chain
        rows.append(ChainRow(names[id(layer)], shown.describe(names) if shown else "?"))
    return rows


def format_chain(rows: list[ChainRow]) -> str:
    """The rows as text, a line for each layer."""
    width = max((len(row.name) for row in rows), default=0)
    return "\n".join(f"{row.name:<{width}}  <-  {row.follows}" for row in rows)
