"""BatchNorm first, SyncBatchNorm for the last part of training.

Statistics of all ranks' images are nearer to those that a model is tested with than those of one or
two images. They cost a collective in each layer's forward and backward pass. The CBN paper (arXiv
2002.05712, Table 7) reports that the last third of training is enough.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm

from .base import Forward, is_number
from .bn import BN2d
from .freeze import warn_of_no_schedule
from .functional import statistics_dtype, without_autocast
from .recalibration import in_backward
from .spec import register_norm


@register_norm("SyncBN")
class SyncBN2d(BN2d):
    """Synchronised Batch Normalization over [N, C, H, W].

    The kernels are those of ``nn.SyncBatchNorm`` on a GPU; two sums over the ranks on a CPU. A rank
    may have an empty input. Where no rank has any, running statistics stay on a CPU; on a GPU they
    are what ``nn.SyncBatchNorm`` makes of them.

    Args:
        num_features: channels C.
        start: fraction of the schedule, in [0, 1), before which it is BatchNorm. A training loop
            says when it has come by :class:`cbn_det.run.norm_schedule.NormSchedule`, which the
            trainers of this package and ``NormHook`` call.
        freeze, ema, momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.

    Attributes:
        start_steps: the iteration that ``start`` comes to; None until it is known.
        started: whether statistics are of all ranks now.

    Raises:
        ValueError: an option out of range.
    """

    start_steps: int | None = None

    def __init__(self, num_features: int, *, start: float = 0.0, **shared: Any) -> None:
        super().__init__(num_features, **shared)
        if not (is_number(start) and 0.0 <= start < 1.0):
            raise ValueError(
                f"start={start!r}: expected a number in [0, 1), the fraction of the schedule before"
                " which it is BatchNorm"
            )
        self.start = start
        self.started = start == 0.0

    @property
    def _is_synchronised(self) -> bool:
        return self.started and _ranks() > 1

    def _begin(self, input: Tensor, how: Forward) -> None:
        super()._begin(input, how)
        if not self.started and self.start_steps is None:
            warn_of_no_schedule(self, "start")

    @torch.compiler.disable
    def _train(self, input: Tensor) -> Tensor:
        if not self._is_synchronised:
            return super()._train(input)
        self._check_input_dim(input)
        how = Forward(torch.is_grad_enabled(), in_backward())
        self._begin(input, how)
        momentum, moves = self.momentum, not (how.repeated or self._unchanged)
        if momentum is None or (self.recomputing_statistics and self.ema == "pooled"):
            count = float(self.num_batches_tracked) + moves
            momentum = max(momentum or 0.0, 1.0 / max(count, 1.0))
        with without_autocast(input.device):
            return self._batchnorm(input, moves, momentum)

    def _over_batch(self, x: Tensor, mean: Tensor, var: Tensor, momentum: float) -> Tensor:
        """The mini-batch is that of all ranks."""
        if not self._is_synchronised:
            return super()._over_batch(x, mean, var, momentum)
        if x.device.type != "cpu":
            # an empty rank sends its dtype, which others take for that of their statistics
            given = x if x.numel() else x.to(statistics_dtype(x))
            rest = self.weight, self.bias, mean, var, self.eps, momentum, dist.group.WORLD, _ranks()
            return SyncBatchNorm.apply(given, *rest).to(x.dtype)
        exact = x.to(statistics_dtype(x))
        count = exact.new_full((1,), x.numel() // x.shape[1])
        sums = _SumOverRanks.apply(torch.cat((exact.sum((0, 2, 3)), count)))
        total = sums[-1].clamp(min=1.0)
        found = sums[:-1] / total
        centred = exact - found.view(1, -1, 1, 1)
        spread = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            unbiased = spread * (total / (total - 1.0).clamp(min=1.0))
            # not where every rank's input is empty
            moves = momentum * (sums[-1] > 0).to(sums.dtype)
            for running, value in ((mean, found), (var, unbiased)):
                running.lerp_(value.to(running.dtype), moves.to(running.dtype))
        output = centred * (spread + self.eps).rsqrt().view(1, -1, 1, 1)
        if self.affine:
            output = output * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return output.to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """A sum over the ranks, whose gradient is that of the sum of the ranks' losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
