"""Counts what a step dispatches: on a GPU about so many kernels are launched, whatever their size.

The counts do not depend on the machine, and hardly on the size of the maps (CBN takes its positions
from more crops on larger ones). Tensors may be on any device, torch's ``meta`` device included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from timing import end_burn_in
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import stack_workload

from cbn_det.norms import resolve_burn_in

#: steps of a schedule whose burn-in lasts
_LONG = 10**6
#: iterations that are counted: a layer need not do the same in each
ITERATIONS = 8
# no views by their schema, and yet nothing is launched
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}


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


def layer_counts(norm: str, *, in_burn_in: bool = False) -> Counter[str]:
    """What ``ITERATIONS`` steps of two convolutions with their norms dispatch: forward, backward
    and optimiser step, and the second pass of norms that ask for it.

    Args:
        norm: "BN", "GN" or a spec of ours that fits 64 channels, its burn-in a fraction.
        in_burn_in: before the norm remembers; else all that it remembers is there.

    Raises:
        ValueError: an unknown norm, or one that does not fit.
    """
    work = stack_workload(norm, 2, (2, 64, 12, 12), "cpu")
    for _ in range(set_schedule(work.model, in_burn_in)):
        work.step()
    return count_steps(work.step)


def over_batchnorm(counts: Counter[str], batchnorm: Counter[str]) -> float:
    """Operations a layer and iteration over those of BatchNorm, both from :func:`layer_counts`."""
    return (counts.total() - batchnorm.total()) / (2 * ITERATIONS)
