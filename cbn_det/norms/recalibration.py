"""Whether a forward in training mode trains, or only computes running statistics anew."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from . import clock


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (activation checkpointing
    recomputes forwards there)."""
    return torch._C._current_graph_task_id() != -1


def in_custom_function() -> bool:
    """Whether the forward of a ``torch.autograd.Function`` is running in this thread that will have
    a backward pass: it may be a re-entrant activation checkpoint, which repeats what it calls."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, FunctionCtx) and ctx.next_functions:
                return True
        frame = frame.f_back
    return False


def trains() -> bool:
    """Whether a forward that runs now will be, or may be, part of a backward pass."""
    return torch.is_grad_enabled() or in_custom_function()


class Recalibration:
    """Of one layer. Its forwards compute statistics anew without gradient, unless in the first pass
    of a re-entrant activation checkpoint; with gradient, from ``reset_running_stats()`` or a
    momentum of None or 1 that was another before (as ``StochasticWeightAveraging`` and
    ``bn_update`` average anew) to the next optimiser step, unless the first ones after the reset
    are without.
    """

    def __init__(self, momentum: float | None) -> None:
        self._with_gradient = False  # forwards with gradient do, until the next step
        self._own_momentum = momentum  # the one that training goes by
        self._used_momentum = momentum  # by the latest forward
        self._seen = clock.now()
        self._reset_at: int | None = None  # the clock at the latest reset

    def see(self, momentum: float | None, repeated: bool) -> bool:
        """Called at the start of a forward; ``repeated``: it recomputes an earlier one. Returns
        whether it computes statistics anew."""
        if repeated:
            return self._with_gradient
        if self._seen != clock.now():
            self._seen = clock.now()
            self._own_momentum = self._used_momentum  # an iteration was trained with it
            self._with_gradient = False
        self._used_momentum = momentum
        if not trains():
            self._reset_at = None  # those with gradient that follow are training again
            return True
        anew = momentum in (1.0, None) and momentum != self._own_momentum
        self._with_gradient = self._with_gradient or anew or self._reset_at == clock.now()
        return self._with_gradient

    def reset(self) -> None:
        """Running statistics were set to their initial values."""
        self._reset_at = clock.now()

    def forget(self) -> None:
        """Nothing is left to be computed anew for."""
        self._reset_at = None

    def __getstate__(self) -> dict[str, Any]:
        # the clock is the process's; what counts elsewhere is whether it has moved since
        reset, moved = self._reset_at == clock.now(), self._seen != clock.now()
        return {**self.__dict__, "_seen": moved, "_reset_at": reset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._seen = clock.now() - int(state["_seen"])
        self._reset_at = clock.now() if state["_reset_at"] else None
