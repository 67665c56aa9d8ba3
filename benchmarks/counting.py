"""Counts what a step dispatches: on a GPU about so many kernels are launched, whatever their size.

The counts do not depend on the machine, and hardly on the size of the maps (CBN takes its positions
from more crops on larger ones). Tensors may be on any device, torch's ``meta`` device included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from worker import end_burn_in
from workloads import build_layer_norm

from cbn_det.norms import DoubleForward, resolve_burn_in

#: steps of a schedule whose burn-in lasts
_LONG = 10**6
#: iterations that are counted: a layer need not do the same in each
ITERATIONS = 8
# no views by their schema, and yet nothing is launched
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}
CHANNELS = 64  # of each layer that is counted


class DispatchCounter(TorchDispatchMode):
    """Counts, within it, the operations that torch dispatches, by name (``aten.add.Tensor``).

    Views are left out: operations all of whose results are parts of an argument that is not
    written to; ``detach`` is one. A multi-tensor operation (``_foreach_add_``) counts once.
    What a backward pass of a GPU does in autograd's own thread is counted too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not _launches_nothing(func):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _launches_nothing(func: Any) -> bool:
    name = func._schema.name.split("::")
    if name[0] == "profiler" or name[1] in _NO_KERNEL:
        return True
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in aliases)


def count_steps(step: Callable[[], None], iterations: int = ITERATIONS) -> Counter[str]:
    """What ``iterations`` calls of ``step`` dispatch together."""
    with DispatchCounter() as counter:
        for _ in range(iterations):
            step()
    return counter.counts


def set_schedule(model: nn.Module, in_burn_in: bool = False) -> int:
    """Has the norms stay in their burn-in, or sets them past it. Returns the steps to make before
    anything is counted."""
    if in_burn_in:
        resolve_burn_in(model, _LONG)
        return 1
    return 1 + end_burn_in(model)


def training_step(
    model: nn.Sequential, shape: tuple[int, int, int, int], device: str
) -> Callable[[], None]:
    """Forward, backward, optimiser step and Double Forward of a stack on one input [N, C, H, W]."""
    x = torch.randn(shape, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
    twice = any(getattr(layer, "double_forward", False) for layer in model)
    double_forward = DoubleForward(model) if twice else None

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if double_forward is not None:
            double_forward.refresh()

    return step


def pairs(norm: str, count: int, channels: int, device: str) -> nn.Sequential:
    """So many 3x3 convolutions, each with its norm and ReLU.

    Raises:
        ValueError: an unknown norm, or one that does not fit the channels.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(count):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers += [conv, build_layer_norm(norm, channels), nn.ReLU()]
    return nn.Sequential(*layers).to(device)


def layer_step(norm: str, *, in_burn_in: bool = False, device: str = "cpu") -> Callable[[], None]:
    """A step of two convolutions with their norms: forward, backward and optimiser step, and the
    second pass of norms that ask for it.

    Args:
        norm: "BN", "GN" or a spec of ours that fits 64 channels, its burn-in a fraction.
        in_burn_in: before the norm remembers; else all that it remembers is there.

    Raises:
        ValueError: an unknown norm, or one that does not fit.
    """
    model = pairs(norm, 2, CHANNELS, device)
    step = training_step(model, (2, CHANNELS, 12, 12), device)
    for _ in range(set_schedule(model, in_burn_in)):
        step()
    return step


def layer_counts(norm: str, *, in_burn_in: bool = False, device: str = "cpu") -> Counter[str]:
    """What ``ITERATIONS`` steps of :func:`layer_step` dispatch."""
    return count_steps(layer_step(norm, in_burn_in=in_burn_in, device=device))


def over_batchnorm(counts: Counter[str], batchnorm: Counter[str]) -> float:
    """Operations a layer and iteration over those of BatchNorm, both from :func:`layer_counts`."""
    return (counts.total() - batchnorm.total()) / (2 * ITERATIONS)
