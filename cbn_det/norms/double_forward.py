"""Double Forward: the second forward pass of Memorized Batch Normalization."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import clock
from .base import SmallBatchNorm2d, unchanged
from .chain import Chained
from .first_proposals import FirstProposals, RandomState
from .numbers import kept_numbers
from .recalibration import in_backward
from .remembering import RememberingNorm2d

#: attributes that tell of a layer's latest forward, for diagnostics
_OF_LATEST_FORWARD = ("_compared",)


class DoubleForward:
    """After an optimiser step, runs the iteration's mini-batches again with the updated weights, so
    that what MBN layers remember of it belongs to these weights.

    Two lines in a training loop::

        double_forward = DoubleForward(model)
        for batch in loader:
            loss = ...  # one forward, or several whose gradients are accumulated
            loss.backward()
            optimizer.step()  # or scaler.step(optimizer)
            double_forward.refresh()

    Recorded are the inputs of every training forward (references: they must not be changed in place
    before :meth:`refresh`), the state of torch's random generators, of the CPU and of the model's
    device, and that of autocast. The second pass runs in training mode without gradient, draws the
    same random numbers, and a detector whose ``proposals`` are named has the very RoIs of the first
    (:class:`~cbn_det.norms.first_proposals.FirstProposals`). Layers update in order, so that deeper
    ones see what refreshed ones put out. Each MBN layer replaces what it staged in the iteration,
    and with it its running statistics. Everything else is as before: the other layers, every other
    buffer, numbers that modules keep as plain attributes (detectron2's ``loss_normalizer``), the
    random state, and what layers report of their latest forward. Hooks run as in any forward.

    It costs about a forward pass, less what follows the last layer that has something to refresh.
    There is none where no MBN layer asks for one (in burn-in, frozen, ``double_forward=False``),
    nor after a step that a GradScaler skipped: the mini-batch then belongs to the next iteration,
    and is run again with it, unless :meth:`forget` is called. A forward that raised is not run
    again: a loop may catch the error and go on.

    Our layers communicate nothing between ranks. Synchronising norms beside MBN would, in the
    second pass too, where ranks need not agree on where it ends: do not mix them. A model that is
    itself called through a re-entrant activation checkpoint is not recorded; parts of it may be.
    A copy of the model is not recorded, unless the DoubleForward is copied with it.

    Args:
        model: that the training loop calls, or the module inside a DistributedDataParallel.
        proposals: the submodule of a two-stage detector that makes region proposals: detectron2's
            ``model.proposal_generator``, torchvision's ``model.rpn``. Its proposals of the first
            pass serve the second (a choice of ours: there is no code of the authors).
    """

    def __init__(self, model: nn.Module, proposals: nn.Module | None = None) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self._forwards: list[_Forward] = []
        self._others: list[RememberingNorm2d] = []
        self._recorded_at = clock.now()
        self._running = False
        self._handled = id(None)  # of the exception that was handled when the forward began
        clock.install()
        self._proposals = proposals
        self._recording: _Forward | None = None
        self._hooks = _Hooks(self)
        self._handles = [
            self.model.register_forward_pre_hook(self._hooks.before, with_kwargs=True),
            self.model.register_forward_hook(self._hooks.after, always_call=True),
        ]

    def remove(self) -> None:
        """Stops recording and forgets what was recorded."""
        for handle in self._handles:
            handle.remove()
        self.forget()

    def include(self, layers: Iterable[RememberingNorm2d]) -> None:
        """Refreshes these layers too, which are no part of the model but are called with what its
        layers are called with. They replace those of an earlier call."""
        self._others = list(layers)

    def refresh(self) -> bool:
        """Runs the second pass of the iteration that an optimiser step has just ended.

        Returns:
            Whether there was one to run.

        Raises:
            Exception: what the model raises. Layers and random state are then as they were before
                the call.
        """
        self._drop_unfinished()
        if clock.now() == self._recorded_at:
            return False  # no step: what was recorded belongs to an iteration that goes on
        try:
            return self._refresh()
        finally:
            self.forget()

    def forget(self) -> None:
        """Forgets the inputs that were recorded. Mini-batches of a skipped step then stay out of
        memory, as in a training that resumes from a checkpoint, which has no inputs."""
        self._drop_unfinished()
        self._forwards = []

    def _refresh(self) -> bool:
        wanting = [
            m
            for m in self._layers()
            if m.training and m.memory.pending and m.memory.seen == self._recorded_at
        ]
        if not (self._forwards and wanting and self.model.training):
            return False
        calls = _calls(self._forwards, wanting)
        devices = {layer.running_mean.device for layer in wanting}
        gpus = [device for device in devices if device.type == "cuda"]
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=gpus),
            _staging_anew(self.model, wanting),
        ):
            self._running = True
            try:
                for forward, expected in zip(self._forwards, calls, strict=True):
                    with _ending(expected):
                        forward.replay(self.model)
            finally:
                self._running = False
        return True

    def __getstate__(self) -> dict[str, Any]:
        # a copy is without anybody's images
        return {**self.__dict__, "_forwards": [], "_others": [], "_recording": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._hooks.owner is None:
            self._hooks.owner = self

    def _layers(self) -> list[RememberingNorm2d]:
        """Those that ask for a second pass."""
        modules = (*self.model.modules(), *self._others)
        return [m for m in modules if isinstance(m, RememberingNorm2d) and m.double_forward]

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running or in_backward():
            return
        if model.training and not torch.is_grad_enabled():
            return  # maybe within the recorded forward
        self._drop_unfinished()
        if not model.training:
            return
        if self._recorded_at != clock.now():
            self.forget()
            self._recorded_at = clock.now()
        self._handled = id(sys.exc_info()[1])
        layers = [m for m in self._layers() if m.training]
        if layers:
            self._recording = _Forward(args, kwargs, layers, self._proposals)
            self._forwards.append(self._recording)

    def _end_record(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._recording is None or self._running or in_backward():
            return
        # torch calls this while it handles what a forward raised; one may return None as well
        if output is None and id(sys.exc_info()[1]) != self._handled:
            self._drop_unfinished()
            return
        self._recording.end()
        self._recording = None

    def _drop_unfinished(self) -> None:
        """Forgets a forward that raised. Of Ctrl-C torch tells no hook: later calls look again."""
        if self._recording is not None:
            self._recording.end()
            self._forwards = [f for f in self._forwards if f is not self._recording]
            self._recording = None


class _Hooks:
    """A DoubleForward's hooks on its model. In a copy of the model they do nothing, unless the
    DoubleForward was copied, too: nobody would refresh what they record. They are no part of a
    compiled graph, which would be compiled anew with every step of the clock."""

    def __init__(self, owner: DoubleForward) -> None:
        self.owner: DoubleForward | None = owner

    @torch.compiler.disable
    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.owner is not None:
            self.owner._record(model, args, kwargs)

    @torch.compiler.disable
    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.owner is not None:
            self.owner._end_record(model, args, output)

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": None}  # a copied DoubleForward puts itself here


class _Forward:
    """One recorded forward.

    Attributes:
        calls: how often it called each MBN layer with anything to stage; known at its end.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layers: list[RememberingNorm2d],
        proposals: nn.Module | None,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.calls = dict.fromkeys(layers, 0)
        self._before = {layer: _counts(layer) for layer in layers}
        device = layers[0].running_mean.device
        self._random_state = RandomState.now(device)
        self._autocast = {
            "device_type": device.type,
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
            "cache_enabled": False,  # casts of the weights before the step may be in the cache
        }
        self.proposals = None
        if proposals is not None:
            self.proposals = FirstProposals(proposals, device, lambda: [*map(_counts, layers)])

    def end(self) -> None:
        for layer, (staged_before, waiting_before) in self._before.items():
            staged, waiting = _counts(layer)
            if waiting >= waiting_before:  # else nothing waited: a forward with gradient dropped it
                waiting -= waiting_before
            self.calls[layer] = staged - staged_before + waiting
        if self.proposals is not None:
            self.proposals.keep_no_more()

    def replay(self, model: nn.Module) -> None:
        self._random_state.restore()
        given = self.proposals.given() if self.proposals is not None else nullcontext()
        with torch.autocast(**self._autocast), given:
            model(*self.args, **self.kwargs)


def _counts(layer: RememberingNorm2d) -> tuple[int, int]:
    """Forwards of this iteration that the layer has staged; and those without gradient since, which
    it will stage if a backward pass recomputes them (not those of PreciseBN, say)."""
    memory = layer.memory
    return (0, 0) if memory.stepped else (memory.forwards, memory.unrecorded)


class _NothingLeft(BaseException):
    """Ends a second pass: all that was staged has been staged anew. No Exception, so that no
    model's error handling takes it for one."""


@contextmanager
def _ending(calls: dict[RememberingNorm2d, int]) -> Iterator[None]:
    """One mini-batch's second pass, which ends as soon as each layer has been called so often; with
    no layers, it runs to its own end."""
    left = dict(calls)

    def called(layer: RememberingNorm2d) -> None:
        left[layer] -= 1
        if max(left.values()) <= 0:
            raise _NothingLeft

    for layer in left:
        layer._after_refresh = partial(called, layer)
    try:
        with suppress(_NothingLeft):
            yield
    finally:
        for layer in left:
            layer._after_refresh = _pass


def _pass() -> None: ...


def _calls(
    forwards: list[_Forward], wanting: list[RememberingNorm2d]
) -> list[dict[RememberingNorm2d, int]]:
    """After how many calls of the layers the second pass of each forward ends; {}: it does not.

    A forward that did not call one of the layers is repeated as a whole, since the layer may be
    called this time (a head that had no RoI); all are, if what layers staged in the iteration is
    not what was counted.
    """
    counted = {layer: sum(f.calls.get(layer, 0) for f in forwards) for layer in wanting}
    known = all(count == layer.memory.forwards for layer, count in counted.items())
    calls = [{layer: forward.calls.get(layer, 0) for layer in wanting} for forward in forwards]
    return [each if known and min(each.values()) > 0 else {} for each in calls]


@contextmanager
def _staging_anew(model: nn.Module, wanting: list[RememberingNorm2d]) -> Iterator[None]:
    """Lets the layers ``wanting`` make their pending entries anew, and nothing else change."""
    buffers = [(m, b, b.clone()) for m in model.modules() for b in m.buffers(recurse=False)]
    norms = [m for m in model.modules() if isinstance(m, (SmallBatchNorm2d, Chained))]
    told = [(m, k, vars(m)[k]) for m in norms for k in _OF_LATEST_FORWARD if k in vars(m)]
    layers = {m for m in (*norms, *wanting) if isinstance(m, SmallBatchNorm2d)}
    pending = {layer: layer.memory.begin_again() for layer in wanting}
    for layer in wanting:
        layer._after_refresh = _pass
    refreshed: set[nn.Module] = set()
    try:
        with unchanged(layers), kept_numbers(model):
            yield
        refreshed = {layer for layer in wanting if layer.memory.pending}
        for layer in refreshed:
            layer.memory.refreshed = True
    finally:
        for layer in wanting:
            layer._after_refresh = None
        for layer in pending.keys() - refreshed:  # not reached (no RoI), or the model raised
            layer.memory.restore(pending[layer])
        for owner, buffer, value in buffers:
            if owner not in refreshed:
                buffer.copy_(value)
        for norm, key, value in told:
            setattr(norm, key, value)
