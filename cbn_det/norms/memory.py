"""What a norm remembers from iteration to iteration.

One optimiser step is one iteration. Every training forward adds its statistics to the *pending*
entry; the first training forward after ``optimizer.step()`` commits it, that of all layers at once.
With gradient accumulation, N forwards make one entry; forwards under ``no_grad`` are not recorded;
an activation checkpoint's two runs of a forward are recorded once. Within an iteration memory is
read-only. It is neither parameter nor buffer, so that ``broadcast_buffers=True`` leaves it alone
and checkpoints stay BatchNorm's; :func:`cbn_det.norms.memory_state_dict` saves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import clock


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn(tensor)`` as ``Module._apply`` calls it, but never below float32: ``model.half()`` is
    about weights, and statistics do not survive it."""
    result = fn(tensor)
    if result.dtype.is_floating_point and result.dtype.itemsize < 4:
        return tensor.to(result.device)
    return result


class Memory:
    """Of one layer: its place in the schedule, the pending entry, and a ring of the last entries.

    An entry is a dict of tensors. Its values a channel, the method's ``row``, are kept together,
    ``rows`` [capacity, row, C], as a part of a tensor that several layers share
    (:func:`rows_of`); larger ones stacked, ``stacked[key]`` [capacity, ...]. The order within the
    ring is not that of time.

    Args:
        capacity: entries beside the pending one; 0: nothing but the iterations is counted.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.steps = 0  # iterations that the layer took part in
        self.seen = clock.now()  # the clock in the present iteration
        self.placed = False  # whether ``steps`` is known to be the place in the schedule
        self.unrecorded = 0  # no-grad forwards that a recomputation may still record
        self.clear()

    def clear(self) -> None:
        """Forgets all entries, and the pending one."""
        self.pending: dict[str, Tensor] = {}
        self.forwards = 0  # that the pending entry is made of
        self.refreshed = False  # whether Double Forward's second pass has made it anew
        #: mean and variance [2, C] with which the present iteration began
        self.held: Tensor | None = None
        self.forget_entries()

    def forget_entries(self) -> None:
        self.rows: Tensor | None = None
        self.stacked: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}  # beside the entries, changed with each commit
        self.pushed = 0  # entries so far
        self.refreshed_entries = 0  # of these, those that a second pass has made anew
        #: mean and variance [2, C] of all entries together, for the present iteration
        self.older: Tensor | None = None

    def __len__(self) -> int:
        return min(self.pushed, self.capacity)

    @property
    def slot(self) -> int:
        """Where in the ring the next entry goes."""
        return self.pushed % max(self.capacity, 1)

    @property
    def stepped(self) -> bool:
        """Whether an optimiser has stepped since the present iteration began."""
        return self.seen != clock.now()

    def begin_iteration(self) -> bool:
        """Takes note of the clock; returns whether the iteration that ended recorded anything."""
        self.seen = clock.now()
        self.unrecorded = 0
        if not self.forwards:
            return False
        self.steps += 1
        return True

    def end_iteration(self) -> None:
        """The pending entry is committed."""
        self.held = None
        self.pending, self.forwards, self.refreshed = {}, 0, False

    def begin_again(self) -> tuple[dict[str, Tensor], int]:
        """Takes the pending entry away, for :meth:`restore`; a new one may be made."""
        taken = self.pending, self.forwards
        self.pending, self.forwards = {}, 0
        return taken

    def restore(self, taken: tuple[dict[str, Tensor], int]) -> None:
        self.pending, self.forwards = taken

    def records(self, with_grad: bool, repeated: bool) -> bool:
        """Whether a forward will be recorded; ``repeated``: it recomputes an earlier one."""
        return with_grad and (not repeated or self.unrecorded > 0)

    def count(self, with_grad: bool, repeated: bool) -> None:
        """A forward has run."""
        if not with_grad:
            self.unrecorded += 1
        elif not repeated:
            self.unrecorded = 0
        elif self.unrecorded:  # else it was recorded when it ran for the first time
            self.unrecorded -= 1

    # ---- round trip ----

    def _each(self, fn: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Everything that is remembered, ``fn`` of each tensor."""
        each: dict[str, Any] = {}
        for name in ("pending", "stacked", "kept"):
            each[name] = {key: fn(value) for key, value in getattr(self, name).items()}
        for name in ("rows", "older", "held"):
            value = getattr(self, name)
            each[name] = None if value is None else fn(value)
        return each

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.__dict__.update(self._each(lambda value: moved(value, fn)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "capacity": self.capacity,
            "steps": self.steps,
            "pushed": self.pushed,
            "refreshed_entries": self.refreshed_entries,
            "forwards": self.forwards,
            "refreshed": self.refreshed,
            # whether an optimiser has stepped since: the pending entry is then to be committed
            "stepped": self.stepped,
            **self._each(Tensor.clone),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores what :meth:`state_dict` returned for a memory of the same capacity."""
        self.__dict__.update({name: state[name] for name in vars(self).keys() & state.keys()})
        self.__dict__.update(self._each(lambda value: value.to(device, copy=True)))
        self.placed = True
        self.seen = clock.now() - int(state["stepped"])
        self.unrecorded = 0

    def __getstate__(self) -> dict[str, Any]:
        # clones, as some are parts of what other layers have a part of
        return {**self.__dict__, "seen": int(self.stepped), **self._each(Tensor.clone)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.seen = clock.now() - state["seen"]


def rows_of(layers: list[Any]) -> Tensor:
    """[entries, row, sum of channels]: the rows of several layers, which have the same number of
    entries, side by side."""
    memory = layers[0].memory
    return _common_rows(layers, memory.rows.shape[1])[: len(memory)]


def _common_rows(layers: list[Any], count: int) -> Tensor:
    """[capacity, count, sum of channels]: a tensor that each layer has a part of from now on."""
    first, widths = layers[0].memory, [layer.num_features for layer in layers]
    if first.rows is None:
        any_value = next(iter(first.pending.values()))
        whole = any_value.new_zeros(first.capacity, count, sum(widths))
    else:
        whole = _side_by_side([layer.memory.rows for layer in layers])
        if whole is first.rows._base:
            return whole
    for layer, part in zip(layers, whole.split(widths, 2), strict=True):
        layer.memory.rows = part
    return whole


def _side_by_side(values: list[Tensor]) -> Tensor:
    """[..., sum of C] of values [..., C]; what they are all parts of, if they are."""
    whole, at = values[0]._base, 0
    for value in values:
        if value._base is not whole or value.storage_offset() != at:
            break
        at += value.shape[-1]
    else:
        if whole is not None and whole.shape == (*values[0].shape[:-1], at):
            return whole
    return torch.cat(values, -1)


def share_out(layers: list[Any], older: Tensor) -> None:
    """Gives each layer its part of the mean and variance of all entries, ``older`` [2, sum of
    channels], of the layers side by side."""
    widths = [layer.num_features for layer in layers]
    for layer, part in zip(layers, older.split(widths, 1), strict=True):
        layer.memory.older = part


def instead_of(layers: list[Any]) -> Tensor:
    """[2, sum of channels]: ``layer.instead()`` of several layers side by side."""
    return _side_by_side([layer.instead() for layer in layers])


def push(layers: list[Any], row: tuple[str, ...], derived: tuple[str, ...] = ()) -> Tensor:
    """Makes the pending entries of several layers, all with the same slot free, their newest ones.

    In a channel whose variance is not finite (a step that overflowed and was skipped by a
    GradScaler leaves its forward behind) mean and variance are those of ``layer.instead()``.

    Args:
        layers: norms with a memory.
        row: keys of the values a channel, the first two of which are mean and variance.
        derived: names of values a channel that follow in a row, for the caller to write.

    Returns:
        :func:`rows_of` the layers.
    """
    memories = [layer.memory for layer in layers]
    first = memories[0]
    rows = _common_rows(layers, len(row) + len(derived))
    new = rows[first.slot, : len(row)]
    torch.cat([memory.pending[key] for key in row for memory in memories], out=new.view(-1))
    torch.where(new[1] < math.inf, new[:2], instead_of(layers), out=new[:2])
    for key in first.pending.keys() - set(row):
        for memory in memories:
            if key not in memory.stacked:
                value = memory.pending[key]
                memory.stacked[key] = value.new_zeros(memory.capacity, *value.shape)
        slots = [memory.stacked[key][memory.slot] for memory in memories]
        torch._foreach_copy_(slots, [memory.pending[key] for memory in memories])
    for memory in memories:
        memory.pushed += 1
        memory.refreshed_entries += memory.refreshed
    return rows[: len(first)]
