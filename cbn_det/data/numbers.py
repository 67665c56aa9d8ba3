"""What counts as a number in an annotation file."""

from __future__ import annotations

import math
from collections.abc import Collection

__all__ = ["are_finite", "are_numbers"]

_TYPES = {int, float}  # true and false are no numbers


def are_numbers(values: Collection[object]) -> bool:
    return set(map(type, values)) <= _TYPES


def are_finite(values: Collection[object]) -> bool:
    """Whether all are numbers, none of them infinite or NaN."""
    try:
        return are_numbers(values) and all(map(math.isfinite, values))
    except OverflowError:  # an integer that no float holds
        return False
