"""The detectron2 side: the norm registry hook, training, data sets. The only package here that
imports detectron2."""

import warnings

import detectron2
import torch

#: what the tests were run with; setup.py pins a commit of detectron2
TESTED = {torch: "2.14", detectron2: "0.6"}

for module, version in TESTED.items():
    if not f"{module.__version__}.".startswith(f"{version}."):
        warnings.warn(
            f"cbn_det was tested with {module.__name__} {version}; this is {module.__version__}."
            " Its tests (`make test`) tell whether it works here.",
            stacklevel=2,
        )
