"""The iteration clock: one optimiser step is one iteration.

Layers must tell the forwards of one iteration (gradient accumulation, a head shared by several
feature levels) from the next. Every torch optimiser runs the hooks of
``register_optimizer_step_post_hook`` after it has stepped. A step that a GradScaler skips does not
get there, but for fused optimisers: they leave the weights alone by themselves, and have
``found_inf`` set meanwhile, which costs a wait for the GPU once a step. An optimiser that is no
``torch.optim.Optimizer`` (fastai's, an update by hand) runs no hook: :func:`tick` counts its steps.
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
#: how many steps each optimiser has taken (None: others before it was seen), and when the latest
_optimizers: weakref.WeakKeyDictionary[Any, tuple[int | None, int]] = weakref.WeakKeyDictionary()
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
    # looking a parameter up leaves an empty entry; an empty state may also have been loaded
    if not any(entry for entry in optimizer.state.values() if isinstance(entry, dict)):
        _optimizers[optimizer] = (0, _steps)
    elif optimizer not in _optimizers:
        _optimizers[optimizer] = (None, _steps)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None or not found_inf:
        tick()
        taken, _ = _optimizers.get(optimizer, (None, 0))  # built within its first step
        _optimizers[optimizer] = (None if taken is None else taken + 1, _steps)


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
    """How many steps the optimiser of a parameter, the latest of several, has taken, those before
    its state was saved and loaded again included. 0 where it keeps no state; None where it keeps no
    count (SGD) and had stepped before it was seen."""
    known = [optimizer for optimizer in _optimizers if optimizer.state.get(parameter)]
    if not known:
        return 0
    latest = max(known, key=lambda optimizer: _optimizers[optimizer][1])
    steps = latest.state[parameter].get("step")
    return _optimizers[latest][0] if steps is None else int(steps)
