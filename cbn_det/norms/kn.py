"""Kalman Normalization (Wang, Peng, Luo, Wang, Lin; NeurIPS 2018; arXiv 1802.03133).

A layer's statistics are not estimated from its own mini-batch alone: those of the preceding layer,
pushed through what lies between, predict them, and prediction and observation are combined as in a
Kalman filter. With ``m, v`` the mini-batch's mean and variance, ``m', v'`` the prediction and ``p``
its weight::

    mean = p m' + (1 - p) m
    var  = p v' + (1 - p) v + p (1 - p) (m - m')^2

the moments of the mixture of both. In the order of the paper:

1. :mod:`.trace` runs a model once to see what precedes each layer; :mod:`.graph` has the rules.
2. :mod:`.chain` is what a layer knows of the layers that precede it.
3. :mod:`.prediction` has ``m', v'``; :mod:`.shared` evaluates those of all layers together.
4. :mod:`.posterior` mixes.

What follows the authors' released code, and where the paper or the code leaves a choice:

- The transition is the network itself: ReLU and the convolution with its own weight, no separate
  matrix. The authors draw a Gaussian sample and convolve it; here its expectation is taken in
  closed form. Covariances are diagonal and there is no process noise, as in their code.
- A layer hands on the distribution of its output, N(beta, gamma^2). The authors' code hands on the
  posterior of the layer's *input*, although what the next one sees is the normalised and scaled
  output: prediction and observation are then on different scales. These predictions were the closer
  ones by far (a mean off by 0.13 standard deviations instead of 0.66, on average over the layers of
  a ResNet-18 backbone early in training). They depend on weights only: a mini-batch enters a
  layer's statistics with the share ``1 - p`` and no other way.
- Evaluation is BatchNorm's, with running statistics of the posterior.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .base import SmallBatchNorm2d
from .chain import tracing
from .functional import Estimate, Moments
from .graph import mark
from .posterior import DEFAULT_GAIN, Predicting
from .spec import register_norm


@register_norm("KN")
class KN2d(Predicting, SmallBatchNorm2d):
    """Kalman Normalization over [N, C, H, W]; BatchNorm2d's parameters, buffers and evaluation.

    Which layers precede it is found in the first training forward
    (:func:`cbn_det.norms.kn_chain` shows it); where there is none it is BatchNorm, and a warning
    counts those layers after the first iteration. Where parts of the model are frozen or compiled,
    and under re-entrant activation checkpoints, whose first iteration would be BatchNorm and whose
    segments end chains, :func:`cbn_det.norms.find_chain` before training finds it whole (the
    trainers of this package call it).

    Args:
        num_features: channels C.
        gain: weight of the prediction, in [0, 1), 0 being BatchNorm.
        ema: what running statistics average. ``'pooled'``: first and second moments of the
            posterior; ``'batch'``: its mean and variance, which with a gain of 0 is BatchNorm's
            rule.
        freeze, momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(self, num_features: int, *, gain: float = DEFAULT_GAIN, **shared: Any) -> None:
        super().__init__(num_features, **shared)
        self._start_predicting(num_features, gain)
        self._input: Tensor | None = None  # during a forward

    @property
    def batch_share(self) -> float:
        """Of layers for which something is predicted, none of whose predictions is refused."""
        return 1.0 - self.gain

    def forward(self, input: Tensor) -> Tensor:
        if (self.training or tracing()) and not isinstance(input, Proxy):
            return self._take_part(input)
        return super().forward(input)

    # it looks at the graph, which a compiled forward does not have
    @torch.compiler.disable
    def _take_part(self, input: Tensor) -> Tensor:
        self.__dict__["_input"] = input
        try:
            output = super().forward(input)
            if input.numel() > 0:
                if not self.training:
                    self._look_for_chain(input)
                mark(output, self)
        finally:
            self.__dict__["_input"] = None
        return output

    @property
    def is_batchnorm(self) -> bool:
        return self.gain == 0 or self.recomputing_statistics

    def estimate(self, batch: Moments) -> Estimate:
        prediction = self._predict(self._input, batch.mean)
        if prediction is None:
            return super().estimate(batch)
        return self._mixed(prediction, batch.mean, batch.var)

    def averaged(self, batch: Moments, estimate: Estimate) -> Moments:
        mean, var, count = estimate.mean, estimate.var, batch.count
        if self.ema == "pooled" and isinstance(estimate.share, Tensor):
            # a mini-batch with the share 1 - p is one of so many values among more: its variance
            # is closer to the unbiased one than that of `count` values, as which it is counted
            among = count / (1.0 - self.gain)
            change = _unbiased(among) / _unbiased(count) - 1.0
            weight = self._compared[1]
            var = torch.addcmul(var, var, weight, value=change / self.gain)
        return Moments(mean, var, count)


def _unbiased(count: float) -> float:
    """What BatchNorm multiplies the variance of ``count`` values by."""
    return count / max(count - 1.0, 1.0)
