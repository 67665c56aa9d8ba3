"""The detectron2 side: the norm registry hook, training, data sets. The only package here that
imports detectron2."""

import warnings

import torch

#: (oldest, newest) torch that the tests were run with, as (major, minor)
TESTED_TORCH = ((2, 14), (2, 14))
TESTED_DETECTRON2 = "0.6"
#: commit of detectron2's repository that the tests were run with; setup.py pins the same
DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"


def _check_versions() -> None:
    import detectron2

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    oldest, newest = TESTED_TORCH
    if not oldest <= version <= newest:
        tested = " to ".join(".".join(map(str, v)) for v in TESTED_TORCH)
        warnings.warn(
            f"cbn_det was tested with torch {tested}; this is {torch.__version__}. Its tests"
            " (`make test`) tell whether it works here.",
            stacklevel=3,
        )
    if detectron2.__version__ != TESTED_DETECTRON2:
        warnings.warn(
            f"cbn_det was tested with detectron2 {TESTED_DETECTRON2} at commit"
            f" {DETECTRON2_COMMIT[:7]}; this is {detectron2.__version__}.",
            stacklevel=3,
        )


_check_versions()
