"""The iteration clock: one optimiser step is one iteration.

Layers must tell the forwards of one iteration (gradient accumulation, a head shared by several
feature levels) from the next iteration. Weight versions do not show it, because fused optimisers
leave them alone, and counting forwards miscounts under accumulation. Every torch optimiser runs
the hooks of ``register_optimizer_step_post_hook`` after it has stepped. A step that a GradScaler
skips never gets there, but for fused optimisers: those are called all the same, leave the weights
alone by themselves, and have ``found_inf`` set meanwhile. Reading it waits for the GPU once a step.

An optimiser that is no ``torch.optim.Optimizer`` (fastai's, an update by hand) runs no hook:
:func:`tick` counts its steps.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_steps = 0
_installed = False
_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()  # that were seen to step
_resumed: weakref.WeakSet[Any] = weakref.WeakSet()  # of those, had stepped before they were seen
_warned: set[str] = set()


def tick() -> None:
    """Counts one iteration: call it after each update of the weights that no
    ``torch.optim.Optimizer`` made."""
    global _steps
    _steps += 1


def warn_once(text: str) -> None:
    """Warns, once in this process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if optimizer not in _optimizers:
        _optimizers.add(optimizer)
        if any(optimizer.state.values()):  # looking a parameter up leaves an empty entry
            _resumed.add(optimizer)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None or not found_inf:
        tick()


def install() -> None:
    """Starts counting optimiser steps in this process; calling it again does nothing."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _installed = True


def now() -> int:
    """Number of optimiser steps taken in this process since the first layer was built."""
    return _steps


def steps_of(parameter: nn.Parameter) -> int | None:
    """How many steps the optimiser of a parameter has taken, those before its state was saved and
    loaded again included. 0 where it keeps no count (SGD) and its first step was seen here; None
    where it keeps none and had stepped before."""
    for optimizer in _optimizers:
        state = optimizer.state.get(parameter)
        if state:
            steps = state.get("step")
            if steps is not None:
                return int(steps)
            return None if optimizer in _resumed else 0
    return 0
