"""Statistics of the most recent iterations, as stacked tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn(tensor)`` as ``Module._apply`` calls it, but never below float32: ``model.half()`` is
    about weights, and statistics do not survive it."""
    result = fn(tensor)
    if result.dtype.is_floating_point and result.dtype.itemsize < 4:
        return tensor.to(result.device)
    return result


class Window:
    """A ring buffer of the last ``capacity`` entries; an entry is a dict of tensors.

    Entries are kept stacked, ``[capacity, ...]`` a key, so that all of them are evaluated as one
    batched product. The order within the buffer is not that of time.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._stacked: dict[str, Tensor] = {}
        self._pushed = 0

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    @property
    def pushed(self) -> int:
        """How many entries were pushed since it was empty."""
        return self._pushed

    def __contains__(self, key: str) -> bool:
        return key in self._stacked

    def __getitem__(self, key: str) -> Tensor:
        """[len(self), ...]: the entries' tensors under ``key``."""
        return self._stacked[key][: len(self)]

    def ages(self) -> Tensor:
        """[len(self)]: how many iterations ago each entry was pushed; the newest has age 0."""
        device = next(iter(self._stacked.values())).device
        slots = torch.arange(len(self), device=device)
        return (self._pushed - 1 - slots) % self.capacity

    def push(self, entry: dict[str, Tensor]) -> None:
        """Adds an entry in place of the oldest. Entries of other keys than those before (a
        convolution was frozen, say) are not comparable and empty the window first."""
        if self._stacked.keys() != entry.keys():
            self.clear()
            self._stacked = {
                key: value.new_zeros(self.capacity, *value.shape) for key, value in entry.items()
            }
        for key, value in entry.items():
            self._stacked[key][self._pushed % self.capacity] = value
        self._pushed += 1

    def clear(self) -> None:
        self._stacked, self._pushed = {}, 0

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._stacked = {key: moved(value, fn) for key, value in self._stacked.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "capacity": self.capacity,
            "pushed": self._pushed,
            "stacked": {key: value.clone() for key, value in self._stacked.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        if state["capacity"] != self.capacity:
            raise ValueError(
                f"the saved memory has window={state['capacity'] + 1}, this layer has"
                f" window={self.capacity + 1}"
            )
        self._pushed = state["pushed"]
        self._stacked = {key: value.to(device).clone() for key, value in state["stacked"].items()}
