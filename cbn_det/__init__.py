"""Small-batch detection for detectron2: ``NORM: "CBN"`` in any config.

``cbn_det.register()`` makes the norms of :mod:`cbn_det.norms` valid wherever detectron2 takes a
norm, ``cbn_det.NormHook`` gives them what they need of your trainer,
``cbn_det.convert_norm(model, "CBN")`` swaps the BatchNorms of any torch model, and
``cbn_det.load_run(folder)`` is a trained detector. Everything is imported when it is first asked
for: torch takes seconds, and some of it needs detectron2.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import deploy, norms
    from .norms.convert import convert_norm
    from .plugin.norm_hook import NormHook
    from .plugin.registry import register, unregister
    from .predict import load_run

__version__ = "0.1.0"

__all__ = ["NormHook", "convert_norm", "deploy", "load_run", "norms", "register", "unregister"]

_HOMES = {
    "NormHook": "plugin.norm_hook",
    "convert_norm": "norms.convert",
    "load_run": "predict",
    "register": "plugin.registry",
    "unregister": "plugin.registry",
}


def __getattr__(name: str) -> Any:
    if name in ("norms", "deploy"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
