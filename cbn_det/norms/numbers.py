"""Numbers that modules keep as plain attributes, which no state_dict holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .base import SmallBatchNorm2d
from .chain import Chained


@contextmanager
def kept_numbers(model: nn.Module) -> Iterator[None]:
    """Puts them back as they were: ints and floats (detectron2's ``loss_normalizer``, an average
    over iterations), and what was a None and has become one. Bools are settings. Our norms are left
    alone: what they keep is theirs to put back."""
    before = {
        module: dict(vars(module))
        for module in model.modules()
        if not isinstance(module, (SmallBatchNorm2d, Chained))
    }
    try:
        yield
    finally:
        for module, attributes in before.items():
            _restore(vars(module), attributes)


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for key in attributes.keys() | before.keys():
        if type(attributes.get(key)) in (int, float) or type(before.get(key)) in (int, float):
            if key in before:
                attributes[key] = before[key]
            else:
                del attributes[key]
