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
- The gain is a constant, or learned for each layer. (Their code names the weight of the prediction,
  as here.)
- The guard is theirs: where predicted variances are 100 times the mini-batch's or more, on average
  over channels, the layer takes the mini-batch's statistics as they are.
- ``recursion='authors'`` hands the posterior ``mean, var`` of this layer's *input* to the next one,
  as their code does, although what the next one sees is the normalised and scaled output: the
  prediction is then on another scale than the observation. ``recursion='consistent'`` hands on the
  distribution of the output, N(beta, gamma^2). Predictions then depend on weights only, and a
  mini-batch enters a layer's statistics with the share ``1 - p`` and no other way. It is the
  default: of two estimates that are mixed both should be of the same quantity, and its predictions
  were the closer ones by far (a mean off by 0.13 standard deviations instead of 0.66, on average
  over the layers of a ResNet-18 backbone early in training).
- Evaluation is BatchNorm's, with running statistics of the posterior.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .base import Estimate, SmallBatchNorm2d, is_number
from .chain import Chained, handed_before, recomputing, tracing
from .functional import Moments, mixture
from .prediction import Pair, Setting, constant_moments, pooled_samples
from .spec import register_norm

#: Weight of the prediction, chosen for 1 or 2 images: in the first 100 iterations of a Faster R-CNN
#: R18-FPN on the digits set, mixing in 0.2 to 0.3 brought mean and variance of single mini-batches
#: closest to those of many images (squared error of the log variance at 1 image, after 1, 30 and
#: 100 iterations: 0.054, 0.064, 0.070 without, 0.037, 0.047, 0.056 with 0.2). It takes back a fifth
#: to a third of the noise and no more; predictions grow less exact in training, and at 0.9, the
#: authors' value for 2 samples of CIFAR-10, the error is larger than without. With the authors'
#: recursion, measured at 2 images only, no weight above 0.05 helped.
DEFAULT_GAIN = 0.2
#: ratio of predicted to observed variance from which on a prediction is not believed
GUARD = 100.0

RECURSIONS = ("consistent", "authors")


class Predicting(Chained):
    """What KN and GKN have in common: the gain and the prediction."""

    gain: float | str
    recursion: str
    detach: bool
    eps: float
    gain_logit: nn.Parameter | None

    def _start_predicting(self, gain: float | str, recursion: str, detach: bool) -> None:
        self._start_chain()
        if gain != "learned" and not (is_number(gain) and 0.0 <= gain < 1.0):
            raise ValueError(f"gain={gain!r}: expected a number in [0, 1), or 'learned'")
        if recursion not in RECURSIONS:
            raise ValueError(f"recursion={recursion!r}: expected one of {RECURSIONS}")
        if not isinstance(detach, bool):
            raise ValueError(f"detach={detach!r}: expected True or False")
        self.gain, self.recursion, self.detach = gain, recursion, detach
        self._compared: tuple[Tensor, ...] = ()  # prediction and observation, for diagnostics
        if gain == "learned":
            self.gain_logit = nn.Parameter(torch.logit(torch.tensor(DEFAULT_GAIN)))

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
        predicted, mean, var, ratio, believed = self._compared
        error = (predicted - mean).abs() / (var + self.eps).sqrt()
        return {
            "guarded": 1.0 - believed.to(var.dtype).mean(),
            "prediction_mean": torch.where(believed, error, 0.0).mean(),
            "prediction_var": torch.where(believed, ratio, 0.0).mean(),
        }

    def _weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the prediction and of the observation, 0-dim."""
        if self.gain == "learned":
            logit = self.gain_logit.to(like.dtype)
            return torch.sigmoid(logit), torch.sigmoid(-logit)  # the second never rounds to 0
        return like.new_full((), self.gain), like.new_full((), 1.0 - self.gain)

    def _connected(self, value: Tensor) -> Tensor:
        """The same, computed without the gain: an empty sum connects a learned one, with a zero
        gradient (DistributedDataParallel waits for every parameter)."""
        if self.gain != "learned":
            return value
        return value + self.gain_logit.expand(0).sum().to(value.dtype)

    def _predict(self, y: Tensor, like: Tensor) -> Pair | None:
        """Predicted mean and variance of the channels of ``y``; None where nothing precedes it."""
        chain = self._find_chain(y)
        if chain is None:
            return None
        authors = self.recursion == "authors"
        # a recomputation follows the forward it repeats, which need not be the latest
        handed = handed_before(y) if authors and recomputing() else {}
        setting = Setting(like.detach().new_empty(0), authors, handed)
        if not torch.compiler.is_compiling():
            # frozen parts of what is trained stay as they are. A moving average does not, and
            # a change through ``.data`` leaves no trace
            lasts = self.training and y.requires_grad
            constant = constant_moments(chain.source, setting, self._constant if lasts else None)
            if lasts:
                self._constant = constant
            if constant is not None:
                return chain.through(*constant.pair)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            mean, var = chain.source.moments(setting)
        return chain.through(mean, var)

    def _combine(self, prediction: Pair, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Posterior mean and variance [..., C], and the share of the observation [..., 1]."""
        predicted_mean, predicted_var = torch.broadcast_tensors(*prediction)
        with torch.no_grad():
            ratio = (predicted_var / (var + self.eps)).mean(-1, keepdim=True)
            believed = ratio < GUARD  # also refuses what is not finite
        self._compared = (predicted_mean.detach(), mean.detach(), var.detach(), ratio, believed)
        predicted_mean = torch.where(believed, predicted_mean, mean)
        predicted_var = torch.where(believed, predicted_var, var)
        weights = [w.view([1] * mean.dim()) for w in self._weights(mean)]
        posterior = mixture(
            torch.stack([predicted_mean, mean.expand_as(predicted_mean)]),
            torch.stack([predicted_var, var.expand_as(predicted_var)]),
            torch.stack(weights),
        )
        share = torch.where(believed, weights[1].detach(), 1.0)
        return *posterior, share

    def _predicting_options(self) -> dict[str, Any]:
        return {"gain": self.gain, "recursion": self.recursion, "detach": self.detach}


class _Observed(torch.autograd.Function):
    """Gives statistics that were computed without gradient the gradient they have by ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, mean)
        return mean.clone(), var.clone()

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        shape, count = (1, -1, 1, 1), x.numel() // len(mean)
        slope = 2.0 * d_var / count
        offset = d_mean / count - slope * mean
        dx = x.to(mean.dtype) * slope.view(shape) + offset.view(shape)
        return dx.to(x.dtype), None, None


def observed(x: Tensor, mean: Tensor, var: Tensor) -> Pair:
    """Mean and variance [C] of ``x`` [N, C, H, W], connected to ``x``."""
    return _Observed.apply(x, mean, var)


@register_norm("KN")
class KN2d(Predicting, SmallBatchNorm2d):
    """Kalman Normalization over [N, C, H, W]; BatchNorm2d's parameters, buffers and evaluation.

    Which layers precede it is found by itself in the first training forward (:mod:`.chain` has the
    rules, :func:`cbn_det.norms.kn_chain` shows the result); where there is none it is BatchNorm.
    The first iteration under a re-entrant activation checkpoint is BatchNorm, too, and chains found
    there do not cross the borders of its segments (:func:`cbn_det.norms.find_chain` before training
    finds them whole). Predictions are made with the parameters that convolutions had when the chain
    was found, and not with those that ``torch.func.functional_call`` puts in their place.

    With ``recursion='authors'`` there are two limits under activation checkpoints, which
    ``recursion='consistent'`` does not have. What is handed on from segment to segment of
    re-entrant ones is a constant for the gradient, as with ``detach=True``. And if another forward
    comes before the backward pass, a recomputation takes what that one handed on, between segments
    of re-entrant ones and from frozen layers into any: gradients are wrong, mostly without an
    error.

    Args:
        num_features: channels C.
        gain: weight of the prediction, in [0, 1), 0 being BatchNorm; or ``'learned'``: one
            parameter ``gain_logit`` a layer, whose sigmoid is the weight and which starts at
            ``DEFAULT_GAIN``. It is one more key in the state dict: such a layer does not load a
            BatchNorm's state with ``strict=True``, nor the reverse.
        recursion: ``'consistent'`` or ``'authors'``: what a layer hands on (see the module).
        detach: whether what the preceding layers hand on is a constant for the gradient; the
            layer's own convolution receives the gradient of the prediction in either case.
        ema: what running statistics average. ``'pooled'``: first and second moments of the
            posterior; ``'batch'``: its mean and variance, which with a gain of 0 is BatchNorm's
            rule.
        momentum, eps, affine: see :class:`SmallBatchNorm2d`.

    Raises:
        ValueError: an option out of range.
    """

    training_state = ("gain_logit",)

    def __init__(
        self,
        num_features: int,
        *,
        gain: float | str = DEFAULT_GAIN,
        recursion: str = "consistent",
        detach: bool = False,
        ema: str = "pooled",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, ema=ema, momentum=momentum, eps=eps, affine=affine)
        self._start_predicting(gain, recursion, detach)
        self._input: Tensor | None = None  # during a forward
        self._handing: Pair | None = None  # likewise: what it hands on

    @property
    def channels(self) -> int:
        return self.num_features

    def options(self) -> dict[str, Any]:
        return self._predicting_options() | super().options()

    @property
    def batch_share(self) -> float:
        """Of layers for which something is predicted, none of whose predictions is refused."""
        return float(self._weights(self.running_mean)[1].detach())

    def forward(self, input: Tensor) -> Tensor:
        if (self.training or tracing()) and not isinstance(input, Proxy):
            return self._take_part(input)
        return super().forward(input)

    # it looks at the graph, which a compiled forward does not have
    @torch.compiler.disable
    def _take_part(self, input: Tensor) -> Tensor:
        self._input = input
        try:
            output = super().forward(input)
            if input.numel() > 0:
                if not self.training:
                    self._look_for_chain(input)
                self._hand_on(self._handing, output)
        finally:
            self._input = self._handing = None
        return output

    def hands_on(self) -> Pair | None:
        return self.handed if self.training else (self.running_mean, self.running_var)

    def estimate(self, batch: Moments) -> Estimate:
        prediction = None
        if self.gain != 0 and not self.recomputing_statistics:
            prediction = self._predict(self._input, batch.mean)
        if prediction is None:
            estimate = Estimate(self._connected(batch.mean), batch.var, 1.0)
        else:
            prediction = tuple(value.flatten() for value in pooled_samples(*prediction))
            estimate = Estimate(*self._combine(prediction, batch.mean, batch.var))
        if self.recursion == "authors":
            self._handing = self._posterior(prediction, batch)
        return estimate

    def _pass_empty(self, input: Tensor) -> Tensor:
        return self._connected(super()._pass_empty(input))

    def _posterior(self, prediction: Pair | None, batch: Moments) -> Pair:
        """The estimate with all of its dependence on the input, for the layers that follow."""
        mean, var = batch.mean, batch.var
        if not self.detach and torch.is_grad_enabled() and self._input.requires_grad:
            mean, var = observed(self._input, mean, var)
        if prediction is not None:
            mean, var, _ = self._combine(prediction, mean, var)
        return (mean.detach(), var.detach()) if self.detach else (mean, var)

    def _update_running(self, batch: Moments, estimate: Estimate) -> None:
        if self.ema == "batch":
            batch = Moments(estimate.mean, estimate.var, batch.count)
        super()._update_running(batch, estimate)
