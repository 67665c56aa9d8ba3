"""Batch Group Normalization (Zhou, Sun, Ye, Lan, Luo, Lai, Esperanca, Yang, Li; arXiv 2012.02782).

Statistics are taken over the mini-batch *and* over groups of channels, so that few images still
give many values. With ``G`` groups of ``C / G`` neighbouring channels, ``c`` in group ``g``::

    mu_g  = E[x]             over n, the channels of g, h, w
    var_g = E[(x - mu_g)**2]
    y_c   = gamma_c (x_c - mu_g) / sqrt(var_g + eps) + beta_c

``G = C`` is BatchNorm, ``G = 1`` takes one mean and one variance of the whole mini-batch. Of one
image, BGN in training is GroupNorm, and has its kernels. Nothing is remembered, and no parameter is
added. Running statistics are those of the groups, kept a channel each, so that evaluation is
BatchNorm's and folds into the convolution.

The paper merges channels, height and width into one axis and cuts that into G pieces. Where these
would end in the middle of a channel, the layer takes ``gcd(G, C)`` groups; a G above C, whose
pieces would be slabs of one feature map, is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import SmallBatchNorm2d
from .functional import (
    Estimate,
    GroupMoments,
    Moments,
    group_mean,
    moments_of_groups,
    to_channels,
)
from .spec import register_norm

#: Against the direction of the paper, whose abstract has small batches pool over more channels, in
#: fewer groups. Best of those tried at 2 images, from scratch, one seed each. Digits, 600
#: iterations, AP of 1, 2, 4, 8, 16 and 32: 10.8, 8.4, 8.7, 11.0, 12.3 and 14.3 (BatchNorm 10.1).
#: Blood cells (BCCD), 200 iterations, 2, 8 and 32: 8.7, 23.0 and 35.4 (BatchNorm 31.9).
DEFAULT_GROUPS = 32


@register_norm("BGN")
class BGN2d(SmallBatchNorm2d):
    """Batch Group Normalization over [N, C, H, W]; BatchNorm2d's parameters, buffers and
    evaluation.

    Args:
        num_features: channels C.
        groups: G, the number of groups of channels; fewer groups pool more values. The layer has
            ``groups_used``, ``gcd(groups, C)``. None: ``DEFAULT_GROUPS``, or C if that is less.
        freeze, ema, momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.

    Raises:
        ValueError: an option out of range; more groups than channels.
    """

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(num_features, **shared)
        if groups is not None and (type(groups) is not int or groups < 1):
            raise ValueError(f"groups={groups!r}: expected an int, 1 or more, or None")
        if groups is not None and groups > num_features:
            raise ValueError(
                f"groups={groups} at a layer of {num_features} channels: every group would be a"
                f" slab of a feature map; expected at most {num_features} (which is BatchNorm)"
            )
        self.groups = groups
        self.groups_used = math.gcd(groups or min(DEFAULT_GROUPS, num_features), num_features)

    def _normalized(
        self, input: Tensor, moving: bool, is_batchnorm: bool
    ) -> tuple[Tensor, Moments, Estimate]:
        dtypes = {t.dtype for t in (input, self.running_mean, self.weight) if t is not None}
        if len(input) > 1 or len(dtypes) > 1 or input.dtype.itemsize < 4:
            return super()._normalized(input, moving, is_batchnorm)
        _, channels, height, width = input.shape
        output, mean, invstd = torch.native_group_norm(
            *(input, self.weight, self.bias),
            *(1, channels, height * width, self.groups_used, self.eps),
        )
        with torch.no_grad():
            var = invstd.pow(-2).sub_(self.eps).clamp_(min=0.0)
            mean, var = to_channels([mean, var], channels)
        batch = Moments(mean, var, input.numel() // self.groups_used)
        return output, batch, Estimate(mean, var, 1.0)

    def batch_moments(self, y: Tensor) -> GroupMoments:
        return moments_of_groups(y, self.groups_used, self.eps)

    def estimate(self, batch: GroupMoments) -> Estimate:
        known = {"invstd": batch.invstd, "of_groups": batch.of_groups}
        return Estimate(batch.mean, batch.var, 1.0, self.groups_used, **known)

    @property
    def is_batchnorm(self) -> bool:
        return self.groups_used == self.num_features

    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        pooled = group_mean(mean, self.groups_used)
        super().set_statistics(pooled, group_mean(var + (mean - pooled).square(), self.groups_used))
