"""Double Forward: the second forward pass of Memorized Batch Normalization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import clock
from .base import SmallBatchNorm2d, in_backward


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

    A forward pre-hook on the model keeps the inputs of every training forward, the state of torch's
    random generators (those of the CPU and of the model's device) and of autocast. Only references
    are kept, until :meth:`refresh`: inputs must not be changed in place before it. The second pass
    samples the same proposals and drops the same units. It runs in training mode without gradient;
    layers update in order, so that deeper ones see what refreshed ones put out. Each MBN layer
    replaces what it staged in the iteration, and with it its running statistics. Everything else is
    as before: the statistics and memory of all other layers, every other buffer, and the random
    state. Hooks on the modules run as in any forward.

    The last mini-batch's pass ends at the last layer that has something to refresh, since nothing
    behind it can matter: predictors, losses, heads without such layers. There is no second pass at
    all where no MBN layer asks for one: during burn-in, after they were frozen, with
    ``double_forward=False``; nor after a step that a GradScaler skipped, which is told from the
    optimiser's steps (the mini-batch then belongs to the next iteration, and is run again with it).

    Nothing is communicated between ranks by our layers. A model that has synchronising norms beside
    MBN would, in the second pass too, where ranks need not agree on where it ends: do not mix them.

    A model that is itself called through a re-entrant activation checkpoint is not recorded; parts
    of it may be.

    Args:
        model: of a DistributedDataParallel, the module inside is
            used.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self._forwards: list[_Forward] = []
        self._recorded_at = clock.now()
        self._running = False
        clock.install()
        self._handle = self.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def remove(self) -> None:
        """Stops recording and forgets what was recorded."""
        self._handle.remove()
        self._forwards = []

    def refresh(self) -> bool:
        """Runs the second pass of the iteration that an optimiser step has just ended.

        Returns:
            Whether there was one to run.

        Raises:
            Exception: what the model raises. Layers and random state are then as they were before
                the call.
        """
        if clock.now() == self._recorded_at:
            return False  # no step: what was recorded belongs to an iteration that goes on
        forwards, self._forwards = self._forwards, []
        layers = _layers(self.model)
        wanting = [
            m
            for m in layers
            if m.double_forward and m.training and m._staged and m._seen == self._recorded_at
        ]
        if not (forwards and wanting and self.model.training):
            return False
        devices = {layer.running_mean.device for layer in wanting}
        gpus = [device for device in devices if device.type == "cuda"]
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=gpus),
            _staging_anew(self.model, layers, wanting),
        ):
            self._running = True
            try:
                for forward in forwards:
                    forward.replay(self.model)
            except _NothingLeft:
                pass
            finally:
                self._running = False
        return True

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model has a copy of this among its hooks: without anybody's images
        return {**self.__dict__, "_forwards": []}

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running or not model.training or not torch.is_grad_enabled() or in_backward():
            return
        if self._recorded_at != clock.now():
            self._forwards, self._recorded_at = [], clock.now()
        layers = [m for m in _layers(model) if m.double_forward and m.training]
        if layers:
            self._forwards.append(_Forward.of(args, kwargs, layers[0].running_mean.device))


@dataclass
class _Forward:
    """One recorded forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    random_state: Tensor
    device_random_state: Tensor | None
    autocast: dict[str, Any]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> _Forward:
        on_gpu = device.type == "cuda"
        return _Forward(
            args,
            kwargs,
            device,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if on_gpu else None,
            {
                "device_type": device.type,
                "enabled": torch.is_autocast_enabled(device.type),
                "dtype": torch.get_autocast_dtype(device.type),
                "cache_enabled": False,  # casts of the weights before the step may be in the cache
            },
        )

    def replay(self, model: nn.Module) -> None:
        torch.set_rng_state(self.random_state)
        if self.device_random_state is not None:
            torch.cuda.set_rng_state(self.device_random_state, self.device)
        with torch.autocast(**self.autocast):
            model(*self.args, **self.kwargs)


class _NothingLeft(BaseException):
    """Ends the second pass: all that was staged has been staged anew. No Exception, so that no
    model's error handling takes it for one."""


def _layers(model: nn.Module) -> list[SmallBatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, SmallBatchNorm2d)]


@contextmanager
def _staging_anew(
    model: nn.Module, layers: list[SmallBatchNorm2d], wanting: list[SmallBatchNorm2d]
) -> Iterator[None]:
    """Lets the layers ``wanting`` stage anew what they staged, and nothing else change."""
    buffers = [(m, b, b.clone()) for m in model.modules() for b in m.buffers(recurse=False)]
    staged = {layer: (layer._staged, layer._staged_forwards) for layer in wanting}
    left = sum(layer._staged_forwards for layer in wanting)

    def after_refresh() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _NothingLeft

    for layer in layers:
        layer._in_second_pass = True
    for layer in wanting:
        layer._staged, layer._staged_forwards, layer._after_refresh = {}, 0, after_refresh
    refreshed: set[nn.Module] = set()
    try:
        yield
        refreshed = {layer for layer in wanting if layer._staged}
    finally:
        for layer in layers:
            layer._in_second_pass, layer._after_refresh = False, None
        for layer in staged.keys() - refreshed:  # not reached (no RoI), or the model raised
            layer._staged, layer._staged_forwards = staged[layer]
        for owner, buffer, value in buffers:
            if owner not in refreshed:
                buffer.copy_(value)
