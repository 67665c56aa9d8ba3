"""Memorized Batch Normalization (Guo, Wu, Deng, Chen, Tan; AAAI 2018, arXiv 2010.04947).

Each layer remembers mean and variance of its recent mini-batches, and normalises with a weighted
combination of them, in training and in evaluation alike. With ``i`` the age, 0 for the current
mini-batch, and ``k`` the window::

    eta_i = decay**i / sum_j decay**j                        i = 0 .. k - 1
    mu    = sum_i eta_i mu_i
    var   = sum_i eta_i (var_i + (mu_i - mu)**2)
    y     = gamma (x - mu) / sqrt(var + eps) + beta

What is remembered is a constant for the gradient, so the current mini-batch has the share eta_0 in
both moments. The optimiser step then moves the weights away from the entry just made. *Double
Forward* runs the same mini-batch again with the updated weights and puts the entry right
(:class:`cbn_det.norms.DoubleForward`).

The paper's equations and constants were not at hand. Ours are: geometric weights, the variance of
the pooled mini-batches (between them as well as within), and the defaults.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import clock
from .base import is_number
from .functional import Estimate, Moments, mixed_in, mixture
from .memory import push, share_out
from .remembering import RememberingNorm2d
from .spec import register_norm

_ENTRIES_BEFORE_WARNING = 8


@register_norm("MBN")
class MBN2d(RememberingNorm2d):
    """Memorized BatchNorm over [N, C, H, W]; BatchNorm2d's parameters, buffers and evaluation
    arithmetic.

    After burn-in ``running_mean`` and ``running_var`` *are* the combined statistics (the variance
    biased, as training uses it), rewritten by every recorded forward and by Double Forward; ``ema``
    and ``momentum`` are those of the burn-in.

    Args:
        num_features: channels C.
        window: iterations remembered, the current one included (1 is BatchNorm).
        decay: ratio of the weights of an entry and the one after it, in (0, 1]. By the default the
            current mini-batch has the share 0.24, and the window the noise of 6.4 equally weighted
            mini-batches.
        double_forward: whether the layer takes part in the second pass, for which the training loop
            uses :class:`cbn_det.norms.DoubleForward`.
        burn_in: how long to train as plain BatchNorm before statistics are remembered: optimiser
            steps (int), or a fraction of the schedule (float in (0, 1)) that
            :func:`cbn_det.norms.resolve_burn_in` turns into steps. While weights move fast,
            windows of all kinds failed in training from scratch.
        freeze, ema, momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 8,
        decay: float = 0.8,
        double_forward: bool = True,
        burn_in: int | float = 2 / 3,
        **shared: Any,
    ) -> None:
        super().__init__(num_features, **shared)
        if not (is_number(decay) and 0.0 < decay <= 1.0):
            raise ValueError(f"decay={decay!r}: expected a number above 0 and at most 1")
        if not isinstance(double_forward, bool):
            raise ValueError(f"double_forward={double_forward!r}: expected True or False")
        self.decay = decay
        self.double_forward = double_forward
        self._start_memory(window, burn_in=burn_in)

    @property
    def batch_share(self) -> float:
        """eta_0."""
        return _newest_share(self.window - 1, self.decay)

    def estimate(self, batch: Moments) -> Estimate:
        memory = self.memory
        if memory.older is None:  # no iteration before this one
            return super().estimate(batch)
        share = _newest_share(len(memory), self.decay)
        return Estimate(*mixed_in(batch.mean, batch.var, *memory.older, share), share)

    def stage(self, batch: Moments, estimate: Estimate, y: Tensor) -> None:
        memory = self.memory
        mean, var = batch.mean, batch.var
        combined = estimate.mean, estimate.var
        if memory.pending:  # every forward of an iteration counts the same
            share = 1.0 / (memory.forwards + 1)
            mean, var = combined = mixed_in(mean, var, *memory.pending.values(), share)
            if memory.older is not None:
                newest = _newest_share(len(memory), self.decay)
                combined = mixed_in(mean, var, *memory.older, newest)
        memory.pending = {"mean": mean, "var": var}
        torch._foreach_copy_([self.running_mean, self.running_var], list(combined))

    @classmethod
    def commit(cls, layers: list[MBN2d]) -> None:
        if not layers[0].memory.pending:
            return  # nothing has changed
        rows = push(layers, ("mean", "var"))
        memory = layers[0].memory
        weights = _weights(len(memory), memory.slot, layers[0].decay, rows.dtype, rows.device)
        share_out(layers, torch.stack(mixture(rows[:, 0], rows[:, 1], weights)))
        for layer in layers:
            layer._watch_second_pass()

    def group_for_commit(self) -> Hashable:
        return *super().group_for_commit(), self.decay

    def _watch_second_pass(self) -> None:
        memory, enough = self.memory, _ENTRIES_BEFORE_WARNING
        if self.double_forward and memory.pushed >= enough and not memory.refreshed_entries:
            clock.warn_once(
                "MBN layers have double_forward=True, and nobody runs the second pass: their memory"
                " is of weights before each step. Call cbn_det.norms.DoubleForward(model).refresh()"
                " after optimizer.step(), with the module that the training loop calls, or set"
                " MBN(double_forward=False)."
            )

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """``second_pass``: the share of remembered iterations that a second pass has put right, as
        a 0-dim tensor. Empty before anything is remembered, and with ``double_forward=False``."""
        memory = self.memory
        if not (self.double_forward and memory.pushed):
            return {}
        return {"second_pass": torch.tensor(memory.refreshed_entries / memory.pushed)}

    def _update_running(self, batch: Moments, estimate: Estimate) -> None:
        if self.is_batchnorm:
            super()._update_running(batch, estimate)
        else:
            self.num_batches_tracked.add_(1)  # stage() writes the statistics


@lru_cache(maxsize=256)
def _newest_share(entries: int, decay: float) -> float:
    """eta_0 beside so many entries."""
    return 1.0 / sum(decay**age for age in range(1 + entries))


@lru_cache(maxsize=256)
def _weights(
    entries: int, slot: int, decay: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[entries, 1]: of the entries of a ring, whose next free slot is given; they sum to 1."""
    newest_first = [decay**age for age in range(entries)]
    ages = [(slot - 1 - at) % entries for at in range(entries)]
    weights = [newest_first[age] / sum(newest_first) for age in ages]
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype).unsqueeze(1).to(device)
