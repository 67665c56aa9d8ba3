"""Batch Renormalization (Ioffe; NeurIPS 2017, arXiv 1702.03275).

The mini-batch normalises, and a correction towards the running statistics is applied to what comes
out, so that training sees nearly what evaluation will::

    y = gamma ((x - mu_B) / sigma_B * r + d) + beta
    r = clip(sigma_B / sigma, 1 / r_max, r_max)
    d = clip((mu_B - mu) / sigma, -d_max, d_max)

``sigma_B = sqrt(var_B + eps)`` is the mini-batch's, ``mu`` and ``sigma = sqrt(var + eps)`` are the
running statistics. ``r`` and ``d`` are constants for the gradient, which is therefore BatchNorm's,
times r. Within the limits, y is x normalised by the running statistics; at ``r_max = 1`` and
``d_max = 0`` it is BatchNorm, where training starts. Three things are our choice:

- The running variance is averaged, as BatchNorm does it, and not its root.
- Both limits grow along one linear ramp.
- ``mu`` and ``sigma`` are held for the length of an iteration: all forwards of an accumulated
  batch, and the recomputation of an activation checkpoint, see the same.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .base import Forward, is_number
from .functional import Estimate, Moments, filled_like, inverse_std, statistics_dtype
from .memory import instead_of, share_out
from .remembering import RememberingNorm2d
from .spec import register_norm


@register_norm("BRN")
class BRN2d(RememberingNorm2d):
    """Batch Renormalization over [N, C, H, W]; BatchNorm2d's parameters, buffers and evaluation.

    The running statistics take part in training: forwards without gradient in training mode move
    them, too. Where a mini-batch made them nan or infinite, they are put back, before the next
    iteration and before evaluation, to those that the iteration began with. Where a
    DistributedDataParallel broadcasts buffers, as torch's does, rank 0's are the reference of all.

    Args:
        num_features: channels C.
        r_max: upper limit of r, its inverse the lower one; 1 or more.
        d_max: limit of the size of d, in running standard deviations; 0 or more.
        burn_in: how long to train as plain BatchNorm: optimiser steps (int), or a fraction of the
            schedule (float in (0, 1)) that :func:`cbn_det.norms.resolve_burn_in` turns into steps.
        ramp: how long, after that, the limits grow from (1, 0) to (r_max, d_max); likewise.
        momentum: of the running statistics; smaller than BatchNorm's, as they are the reference.
        freeze, ema, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`. The paper's average
            is nearer to ``ema='batch'``.

    Raises:
        ValueError: an option out of range.
    """

    averages_batch = True

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        burn_in: int | float = 0.1,
        ramp: int | float = 0.3,
        momentum: float | None = 0.01,
        **shared: Any,
    ) -> None:
        super().__init__(num_features, momentum=momentum, **shared)
        if not (is_number(r_max) and r_max >= 1.0):
            raise ValueError(f"r_max={r_max!r}: expected a number, 1 or more")
        if not (is_number(d_max) and d_max >= 0.0):
            raise ValueError(f"d_max={d_max!r}: expected a number, 0 or more")
        self.r_max = r_max
        self.d_max = d_max
        self._start_memory(1, burn_in=burn_in, ramp=ramp)
        self._compared: tuple[Tensor, ...] = ()  # r and d before and after, for diagnostics

    @property
    def batch_share(self) -> float:
        """Within its limits the running statistics normalise."""
        return 0.0

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Of the latest forward, 0-dim tensors: shares of channels whose r or d is at its limit.
        Empty during burn-in."""
        if not self._compared:
            return {}
        ratio, scale, distance, shift = self._compared
        return {
            "r_at_limit": (scale != ratio).to(scale.dtype).mean(),
            "d_at_limit": (shift != distance).to(shift.dtype).mean(),
        }

    def limits(self) -> tuple[float, float]:
        """r_max and d_max at the present iteration."""
        done = self.steps - self.burn_in_steps
        progress = (
            min(max(done / self.ramp_steps, 0.0), 1.0) if self.ramp_steps else float(done >= 0)
        )
        return 1.0 + progress * (self.r_max - 1.0), progress * self.d_max

    @property
    def is_batchnorm(self) -> bool:
        if self.recomputing_statistics:
            return True
        self._require_times()
        return self.limits() == (1.0, 0.0)

    def estimate(self, batch: Moments) -> Estimate:
        dtype = batch.mean.dtype
        mean, reference = (v.to(dtype) for v in (self.memory.older[0], self.memory.kept["invstd"]))
        r_max, d_max = self.limits()
        minus_eps = filled_like(mean, -self.eps)
        invstd, distance = torch._foreach_sub([batch.var, batch.mean], [minus_eps, mean])
        ratio = reference / invstd.rsqrt_()
        distance.mul_(reference)
        scale, shift = ratio.clamp(1.0 / r_max, r_max), distance.clamp(-d_max, d_max)
        self._compared = (ratio, scale, distance, shift)
        return Estimate(batch.mean, batch.var, 1.0, scale=scale, shift=shift, invstd=invstd)

    # ---- the reference ----

    def _begin(self, input: Tensor, how: Forward) -> None:
        super()._begin(input, how)
        if self.recomputing_statistics:
            self.memory.forget_entries()  # the reference of what follows is where this ends
        elif not self.memory.pushed:
            with torch.inference_mode(False), torch.no_grad():
                self.commit([self])

    @classmethod
    def commit(cls, layers: list[BRN2d]) -> None:
        now = _put_back(layers)
        share_out(layers, now)
        invstd = inverse_std(now[1].to(statistics_dtype(now)), layers[0].eps)
        widths = [layer.num_features for layer in layers]
        for layer, part in zip(layers, invstd.split(widths), strict=True):
            layer.memory.kept["invstd"] = part
            layer.memory.pushed = 1

    def group_for_commit(self) -> Hashable:
        return *super().group_for_commit(), self.eps

    def train(self, mode: bool = True) -> BRN2d:
        if self.training and not mode and self.memory.pushed:
            with torch.no_grad():
                _put_back([self])
        return super().train(mode)


def _put_back(layers: list[BRN2d]) -> Tensor:
    """The running statistics [2, sum of channels] of several layers, in channels where they are not
    finite put back to those that the iteration began with."""
    running = [n.running_mean for n in layers] + [n.running_var for n in layers]
    now = torch.cat(running).view(2, -1)
    now = torch.where(now[1] < math.inf, now, instead_of(layers))  # no nan either
    widths = [layer.num_features for layer in layers]
    torch._foreach_copy_(running, [*now[0].split(widths), *now[1].split(widths)])
    return now
