"""Small-batch detection for detectron2: ``NORM: "CBN"`` in any config.

``cbn_det.register()`` makes the norms of :mod:`cbn_det.norms` valid wherever detectron2 takes a
norm.
"""

__version__ = "0.1.0"


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
