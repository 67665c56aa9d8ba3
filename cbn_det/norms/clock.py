"""The iteration clock: one optimiser step is one iteration.

Layers must tell the forwards of one iteration (gradient accumulation, a head shared by several
feature levels) from the next iteration. Weight versions do not show it, because fused optimisers
leave them alone, and counting forwards miscounts under accumulation. Every torch optimiser runs
the hooks of ``register_optimizer_step_post_hook`` after it has stepped. A step that a GradScaler
skips never gets there, but for fused optimisers: those are called all the same, leave the weights
alone by themselves, and have ``found_inf`` set meanwhile. Reading it waits for the GPU once a step.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0
_installed = False


def _tick(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _steps
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None or not found_inf:
        _steps += 1


def install() -> None:
    """Starts counting optimiser steps in this process; calling it again does nothing."""
    global _installed
    if not _installed:
        register_optimizer_step_post_hook(_tick)
        _installed = True


def now() -> int:
    """Number of optimiser steps taken in this process since the first layer was built."""
    return _steps
