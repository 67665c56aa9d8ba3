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

Of the paper we know the structure: statistics of several recent mini-batches, the second forward
pass, the same behaviour in training and inference. Its equations and constants were not at hand, so
these are ours: geometric weights, the variance of the pooled mini-batches (between them as well as
within), and the defaults.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import clock
from .base import Estimate, SmallBatchNorm2d, is_number
from .conv_call import ConvCall
from .functional import Moments, mixture
from .schedule import Scheduled
from .spec import register_norm
from .window import Window

_ENTRIES_BEFORE_WARNING = 8


@register_norm("MBN")
class MBN2d(Scheduled, SmallBatchNorm2d):
    """Memorized BatchNorm over [N, C, H, W]; BatchNorm2d's parameters, buffers and evaluation
    arithmetic.

    After burn-in ``running_mean`` and ``running_var`` are no running averages: they *are* the
    combined statistics (the variance biased, as training uses it), rewritten by every recorded
    forward and by Double Forward. ``ema`` and ``momentum`` are those of the burn-in.

    Args:
        num_features: channels C.
        window: iterations remembered, the current one included (1 is BatchNorm). At the usual 1 or
            2 images per GPU the default pools 8 or 16 images.
        decay: ratio of the weights of an entry and the one after it, in (0, 1]. Entries other than
            the newest are of older weights still, and count for less the older they are: by the
            default the current mini-batch has the share 0.24, and the window the noise of 6.4
            equally weighted mini-batches.
        double_forward: whether the layer takes part in the second pass. It needs a training loop
            that uses :class:`cbn_det.norms.DoubleForward`.
        burn_in: how long to train as plain BatchNorm before statistics are remembered. An int is a
            number of optimiser steps, a float in (0, 1) a fraction of the schedule
            (:func:`cbn_det.norms.resolve_burn_in`). While weights move fast, remembered statistics
            do more harm than good: windows of all kinds failed early in training from scratch.
        ema, momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.

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
        ema: str = "pooled",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(
            num_features, ema=ema, momentum=momentum, eps=eps, affine=affine, **factory
        )
        if type(window) is not int or window < 1:
            raise ValueError(
                f"window={window!r}: expected an int, 1 or more (it counts the current iteration)"
            )
        if not (is_number(decay) and 0.0 < decay <= 1.0):
            raise ValueError(f"decay={decay!r}: expected a number above 0 and at most 1")
        if not isinstance(double_forward, bool):
            raise ValueError(f"double_forward={double_forward!r}: expected True or False")
        self.window = window
        self.decay = decay
        self.double_forward = double_forward
        self._set_times(burn_in=burn_in)
        self._window = Window(window - 1) if window > 1 else None
        self._entries = 0  # iterations remembered so far
        self._refreshed_entries = 0  # of these, those with a second pass

    def options(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "decay": self.decay,
            "double_forward": self.double_forward,
            "burn_in": self.burn_in,
            **super().options(),
        }

    @property
    def batch_share(self) -> float:
        """eta_0."""
        return 1.0 / sum(self.decay**age for age in range(self.window))

    @property
    def remembers(self) -> bool:
        """Whether the present iteration will be remembered: there is a window, and burn-in is
        over."""
        return self._window is not None and not self.in_burn_in

    def estimate(self, batch: Moments) -> Estimate:
        if not self._memory_takes_part():
            return Estimate(batch.mean, batch.var, 1.0)
        return Estimate(*self._combined(batch.mean, batch.var))

    def _combined(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance [C] of the newest entry, given, and of those remembered before it; and
        the newest one's weight eta_0 [C]."""
        older_mean, older_var = self._window["mean"], self._window["var"]
        # a step that overflowed and was skipped by a GradScaler leaves its forward behind
        valid = torch.isfinite(older_mean) & torch.isfinite(older_var)
        older_mean = torch.where(valid, older_mean, 0.0)
        older_var = torch.where(valid, older_var, 0.0)
        weights = valid * self.decay ** (1.0 + self._window.ages()).to(mean.dtype).unsqueeze(1)
        weights = torch.cat([torch.ones_like(mean)[None], weights])
        weights = weights / weights.sum(0)
        means, variances = torch.cat([mean[None], older_mean]), torch.cat([var[None], older_var])
        return *mixture(means, variances, weights), weights[0]

    def stage(self, batch: Moments, y: Tensor, call: ConvCall | None) -> None:
        if not self.remembers:
            return
        mean, var = batch.mean, batch.var
        if self._staged:  # every forward of an iteration counts the same
            share = 1.0 / (self._staged_forwards + 1)
            means = torch.stack([self._staged["mean"], mean])
            variances = torch.stack([self._staged["var"], var])
            mean, var = mixture(means, variances, mean.new_tensor([[1.0 - share], [share]]))
        self._staged = {"mean": mean, "var": var}
        if len(self._window):
            mean, var, _ = self._combined(mean, var)
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)

    def commit(self) -> None:
        if self._staged:
            self._window.push(self._staged)
            self._entries += 1
            self._refreshed_entries += self._refreshed
            self._watch_second_pass()

    def _watch_second_pass(self) -> None:
        if self.double_forward and self._entries >= _ENTRIES_BEFORE_WARNING:
            if not self._refreshed_entries:
                clock.warn_once(
                    "MBN layers have double_forward=True, and nobody runs the second pass: their"
                    " memory is of weights before each step. Call"
                    " cbn_det.norms.DoubleForward(model).refresh() after optimizer.step(), with the"
                    " module that the training loop calls, or set MBN(double_forward=False)."
                )

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """``second_pass``: the share of remembered iterations that a second pass has put right, as
        a 0-dim tensor. Empty before anything is remembered, and with ``double_forward=False``."""
        if not (self.double_forward and self._entries):
            return {}
        return {"second_pass": torch.tensor(self._refreshed_entries / self._entries)}

    def memory_state_dict(self) -> dict[str, Any]:
        passes = [self._entries, self._refreshed_entries, self._refreshed]
        return {**super().memory_state_dict(), "second_passes": passes}

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        super().load_memory_state_dict(state)
        passes = state.get("second_passes", (0, 0, False))  # version 0.1 did not count
        self._entries, self._refreshed_entries, self._refreshed = passes

    def _update_running(self, batch: Moments, estimate: Estimate) -> None:
        if self.remembers and not self.recomputing_statistics:
            self.num_batches_tracked += 1  # stage() writes the statistics
        else:
            super()._update_running(batch, estimate)
