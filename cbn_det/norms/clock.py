"""The iteration clock: one optimiser step is one iteration.

Layers must tell the forwards of one iteration (gradient accumulation, a head shared by several
feature levels) from the next iteration. Weight versions do not show it, because fused optimisers
leave them alone, and counting forwards miscounts under accumulation. Every torch optimiser runs
the hooks of ``register_optimizer_step_post_hook`` after it has stepped; a step that a GradScaler
skipped never gets there.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0
_installed = False


def _tick(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _steps
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
