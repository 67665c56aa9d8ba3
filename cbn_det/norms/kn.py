"""Kalman Normalization (Wang, Peng, Luo, Wang, Lin; NeurIPS 2018; arXiv 1802.03133).

A layer's statistics are not estimated from its own mini-batch alone: those of the preceding layer,
pushed through what lies between, predict them, and prediction and observation are combined as in a
Kalman filter. With ``m, v`` the mini-batch's mean and variance, ``m', v'`` the prediction and ``p``
its weight::

    mean = p m' + (1 - p) m
    var  = p v' + (1 - p) v + p (1 - p) (m - m')^2

which are mean and variance of the mixture of both. What follows the authors' released code, and
where the paper or the code leaves a choice:

- The transition is the network itself: ReLU and the convolution with its own weight, no separate
  matrix. The authors draw a Gaussian sample and convolve it; here its expectation is taken in
  closed form (:mod:`.prediction`). Covariances are diagonal and there is no process noise, as in
  their code.
- The gain is a constant. (Their code names the weight of the prediction, as here.)
- The guard is theirs: where predicted variances are 100 times the mini-batch's or more, on average
  over channels, the layer takes the mini-batch's statistics as they are.
- A layer hands on the distribution of its output, N(beta, gamma^2). The authors' code hands on the
  posterior ``mean, var`` of the layer's *input*, although what the next one sees is the normalised
  and scaled output: the prediction is then on another scale than the observation. Here predictions
  depend on weights only, and a mini-batch enters a layer's statistics with the share ``1 - p`` and
  no other way. Of two estimates that are mixed both should be of the same quantity, and these
  predictions were the closer ones by far (a mean off by 0.13 standard deviations instead of 0.66,
  on average over the layers of a ResNet-18 backbone early in training).
- Evaluation is BatchNorm's, with running statistics of the posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .base import SmallBatchNorm2d, is_number
from .chain import Chained, tracing
from .functional import Estimate, Moments
from .propagation import Pair
from .spec import register_norm

#: Weight of the prediction, chosen for 1 or 2 images: in the first 100 iterations of a Faster R-CNN
#: R18-FPN on the digits set, mixing in 0.2 to 0.3 brought mean and variance of single mini-batches
#: closest to those of many images (squared error of the log variance at 1 image, after 1, 30 and
#: 100 iterations: 0.054, 0.064, 0.070 without, 0.037, 0.047, 0.056 with 0.2). It takes back a fifth
#: to a third of the noise and no more; predictions grow less exact in training, and at 0.9, the
#: authors' value for 2 samples of CIFAR-10, the error is larger than without.
DEFAULT_GAIN = 0.2
#: ratio of predicted to observed variance from which on a prediction is not believed
GUARD = 100.0


class Predicting(Chained):
    """What KN and GKN have in common: the gain and the prediction."""

    gain: float
    eps: float

    def _start_predicting(self, gain: float) -> None:
        self._start_chain()
        if not (is_number(gain) and 0.0 <= gain < 1.0):
            raise ValueError(f"gain={gain!r}: expected a number in [0, 1)")
        self.gain = gain
        self._compared: tuple[Tensor, ...] = ()  # prediction and observation, for diagnostics

    @property
    def predicts(self) -> bool:
        return self.gain != 0

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Of the latest forward that predicted, 0-dim tensors: the share of predictions that the
        guard refused; of the others, the error of the mean in standard deviations of the
        mini-batch, and the variance relative to the mini-batch's, averaged over channels."""
        if not self._compared:
            return {}
        difference, var, ratio, weight = self._compared
        believed = weight > 0
        error = difference[0].abs() / (var + self.eps).sqrt()
        return {
            "guarded": 1.0 - believed.to(var.dtype).mean(),
            "prediction_mean": error.mean(),
            "prediction_var": torch.where(believed, ratio, 0.0).mean(),
        }

    def _mixed(self, y: Tensor, like: Tensor, mixing: Posterior) -> Estimate | None:
        """Mean, variance and share of an observation, mixed with what is predicted for the input
        ``y``, of the dtype of ``like``; None where nothing is."""
        found = self._predict(y, like, mixing)
        if found is None:
            return None
        compared = (mixing.difference, mixing.var, mixing.ratio, mixing.weight)
        self.__dict__["_compared"] = compared  # past Module.__setattr__, which takes long
        return Estimate(*found, mixing.share)


def posterior(
    prediction: Tensor, mean: Tensor, var: Tensor, gain: float, eps: float
) -> tuple[Tensor, ...]:
    """Mean and variance [..., C] of prediction [2, ..., C] and observation; what the prediction
    differs by [2, ..., C], 0 where it is refused; predicted variance by observed, on average over
    channels [..., 1], and whether it is believed."""
    observed = torch.stack((mean, var))
    ratio = (prediction[1].detach() / (var.detach() + eps)).mean(-1, keepdim=True)
    believed = ratio < GUARD  # also refuses what is not finite
    difference = torch.where(believed, prediction, observed) - observed
    mean, var = torch.add(observed, difference, alpha=gain).unbind()
    var = torch.addcmul(var, difference[0], difference[0], value=gain * (1.0 - gain))
    return mean, var, difference, ratio, believed


class Posterior:
    """:func:`posterior` of an observation, when called with the prediction; the gradient is the
    prediction's alone.

    Args:
        observe: gives mean and variance [..., C], which are constants; called once, where something
            is predicted.

    Attributes, from then on:
        var: the observed one.
        share, weight: of observation and prediction [..., 1]; the weight is 0 where it is refused.
        difference, ratio: see :func:`posterior`.
    """

    def __init__(self, observe: Callable[[], Pair], gain: float, eps: float) -> None:
        self.observe, self.gain, self.eps = observe, gain, eps

    def __call__(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        observed, self.var = self.observe()
        del self.observe  # activations may hang on it, and this is kept for the backward pass
        found = posterior(prediction, observed, self.var, self.gain, self.eps)
        mean, var, difference, self.ratio, believed = found
        self.difference = difference.detach()
        if torch.compiler.is_compiling():  # it looks through caches, and says so
            self.weight = torch.where(believed, self.gain, torch.zeros_like(self.ratio))
            self.share = 1.0 - self.weight
        else:
            shares = torch.where(believed, *_shares(self.gain, mean.dtype, mean.device))
            self.share, self.weight = shares.split(1, -1)
        return mean, var

    def pull(self, d_mean: Tensor, d_var: Tensor) -> Tensor:
        """The gradient of the prediction from those of mean and variance."""
        by_mean = torch.addcmul(d_mean, self.difference[0], d_var, value=2.0 * (1.0 - self.gain))
        return torch.stack((by_mean, d_var)) * self.weight


@lru_cache(maxsize=64)
def _shares(gain: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of observation and prediction, where that is believed and where it is not; made once."""
    with torch.inference_mode(False):
        return torch.tensor([[1.0 - gain, gain], [1.0, 0.0]], dtype=dtype, device=device).unbind()


@register_norm("KN")
class KN2d(Predicting, SmallBatchNorm2d):
    """Kalman Normalization over [N, C, H, W]; BatchNorm2d's parameters, buffers and evaluation.

    Which layers precede it is found by itself in the first training forward (:mod:`.graph` has the
    rules, :func:`cbn_det.norms.kn_chain` shows the result); where there is none it is BatchNorm,
    and a warning counts those layers after the first iteration. Where parts of the model are frozen
    or compiled, and under re-entrant activation checkpoints, whose first iteration would be
    BatchNorm and whose segments end chains, :func:`cbn_det.norms.find_chain` before training finds
    it whole (the trainers of this package call it). Predictions are made with the parameters that
    the modules have at that time.

    Args:
        num_features: channels C.
        gain: weight of the prediction, in [0, 1), 0 being BatchNorm.
        freeze: see :class:`SmallBatchNorm2d`.
        ema: what running statistics average. ``'pooled'``: first and second moments of the
            posterior; ``'batch'``: its mean and variance, which with a gain of 0 is BatchNorm's
            rule.
        momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        num_features: int,
        *,
        gain: float = DEFAULT_GAIN,
        freeze: float = 1.0,
        ema: str = "pooled",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(
            num_features,
            freeze=freeze,
            ema=ema,
            momentum=momentum,
            eps=eps,
            affine=affine,
            **factory,
        )
        self._start_predicting(gain)
        self._input: Tensor | None = None  # during a forward

    @property
    def channels(self) -> int:
        return self.num_features

    def options(self) -> dict[str, Any]:
        return {"gain": self.gain} | super().options()

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
                self._mark(output)
        finally:
            self.__dict__["_input"] = None
        return output

    def estimate(self, batch: Moments) -> Estimate:
        mixed = None
        if not self.is_batchnorm:
            mixing = Posterior(lambda: (batch.mean, batch.var), self.gain, self.eps)
            mixed = self._mixed(self._input, batch.mean, mixing)
        return mixed or Estimate(batch.mean, batch.var, 1.0)

    @property
    def is_batchnorm(self) -> bool:
        return self.gain == 0 or self.recomputing_statistics

    def averaged(self, batch: Moments, estimate: Estimate) -> Moments:
        mean, var, count = estimate.mean, estimate.var, batch.count
        if self.ema == "pooled" and isinstance(estimate.share, Tensor):
            # a mini-batch with the share 1 - p is one of so many values among more: its variance
            # is closer to the unbiased one than that of `count` values, as which it is counted
            among = count / (1.0 - self.gain)
            change = _unbiased(among) / _unbiased(count) - 1.0
            var = torch.addcmul(var, var, self._compared[-1], value=change / self.gain)
        return Moments(mean, var, count)


def _unbiased(count: float) -> float:
    """What BatchNorm multiplies the variance of ``count`` values by."""
    return count / max(count - 1.0, 1.0)
