"""A norm that remembers: when its forwards are recorded, and when what they staged is committed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from . import clock
from .base import Forward, Found, SmallBatchNorm2d
from .functional import Estimate, Moments, without_autocast
from .memory import Memory
from .recalibration import trains
from .schedule import Scheduled

#: by id, layers with a pending entry, in the order of their first forwards in the iteration
_pending: dict[int, weakref.ref[RememberingNorm2d]] = {}
_lock = threading.Lock()


class RememberingNorm2d(Scheduled, SmallBatchNorm2d):
    """A :class:`SmallBatchNorm2d` with a :class:`~cbn_det.norms.memory.Memory`.

    A method says what a forward adds to the pending entry (:meth:`stage`), and what becomes of the
    pending entries of several layers (:meth:`commit`).
    """

    #: whether the pending entry is made anew, with the updated weights, in the second pass of
    #: :class:`cbn_det.norms.DoubleForward`
    double_forward = False

    def _start_memory(self, window: int, **times: int | float) -> None:
        if type(window) is not int or window < 1:
            raise ValueError(
                f"window={window!r}: expected an int, 1 or more (it counts the current iteration)"
            )
        self._set_times(**times)
        self.window = window
        self.memory = Memory(window - 1)
        self._other_weights: list[Tensor] | None = None  # that the memory is of, not the present
        self._memory_loaded = False  # since the latest training forward
        self._clock_moved = False  # as far as this layer has seen
        self._watched: Tensor | None = None  # a weight of some forwards ago
        # in a second pass that stages this layer anew: called after each forward
        self._after_refresh: Callable[[], None] | None = None

    # ---- what a method defines ----

    def stage(self, batch: Moments, estimate: Estimate, y: Tensor) -> None:
        """Adds one forward, of ``y`` [N, C, H, W], to the pending entry; called without
        gradient."""

    @classmethod
    def commit(cls, layers: list[Any]) -> None:
        """Takes the pending entries of layers of this class, which have the same
        :meth:`group_for_commit`, into memory."""

    def group_for_commit(self) -> Hashable:
        """Called before a commit. Layers for which it returns the same are committed together."""
        memory, like = self.memory, self.running_mean
        pending = memory.pending.get("mean", like)
        place = memory.capacity, len(memory), memory.slot
        return *place, bool(memory.pending), pending.dtype, like.device

    @property
    def commits_early(self) -> bool:
        """Whether the weights that this needs are there before the layer's own forward."""
        return True

    def _follows(self, other: RememberingNorm2d) -> bool:
        """Whether its pending entry can be committed with that of another layer."""
        same = self.memory.forwards and self.memory.seen == other.memory.seen
        return bool(same) and self._other_weights is None and self.commits_early

    # ---- forward ----

    @property
    def is_batchnorm(self) -> bool:
        if self.recomputing_statistics or self.window == 1:
            return True
        self._require_times()
        in_burn_in = self.in_burn_in
        if in_burn_in and self.memory.pushed:  # the schedule was made longer since
            self.forget()
        return in_burn_in

    def _begin(self, input: Tensor, how: Forward) -> None:
        # a recomputation is of the iteration of its forward, whatever has stepped since
        if not (self._unchanged or how.repeated):
            if how.with_grad or trains():
                if self._memory_loaded:
                    self._memory_loaded = False
                if self._other_weights is not None:  # training goes on with others
                    self._other_weights = None
                    self.memory = Memory(self.memory.capacity)
            self.advance()
        super()._begin(input, how)
        memory = self.memory
        if memory.capacity and memory.held is None and not (memory.pushed or self.is_batchnorm):
            self._hold_running_statistics()  # before this forward moves them

    def _hold_running_statistics(self) -> None:
        self.memory.held = torch.stack([self.running_mean, self.running_var])
        for values, number in zip(self.memory.held, (0.0, 1.0), strict=True):
            values.nan_to_num_(number)

    def instead(self) -> Tensor:
        """Mean and variance [2, C] to remember in place of those that are not finite: what was
        remembered before, or the running statistics."""
        memory = self.memory
        if memory.older is None and memory.held is None:  # entries were forgotten since
            self._hold_running_statistics()
        return memory.held if memory.older is None else memory.older

    def _will_record(self, how: Forward) -> bool:
        """Whether :meth:`stage` will be called in this forward, if there is anything to stage."""
        if self._unchanged:
            return self._after_refresh is not None
        return not self.recomputing_statistics and self.memory.records(*how)

    def _record(self, found: Found | None, input: Tensor, how: Forward) -> None:
        memory, recorded = self.memory, self._will_record(how)
        if not (self._unchanged or self.recomputing_statistics):
            memory.count(*how)
        if not recorded:
            return
        if not memory.forwards:
            _add_pending(self)
        if found is not None:
            self.stage(*found, input.detach())
        memory.forwards += 1
        if self._after_refresh is not None:
            self._after_refresh()
        elif not self._clock_moved:
            self._watch_clock()

    def _watch_clock(self) -> None:
        """Warns where weights change and no iteration is counted; looks in few forwards only."""
        forwards = self.memory.forwards
        if forwards < 8 or forwards & (forwards - 1) or self.weight is None:
            return
        before, self._watched = self._watched, self.weight.detach().clone()
        if before is not None and not torch.equal(before, self._watched.to(before)):
            clock.warn_once(
                f"the weights change, and no step of a torch.optim.Optimizer is seen:"
                f" {type(self).__name__} layers cannot tell iterations apart, and are BatchNorm."
                " Call cbn_det.norms.tick() after each update of the weights."
            )

    # ---- iterations ----

    @property
    def steps(self) -> int:
        """Iterations (optimiser steps) that this layer took part in."""
        return self.memory.steps

    def advance(self) -> None:
        """Commits the pending entries, of all layers that are as far, once an optimiser has stepped
        since. Not meanwhile that other weights are there."""
        if not self.memory.stepped or self._other_weights is not None:
            return
        layers = _take_pending(self) if self.memory.forwards else [self]
        groups: dict[Hashable, list[RememberingNorm2d]] = {}
        for layer in layers:
            if layer.memory.begin_iteration():
                if not layer._clock_moved:
                    layer._clock_moved, layer._watched = True, None
                if not layer.memory.placed:
                    layer._find_place()
            if layer.memory.pending or layer.memory.pushed:
                groups.setdefault((type(layer), layer.group_for_commit()), []).append(layer)
        # not in a caller's inference mode: its tensors could not be written to later
        with torch.inference_mode(False), torch.no_grad():
            for group in groups.values():
                with without_autocast(group[0].running_mean.device):
                    type(group[0]).commit(group)
        for layer in layers:
            layer.memory.end_iteration()

    def settle(self) -> None:
        """Does now what the next training forward would do first, if the weights are there."""
        self.advance()

    def _find_place(self) -> None:
        """Takes the count of steps from the optimiser's own where nobody told the layer: training
        may have been resumed, or the layer converted in the middle."""
        self.memory.placed = True
        if self.weight is None or not self._waits:
            return
        taken = clock.steps_of(self.weight)
        if taken is not None:
            self.memory.steps = max(self.steps, taken)
            return
        clock.warn_once(
            f"training goes on with an optimiser that keeps no count of its steps, and"
            f" {type(self).__name__} layers were not told how far it is: burn-in begins anew. Call"
            " cbn_det.norms.resolve_burn_in(model, max_iter, start_iter=...) before training, or"
            " save memory_state_dict(model) and load it."
        )

    def place(self, step: int) -> None:
        """Tells the layer how many optimiser steps were taken before the next forward."""
        pending = self.memory.forwards > 0 and self.memory.stepped  # counted when it is committed
        self.memory.steps, self.memory.placed = max(step - pending, 0), True

    def freeze_statistics(self) -> None:
        super().freeze_statistics()
        self.forget()

    # ---- weights that come and go ----

    def forget(self) -> None:
        """Drops what is remembered of earlier iterations; weights, running statistics and the count
        of steps stay."""
        self.memory.clear()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "memory" in self.__dict__:  # BatchNorm's constructor calls this, too
            self.memory = Memory(self.memory.capacity)

    def _weights(self) -> list[Tensor]:
        """What tells this layer's weights from others, of sharded ones this rank's part. Its
        convolution's is loaded before."""
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        present = [tensor.detach() for tensor in own if tensor is not None]
        return [t.to_local() if hasattr(t, "to_local") else t for t in present]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        remembers = self.steps > 0 or self.memory.forwards > 0
        # memory that was loaded is of the weights that come with it, in whatever order
        if remembers and not self._memory_loaded and self._other_weights is None:
            self._other_weights = [weight.clone() for weight in self._weights()]
        super()._load_from_state_dict(*args, **kwargs)
        if self._other_weights is not None and _equal(self._weights(), self._other_weights):
            self._other_weights = None  # they are back

    # ---- round trip ----

    def memory_state_dict(self) -> dict[str, Any]:
        """What is remembered, for :meth:`load_memory_state_dict`; not part of ``state_dict()``."""
        return {**self.memory.state_dict(), "channels": self.num_features}

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`memory_state_dict` returned.

        Raises:
            ValueError: the state comes from a layer of other options or another width.
        """
        self.check_memory(state)
        self.memory.load_state_dict(state, self.running_mean.device)
        self._memory_loaded, self._other_weights = True, None
        if self.memory.forwards:
            _add_pending(self)

    def check_memory(self, state: dict[str, Any]) -> None:
        """Refuses a saved memory that this layer could not use.

        Raises:
            ValueError: says what differs.
        """
        if state.keys() != self.memory_state_dict().keys():
            raise ValueError("the saved memory is of another version of this package")
        if state["capacity"] != self.memory.capacity:
            raise ValueError(
                f"the saved memory has window={state['capacity'] + 1}, this layer has"
                f" window={self.window}"
            )
        if state["channels"] != self.num_features:
            raise ValueError(
                f"the saved memory has {state['channels']} channels, not {self.num_features}"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> RememberingNorm2d:
        super()._apply(fn, recurse)
        self.memory.apply(fn)
        return self


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in zip(some, others, strict=True)
    )


def _add_pending(layer: RememberingNorm2d) -> None:
    with _lock:
        _pending.pop(id(layer), None)  # of one that is gone: its place in the order is another
        _pending[id(layer)] = weakref.ref(layer)


def _take_pending(first: RememberingNorm2d) -> list[RememberingNorm2d]:
    """The layers whose pending entries can be committed with that of ``first``: those that followed
    it in the same iteration. Another model's, which was called before, waits for its own forward.
    """
    taken: list[RememberingNorm2d] = []
    with _lock:
        for key, reference in list(_pending.items()):
            layer = reference()
            if layer is None:
                del _pending[key]
            elif layer is first or (taken and layer._follows(first)):
                taken.append(layer)
                del _pending[key]
    return taken or [first]
