"""Which engine trains: detectron2 where it is installed, else torchvision's parts."""

from __future__ import annotations

import importlib
import sys
import warnings

from .run.errors import one_line

ENGINES = ("auto", "detectron2", "standalone")


def resolve_engine(name: str = "auto") -> str:
    """The engine that a name of :data:`ENGINES` stands for in this python.

    ``auto`` is ``detectron2`` where that imports, else ``standalone``; a detectron2 that is there
    but does not import is told on stderr.

    Raises:
        ImportError: the engine does not work here; says what to install.
    """
    if name == "auto":
        try:
            return resolve_engine("detectron2")
        except ImportError as error:
            if getattr(error.__cause__, "name", None) != "detectron2":  # it is there, but broken
                print(f"{error}; going on with the standalone engine", file=sys.stderr, flush=True)
            return resolve_engine("standalone")
    module, remedy = {
        "detectron2": ("detectron2.layers", "docs/install.md says how to install detectron2"),
        "standalone": (
            "torchvision.ops",
            "pip install 'cbn-det[standalone]', with a matching pair of torch and torchvision",
        ),
    }[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody here can mend what an engine imports
            importlib.import_module(module)
    except Exception as error:  # a broken build fails with more than ImportError
        raise ImportError(
            f"the {name} engine does not work here ({one_line(error)}): {remedy}"
        ) from error
    return name
