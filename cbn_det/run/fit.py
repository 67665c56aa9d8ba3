"""Whether weights are those of a model, all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .errors import ConfigError

# what a file may have or lack and still be the model's: a counter that nothing is computed from,
# and what the config sets
_INDIFFERENT = re.compile(r"(^|\.)(num_batches_tracked|pixel_mean|pixel_std|cell_anchors\.\d+)$")
_MASK_PREDICTOR = re.compile(r"(^|\.)mask_(head\.)?predictor\.")  # detectron2's, torchvision's


def key_of_absent(tensors: Iterable[str]) -> str:
    """The config key that decides whether a model has these tensors, where one decides it of a
    whole head; "" otherwise."""
    return "MODEL.MASK_ON" if any(map(_MASK_PREDICTOR.search, tensors)) else ""


def check_complete(
    where: str,
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    missing: Iterable[str],
    surplus: Iterable[str],
    key_for: Callable[[str, bool], str],
) -> None:
    """Refuses weights that are not the model's to the last tensor.

    Args:
        where: names the file.
        shapes: of each tensor with another shape than the model's: the file's and the model's.
        missing: tensors of the model that are not in the file.
        surplus: tensors of the file that have no place in the model.
        key_for: gives the config key, or section, that most likely differs for a tensor, which is
            of another shape or not; "" if its name does not tell.

    Raises:
        ConfigError: names the file, the first such tensor and the config key to look at.
    """
    missing = [name for name in missing if not _INDIFFERENT.search(name)]
    surplus = [name for name in surplus if not _INDIFFERENT.search(name)]
    wrong = [*shapes, *missing, *surplus]
    if not wrong:
        return
    first = wrong[0]
    if first in shapes:
        saved, wanted = shapes[first]
        what = f"{first} is of shape {list(saved)}, the model's is {list(wanted)}"
    else:
        what = f"{first} is not in the {'file' if missing else 'model'}"
    more = f", and {len(wrong) - 1} more tensors do not fit" if len(wrong) > 1 else ""
    key = key_of_absent([*missing, *surplus]) or key_for(first, first in shapes)
    raise ConfigError(
        f"{where} is of another model: {what}{more}. The config must describe the network that was"
        f" trained{f'; look at {key}' if key else ''}"
    )
