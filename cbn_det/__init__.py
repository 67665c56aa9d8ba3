"""Small-batch detection for detectron2: ``NORM: "CBN"`` in any config.

``cbn_det.register()`` makes the norms of :mod:`cbn_det.norms` valid wherever detectron2 takes a
norm, ``cbn_det.NormHook`` gives them what they need of your trainer, and
``cbn_det.convert_norm(model, "CBN")`` swaps the BatchNorms of any torch model. The rooms
``cbn_det.norms`` and ``cbn_det.deploy`` are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds, and not everything here needs it
    from torch import nn

    from . import deploy, norms
    from .norms.convert import Conversion
    from .plugin.norm_hook import NormHook
    from .run.detector import Detector

__version__ = "0.1.0"

__all__ = ["NormHook", "convert_norm", "deploy", "load_run", "norms", "register", "unregister"]


def __getattr__(name: str) -> Any:
    if name in ("norms", "deploy"):
        return importlib.import_module(f".{name}", __name__)
    if name == "NormHook":  # needs detectron2
        return importlib.import_module(".plugin.norm_hook", __name__).NormHook
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Makes every norm of :mod:`cbn_det.norms` valid wherever detectron2 takes a norm.

    Call it in each process, before the model is built; calling it again does nothing.

    Raises:
        ImportError: detectron2 is not installed.
    """
    from .plugin.registry import register as _register

    _register()


def unregister() -> None:
    """Takes back what :func:`register` did. Models built in between keep working."""
    from .plugin.registry import unregister as _unregister

    _unregister()


def convert_norm(model: nn.Module, spec: str, *, max_iter: int | None = None) -> Conversion:
    """Swaps the BatchNorms of a model for the norm that ``spec`` names, in place; see
    :func:`cbn_det.norms.convert_norm`."""
    from .norms.convert import convert_norm as _convert_norm

    return _convert_norm(model, spec, max_iter=max_iter)


def load_run(run: str, weights: str | None = None) -> Detector:
    """The trained detector of a run's folder: call it with an image; see
    :func:`cbn_det.predict.load_run`."""
    from .predict import load_run as _load_run

    return _load_run(run, weights)
