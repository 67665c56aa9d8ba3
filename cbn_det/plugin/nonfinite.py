"""When numbers go bad: noticing it on all ranks at once, and naming the layer where it began."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from .signals import StopRequest


class Diverged(FloatingPointError):
    """A loss, parameter or running statistic is not finite.

    The message is empty on a rank that only learned of it from another.

    Attributes:
        agreed: all ranks raise it at this point, so collectives still work.
    """

    def __init__(self, message: str, agreed: bool = True) -> None:
        super().__init__(message)
        self.agreed = agreed


class PeerFailed(RuntimeError):
    """Another rank's forward pass failed; that rank reports why."""


class CheckedStep(SimpleTrainer):
    """A training step whose losses are checked between forward and backward.

    One all-reduce of three numbers tells every rank whether any of them has a loss that is not
    finite, failed in forward, or was asked to stop, so that all leave at the same iteration.
    """

    last_batch: Any = None
    bad_losses: tuple[str, ...] = ()
    stop_request: StopRequest = StopRequest()
    stop_agreed = False

    def run_step(self) -> None:
        # also called when forward raises, which is how other ranks learn of it
        handle = self.model.register_forward_hook(self._after_forward, always_call=True)
        try:
            super().run_step()
        except Diverged:
            raise
        except (
            FloatingPointError
        ) as error:  # detectron2's RPN refuses proposals that are not finite
            agreed = comm.get_world_size() == 1 or not has_sync_norm(self.model)
            raise Diverged(str(error), agreed) from error
        finally:
            handle.remove()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], losses: Any) -> None:
        self.last_batch = args[0]
        error = sys.exc_info()[1] if losses is None else None  # what forward is raising
        refused = isinstance(error, FloatingPointError)
        failed = losses is None and not refused
        if isinstance(losses, torch.Tensor):
            losses = {"total_loss": losses}
        values = {name: float(loss.detach()) for name, loss in (losses or {}).items()}
        self.bad_losses = tuple(name for name, value in values.items() if not math.isfinite(value))
        bad = refused or bool(self.bad_losses)
        flags = [float(bad), float(failed), float(self.stop_request.requested)]
        if comm.get_world_size() > 1:
            if losses is None and has_sync_norm(model):
                return  # the others wait inside a norm: this rank cannot tell them, it ends
            shared = torch.tensor(flags, device=next(model.parameters()).device)
            dist.all_reduce(shared)
            flags = shared.tolist()
        self.stop_agreed = flags[2] > 0
        if losses is None:
            return  # what forward raised goes on
        if flags[1]:
            raise PeerFailed("the forward pass of another rank failed")
        if flags[0]:
            raise Diverged(f"losses not finite: {', '.join(self.bad_losses)}" if bad else "")


class CheckedAMPStep(CheckedStep, AMPTrainer):
    """:class:`CheckedStep` in mixed precision; the gradient scaler works as in detectron2."""


def has_sync_norm(model: nn.Module) -> bool:
    """Whether the model's forward communicates with other ranks."""
    return any(
        isinstance(m, nn.SyncBatchNorm) or type(m).__name__ == "NaiveSyncBatchNorm"
        for m in model.modules()
    )


def check_state(model: nn.Module) -> None:
    """Raises on every rank if a parameter or running statistic of any rank is not finite.

    Raises:
        Diverged: one is not; :func:`first_bad_state` tells which.
    """
    bad = first_bad_state(model) is not None
    if comm.get_world_size() > 1:
        flag = torch.tensor([float(bad)], device=next(model.parameters()).device)
        dist.all_reduce(flag)
        bad = flag.item() > 0
    if bad:
        raise Diverged("weights or running statistics not finite")


def first_bad_state(model: nn.Module) -> str | None:
    """The first layer, in order of construction, with a parameter or statistic not finite."""
    for name, module in model.named_modules():
        bad = _bad_tensors(module)
        if bad:
            return f"{_layer(name, module)}: {', '.join(bad)} not finite"
    return None


@torch.no_grad()
def first_bad_layer(model: nn.Module, batch: Any, autocast: bool = False) -> str | None:
    """Runs one training forward pass and names the first layer, in forward order, whose output or
    running statistics are not finite.

    Args:
        model: the bare model (no DDP), in training mode. Its running statistics move.
        batch: what the training loader yields.
        autocast: run as mixed-precision training does.

    Returns:
        Such as ``"fpn.lateral (Conv2d): output not finite (its weight not finite)"``; None if all
        are finite.
    """
    found: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if found:
            return
        bad = _bad_tensors(module)
        statistics = [name for name in bad if name.startswith("running_")]
        name = names[module]
        if not _finite(output):
            if not _finite(args) and "." in name:
                # it came in broken: the enclosing module made it, as a convolution its norm's input
                name = name.rpartition(".")[0]
                module = model.get_submodule(name)
                bad = _bad_tensors(module)
            cause = f" (its {', '.join(bad)} not finite)" if bad else ""
            found.append(f"{_layer(name, module)}: output not finite{cause}")
        elif statistics:
            found.append(f"{_layer(name, module)}: {', '.join(statistics)} not finite")

    handles = [m.register_forward_hook(look) for m in names if m is not model]
    device = next(model.parameters()).device.type
    try:
        # the pass may itself refuse the numbers; what the hooks saw until then is what counts
        with contextlib.suppress(FloatingPointError), EventStorage():
            with torch.autocast(device, enabled=autocast):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _bad_tensors(module: nn.Module) -> list[str]:
    # other buffers (masks, anchors) may hold infinities on purpose
    buffers = module.named_buffers(recurse=False)
    statistics = [(name, tensor) for name, tensor in buffers if name.startswith("running_")]
    own = [*module.named_parameters(recurse=False), *statistics]
    return [name for name, tensor in own if not _finite(tensor)]


def _layer(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _float_tensors(value))


def _float_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _float_tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _float_tensors(item)
    elif hasattr(value, "get_fields"):  # detectron2's Instances
        yield from _float_tensors(value.get_fields())
    elif hasattr(value, "tensor"):  # Boxes, ImageList
        yield from _float_tensors(value.tensor)
