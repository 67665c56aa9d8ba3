"""When numbers go bad: noticing it on all ranks at once, and naming the layer where it began."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


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


def check_state(model: nn.Module) -> None:
    """Raises on every rank if a parameter or running statistic of any rank is not finite.

    Raises:
        Diverged: one is not; :func:`first_bad_state` tells which.
    """
    bad = first_bad_state(model) is not None
    if dist.is_available() and dist.is_initialized():
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
def first_bad_layer(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Runs one training forward pass and names the first layer, in forward order, whose output or
    running statistics are not finite.

    Args:
        model: the bare model (no DDP), in training mode. Its running statistics move.
        forward: runs it on a training batch.

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
    try:
        # the pass may itself refuse the numbers; what the hooks saw until then is what counts
        with contextlib.suppress(FloatingPointError):
            forward()
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
