"""The update of Kalman Normalization: prediction and observation of a layer's statistics, mixed.

The gain is a constant: the weight ``p`` of the prediction, as the authors' code names it. The guard
is theirs, too: where predicted variances are 100 times the mini-batch's or more, on average over
channels, the layer takes the mini-batch's statistics as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import is_number
from .chain import Chained
from .functional import Estimate

#: Weight of the prediction, chosen for 1 or 2 images: in the first 100 iterations of a Faster R-CNN
#: R18-FPN on the digits set, 0.2 to 0.3 brought mean and variance of single mini-batches closest to
#: those of many images. At 0.9, the authors' value for 2 samples of CIFAR-10, they are farther.
DEFAULT_GAIN = 0.2
#: ratio of predicted to observed variance from which on a prediction is not believed
GUARD = 100.0


def posterior(
    prediction: Tensor, mean: Tensor, var: Tensor, gain: float, eps: float
) -> tuple[Tensor, ...]:
    """Mean and variance [..., C] of prediction [2, ..., C] and observation, for the gain ``p``::

        mean = p m' + (1 - p) m
        var  = p v' + (1 - p) v + p (1 - p) (m - m')^2

    Then what the prediction differs by [2, ..., C], 0 where it is refused; predicted variance by
    observed, on average over channels [..., 1], and whether it is believed."""
    observed = torch.stack((mean, var))
    ratio = (prediction[1].detach() / (var + eps)).mean(-1, keepdim=True)
    believed = ratio < GUARD  # also refuses what is not finite
    difference = torch.where(believed, prediction, observed) - observed
    mean, var = torch.add(observed, difference, alpha=gain).unbind()
    var = torch.addcmul(var, difference[0], difference[0], value=gain * (1.0 - gain))
    return mean, var, difference, ratio, believed


class _Posterior(torch.autograd.Function):
    """The same with the gradient of the prediction; the observation is a constant."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, mean: Tensor, var: Tensor, gain: float, eps: float):
        mean, var, difference, ratio, believed = posterior(prediction, mean, var, gain, eps)
        shares = torch.where(believed, *_shares(gain, mean.dtype, mean.device))
        share, weight = shares.split(1, -1)
        ctx.gain = gain
        ctx.save_for_backward(difference, weight)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(share, weight, difference, ratio)
        return mean, var, share, weight, difference, ratio

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        difference, weight = ctx.saved_tensors
        by_mean = torch.addcmul(d_mean, difference[0], d_var, value=2.0 * (1.0 - ctx.gain))
        return torch.stack((by_mean, d_var)) * weight, None, None, None, None


@lru_cache(maxsize=64)
def _shares(gain: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of observation and prediction, where that is believed and where it is not; made once."""
    with torch.inference_mode(False):
        return torch.tensor([[1.0 - gain, gain], [1.0, 0.0]], dtype=dtype, device=device).unbind()


class Predicting(Chained):
    """What KN and GKN have in common: the gain and the update."""

    gain: float
    eps: float

    def _start_predicting(self, channels: int, gain: float) -> None:
        self._start_chain(channels)
        if not (is_number(gain) and 0.0 <= gain < 1.0):
            raise ValueError(f"gain={gain!r}: expected a number in [0, 1)")
        self.gain = gain
        self._compared: tuple[Tensor, ...] = ()  # prediction and observation, for diagnostics

    @property
    def predicts(self) -> bool:
        return self.gain != 0

    def _mixed(self, prediction: Tensor, mean: Tensor, var: Tensor) -> Estimate:
        """Of a prediction [2, ..., C] and an observation [..., C]; the share is [..., 1]."""
        found = _Posterior.apply(prediction, mean, var, self.gain, self.eps)
        self.__dict__["_compared"] = (var, *found[3:])  # past Module.__setattr__, which takes long
        return Estimate(*found[:3])

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Of the latest forward that predicted, 0-dim tensors: the share of predictions that the
        guard refused; of the others, the error of the mean in standard deviations of the
        mini-batch, and the variance relative to the mini-batch's, averaged over channels."""
        if not self._compared:
            return {}
        var, weight, difference, ratio = self._compared
        believed = weight > 0
        error = difference[0].abs() / (var + self.eps).sqrt()
        return {
            "guarded": 1.0 - believed.to(var.dtype).mean(),
            "prediction_mean": error.mean(),
            "prediction_var": torch.where(believed, ratio, 0.0).mean(),
        }
