"""The contract that the small-batch norms share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from . import clock
from .freeze import Freezable
from .functional import Estimate, Moments, moments, without_autocast
from .normalization import normalize
from .recalibration import Recalibration, in_backward
from .spec import options_of, shown_options
from .traced import Unscriptable, call_in_graph


class Forward(NamedTuple):
    """How a training forward was called.

    Attributes:
        with_grad: gradients are on.
        repeated: an activation checkpoint recomputes an earlier forward with it.
    """

    with_grad: bool
    repeated: bool


#: of one forward: the mini-batch's moments, and what was taken for the statistics
Found = tuple[Moments, Estimate]


def is_number(value: Any) -> bool:
    """Whether an option's value is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _exporting() -> bool:
    """Whether the forward is recorded as a graph that is kept."""
    return torch.jit.is_tracing() or _is_exported()


# since torch 2.7
_is_exported = getattr(torch.compiler, "is_exporting", lambda: False)


@contextmanager
def unchanged(layers: Collection[SmallBatchNorm2d]) -> Iterator[None]:
    """Within it, forwards in training mode leave these layers as they are."""
    for layer in layers:
        layer._unchanged = True
    try:
        yield
    finally:
        for layer in layers:
            layer._unchanged = False


class SmallBatchNorm2d(Unscriptable, Freezable):
    """BatchNorm2d whose training statistics come from :meth:`estimate` instead of one mini-batch.

    A subclass of ``nn.BatchNorm2d`` with exactly its five state keys, because code around a norm
    decides by ``isinstance``: weight decay of norms, freezing, PreciseBN, weight loading. In
    evaluation it *is* ``nn.BatchNorm2d``. It differs in training:

    - statistics are float32 whatever the activations' dtype; the gradient is exact;
    - empty input is returned as it is, with zero gradients and unchanged state;
    - one value per channel is allowed (its variance is 0 where nothing else is remembered);
    - training forwards that only gather statistics (:attr:`recomputing_statistics`) are
      BatchNorm's: those of PreciseBN, ``update_bn``, or a mean teacher;
    - nothing is communicated between ranks in forward, but by SyncBN:
      :func:`cbn_det.norms.sync_running_stats` pools running statistics.

    What a method remembers from iteration to iteration is in
    :class:`~cbn_det.norms.memory.RememberingNorm2d`.

    Args:
        num_features: channels C of the input [N, C, H, W].
        freeze: fraction of the schedule, in (0, 1], from which on the layer normalises with fixed
            statistics (:mod:`cbn_det.norms.freeze`) and remembers nothing; 1: never.
        ema: what running statistics average. ``'pooled'``: first and second moments, so that the
            variance *between* mini-batches counts; ``'batch'``: BatchNorm's rule.
        momentum: of the running statistics; None for a cumulative average.
        eps: added to the variance.
        affine: whether there are a weight and a bias.
        device, dtype: of weight, bias and running statistics.

    Raises:
        ValueError: an option out of range; names the option and what it takes.
    """

    #: whether the latest training forward is not part of training, and therefore BatchNorm's:
    #: memory is neither read nor written, and running statistics move by the mini-batch's own
    #: (:class:`~cbn_det.norms.recalibration.Recalibration` has the rule)
    recomputing_statistics = False
    #: whether the running statistics average :func:`~.functional.moments` of mini-batches
    averages_batch = False

    def __init__(
        self,
        num_features: int,
        *,
        freeze: float = 1.0,
        ema: str = "pooled",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine, **factory)
        if ema not in ("pooled", "batch"):
            raise ValueError(f"ema={ema!r}: expected 'pooled' or 'batch'")
        if not (is_number(eps) and eps >= 0.0):
            raise ValueError(f"eps={eps!r}: expected a number of at least 0")
        if momentum is not None and not (is_number(momentum) and 0.0 <= momentum <= 1.0):
            raise ValueError(f"momentum={momentum!r}: expected a number in [0, 1] or None")
        if not (is_number(freeze) and 0.0 < freeze <= 1.0):
            raise ValueError(
                f"freeze={freeze!r}: expected a number in (0, 1], the fraction of the schedule"
                " after which statistics are fixed (1: never)"
            )
        self.freeze = freeze
        self.ema = ema
        self._recalibration = Recalibration(momentum)
        # a forward of a second pass or a measurement, which leaves the layer as it is
        self._unchanged = False
        clock.install()

    # ---- what a method defines ----

    @property
    def batch_share(self) -> float:
        """Weight of the current mini-batch in the statistics it is normalised with, after burn-in
        and with a full memory."""
        return 1.0

    @property
    def is_batchnorm(self) -> bool:
        """Whether the present training forward is BatchNorm's, with the mini-batch's own statistics
        and none that are of interest beyond it."""
        return False

    def batch_moments(self, y: Tensor) -> Moments:
        """Moments of one mini-batch as this method takes them, expanded to [C]."""
        return moments(y)

    def estimate(self, batch: Moments) -> Estimate:
        """Statistics of this layer now, from this mini-batch's moments and what is remembered;
        called in training forwards that are not BatchNorm's. By default: BatchNorm's."""
        return Estimate(batch.mean, batch.var, 1.0)

    def averaged(self, batch: Moments, estimate: Estimate) -> Moments:
        """What the running statistics average. By default: the mini-batch's own moments."""
        return batch

    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Sets the running statistics, for evaluation, from mean and variance [C] of this layer's
        input over many mini-batches (PreciseBN)."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)

    def options(self) -> dict[str, Any]:
        """The constructor's options with their present values, as ``type(self)(C, **options)``
        takes."""
        own = options_of(type(self))
        return {name: getattr(self, name) for name in own if hasattr(self, name)}

    # ---- forward ----

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return call_in_graph(self, input)
        if not self.training:
            return super().forward(input)
        if _exporting():
            raise RuntimeError(
                f"{type(self).__name__} in training mode cannot be exported or traced: what it"
                " remembers would be part of the graph. Call model.eval() first."
            )
        return self._train(input)

    # what an iteration leaves to the next is no part of a graph that is compiled once
    @torch.compiler.disable
    def _train(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        how = Forward(torch.is_grad_enabled(), in_backward())
        self._begin(input, how)
        if input.numel() == 0:
            return self._pass_empty(input)
        moves = not (how.repeated or self._unchanged)
        is_batchnorm = self.is_batchnorm
        if is_batchnorm and self._is_plain(input):
            output = self._batchnorm(input, moves, self.momentum)
            self._record(None, input, how)
            return output
        with without_autocast(input.device):
            moving = moves and self.averages_batch and self._is_plain(input)
            output, batch, estimate = self._normalized(input, moving, is_batchnorm)
            with torch.no_grad():
                if moves and not moving:
                    self._update_running(batch, estimate)
                self._record(None if is_batchnorm else (batch, estimate), input, how)
        return output

    def _normalized(
        self, input: Tensor, moving: bool, is_batchnorm: bool
    ) -> tuple[Tensor, Moments, Estimate]:
        """The output, with what it was normalised by; ``moving``: running statistics move, too;
        ``is_batchnorm``: by the mini-batch's own."""
        batch = self._moments_and_running(input) if moving else self.batch_moments(input)
        if is_batchnorm:
            estimate = SmallBatchNorm2d.estimate(self, batch)
        else:
            estimate = self.estimate(batch)
        return normalize(input, estimate, self.weight, self.bias, self.eps), batch, estimate

    def _begin(self, input: Tensor, how: Forward) -> None:
        """The start of a training forward."""
        anew = False
        if not self._unchanged:
            anew = self._recalibration.see(self.momentum, how.repeated)
            self._look_for_freezer()
        self.__dict__["recomputing_statistics"] = anew  # past Module.__setattr__, which takes long

    def _record(self, found: Found | None, input: Tensor, how: Forward) -> None:
        """Its end: what the method remembers of it; None: that it was there."""

    def _is_plain(self, input: Tensor) -> bool:
        """Whether torch's BatchNorm takes this layer's input, momentum and dtypes."""
        running = self.running_mean.dtype
        fits = input.dtype == running or (running == torch.float32 and input.dtype.itemsize == 2)
        return (
            fits
            and running.itemsize >= 4
            and (self.weight is None or self.weight.dtype == running)
            and input.numel() > input.shape[1]
            and self.momentum is not None
            and self.momentum > 0.0
            and not (self.recomputing_statistics and self.ema == "pooled")
        )

    def _batchnorm(self, input: Tensor, moves: bool, momentum: float) -> Tensor:
        """``nn.BatchNorm2d``'s forward; ``moves``: the running statistics, too."""
        mean, var = self.running_mean, self.running_var
        if not moves:  # a checkpoint wants as many tensors kept as in the first forward
            return self._over_batch(input, mean.clone(), var.clone(), momentum)
        self.num_batches_tracked.add_(1)
        before = mean.clone() if self.ema == "pooled" and momentum else None
        output = self._over_batch(input, mean, var, momentum)
        if before is not None:  # the variance between mini-batches; `mean` has moved by a part
            difference = torch.sub(mean, before, out=before)
            var.addcmul_(difference, difference, value=(1.0 - momentum) / momentum)
        return output

    def _over_batch(self, input: Tensor, mean: Tensor, var: Tensor, momentum: float) -> Tensor:
        """Normalises by the mini-batch, towards which ``mean`` and ``var`` are moved."""
        # `.data`: the backward pass keeps them, and would refuse what was changed since
        running = mean.data, var.data
        return F.batch_norm(input, *running, self.weight, self.bias, True, momentum, self.eps)

    def _moments_and_running(self, input: Tensor) -> Moments:
        """Moments, with which the running statistics have moved, in one kernel."""
        self.num_batches_tracked.add_(1)
        momentum, mean, var = self.momentum, self.running_mean.data, self.running_var.data
        batch = moments(input, (mean, var), momentum)
        if self.ema == "pooled" and momentum < 1.0:  # `mean` has moved: what is left of the way
            left = batch.mean - mean
            var.addcmul_(left, left, value=momentum / (1.0 - momentum))
        return batch

    def _pass_empty(self, input: Tensor) -> Tensor:
        if self.affine:  # an empty sum connects the affine parameters, with zero gradients
            scale, shift = (p.to(input.dtype).view(1, -1, 1, 1) for p in (self.weight, self.bias))
            return input * scale + shift
        return input * 1.0

    def _update_running(self, batch: Moments, estimate: Estimate) -> None:
        self.num_batches_tracked.add_(1)
        recomputing = self.recomputing_statistics
        if not recomputing:
            batch = self.averaged(batch, estimate)
        mean, var, count = batch.mean, batch.var, batch.count
        momentum: Any = self.momentum
        if momentum is None:
            momentum = 1.0 / self.num_batches_tracked.to(mean.dtype)
        elif recomputing and self.ema == "pooled":
            # an average begun anew is of what was shown, not of the 0 and 1 that it begins with
            momentum = (1.0 / self.num_batches_tracked).clamp(min=momentum).to(mean.dtype)
        # BatchNorm keeps the unbiased variance; a single value has none
        var = var * (count / max(count - 1.0, 1.0))
        old_mean, old_var = self.running_mean, self.running_var
        if self.ema == "pooled":  # variance of a mixture: within plus between its parts
            difference = mean - old_mean
            if isinstance(momentum, Tensor):
                var = var + (1.0 - momentum) * difference.square()
            else:
                var = var.addcmul_(difference, difference, value=1.0 - momentum)
        if isinstance(momentum, Tensor):
            momentum = momentum.to(old_var.dtype)
        # torch's lerp is exact at both ends, so that a momentum of 1 keeps the batch itself
        new = [mean.to(old_mean.dtype), var.to(old_var.dtype)]
        torch._foreach_lerp_([old_mean, old_var], new, momentum)

    # ---- life of the module ----

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "_recalibration" in self.__dict__:  # BatchNorm's constructor calls this, too
            self._recalibration.reset()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "_recalibration" in self.__dict__:
            self._recalibration.forget()

    def _replicate_for_data_parallel(self) -> SmallBatchNorm2d:
        raise RuntimeError(
            f"{type(self).__name__} does not work in nn.DataParallel, whose replicas, and what they"
            " remember, are thrown away after each forward: use"
            " nn.parallel.DistributedDataParallel, one process a GPU"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        clock.install()

    def extra_repr(self) -> str:
        return f"{self.num_features}, {shown_options(self)}"
