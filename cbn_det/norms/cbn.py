"""Cross-Iteration Batch Normalization (Yao, Cao, Zheng, Huang, Lin; CVPR 2021, arXiv 2002.05712).

Statistics are averaged over the current mini-batch and those of the ``k - 1`` iterations before
it. The weights have moved since, so each remembered statistic is first carried over to the present
weight of the layer's own convolution, by a Taylor term (the paper's low-order approximation; the
dependence on earlier layers' weights is neglected, as there)::

    mu_{t-tau -> t} = mu_{t-tau} + < d mu_{t-tau} / dW, W_t - W_{t-tau} >
    nu_{t-tau -> t} = nu_{t-tau} + < d nu_{t-tau} / dW, W_t - W_{t-tau} >          nu = E[y**2]
    mu  = 1/k sum_tau mu_{t-tau -> t}
    nu  = 1/k sum_tau max(nu_{t-tau -> t}, mu_{t-tau -> t}**2)
    var = nu - mu**2

What is remembered is a constant for the gradient, so the current mini-batch has the share 1/k in
both moments. Two things are done otherwise than in the authors' code, with the same result up to
rounding:

- Both derivatives are closed forms of the convolution's input and output, no ``autograd.grad``. No
  old weight is kept, only the scalars ``<d mu / dW, W>`` and ``<d var / dW, W>`` of the time, the
  *anchors*. What a derivative is off by is then multiplied by the small weight change only.
- An entry holds the mean and the *variance*. With ``dmu`` and ``dvar`` the two linear terms,
  ``nu - mu**2`` of the compensated entry is ``var + dvar - dmu**2``, which the paper's max clamps
  at 0; written so, nothing cancels.

And one thing with a result that differs a little, unless ``positions=None``: the derivative of the
variance is averaged over iterations (:class:`~.compensation.AveragedDerivative`).

All entries are carried over once an iteration, those of all layers at once, and given to the
forwards as one mean and variance.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from .compensation import (
    CHANGES,
    ROW,
    AveragedDerivative,
    OwnDerivative,
    Seen,
    carry,
    products_with_patches,
)
from .conv_statistics import mean_patch
from .following import FollowingNorm2d
from .functional import Estimate, Moments, even_mixture, mixed_in
from .memory import push, rows_of, share_out
from .spec import register_norm

COMPENSATIONS = ("taylor", "none")

#: On the layers of a Faster R-CNN R18-FPN on digits, 2 images, the variance was further from the
#: truth than with each entry's own derivative by 0.5 % before the learning rate's decay and 0.1 %
#: after; with 256 positions by half of that, with 16 by 1.5 times as much.
DEFAULT_POSITIONS = 64


@register_norm("CBN")
class CBN2d(FollowingNorm2d):
    """Cross-Iteration BatchNorm over [N, C, H, W]; BatchNorm2d's parameters, buffers and
    evaluation.

    Args:
        num_features: channels C.
        window: iterations averaged over, the current one included (k in the paper; 1 is BatchNorm).
            The paper's rule is ``min(ceil(16 / images per GPU), 8)``, the default that of 4 images;
            from scratch at one image a GPU 8 did harm (docs/results/digits.md).
        burn_in: how long to train as plain BatchNorm before statistics are remembered: optimiser
            steps (int), or a fraction of the schedule (float in (0, 1)) that
            :func:`cbn_det.norms.resolve_burn_in` turns into steps. The default is that of the
            authors' config files (8 of 12 epochs); the paper's is 1/4. Its figure for COCO shows no
            difference; from scratch an early one did harm.
        compensation: how a remembered entry is carried over to the present weight. ``'taylor'``:
            the paper's rule. ``'none'``: as it is ("naive CBN", which needs no convolution).
        positions: output positions an iteration, on average, that ``d var / dW`` is estimated on,
            as crops of the feature maps or some of the RoIs; the estimates are averaged over
            iterations (ours). None: all positions, and each entry keeps its own derivative, as in
            the paper. ``d mu / dW`` is always of all positions and each entry's own.
        freeze, ema, momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.
            ``ema='pooled'``, the default, is ours; the authors' code has ``'batch'``, the paper
            does not say.

    Raises:
        ValueError: an option out of range.
        RuntimeError: in the first training forward, when the layer compensates and is bound to no
            convolution or to the wrong one.
    """

    averages_batch = True

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 4,
        burn_in: int | float = 2 / 3,
        compensation: str = "taylor",
        positions: int | None = DEFAULT_POSITIONS,
        **shared: Any,
    ) -> None:
        super().__init__(num_features, **shared)
        if compensation not in COMPENSATIONS:
            raise ValueError(f"compensation={compensation!r}: expected one of {COMPENSATIONS}")
        if positions is not None and (type(positions) is not int or positions < 1):
            raise ValueError(f"positions={positions!r}: expected a positive int, or None for all")
        self.compensation = compensation
        self.positions = positions
        self.derivative = OwnDerivative() if positions is None else AveragedDerivative(positions)
        self._start_following(window, burn_in=burn_in)

    @property
    def batch_share(self) -> float:
        return 1.0 / self.window

    @property
    def needs_conv(self) -> bool:
        return self.compensation != "none" and self.window > 1

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Of the present iteration, 0-dim tensors: ``clamped``, the share of (entry, channel) pairs
        whose compensated variance was negative; ``compensation_mean`` and ``compensation_var``, the
        mean size of the compensation by standard deviation and variance. Empty before anything is
        remembered."""
        if not (self.memory.pushed and self._compensates):
            return {}
        _, var, *_, mean_change, change = self.memory.rows[: len(self.memory)].unbind(1)
        change = change - mean_change.square()
        return {
            "clamped": (var + change < 0).to(var.dtype).mean(),
            "compensation_mean": (mean_change.abs() / (var + self.eps).sqrt()).mean(),
            "compensation_var": (change.abs() / (var + self.eps)).mean(),
        }

    # ---- the method ----

    def estimate(self, batch: Moments) -> Estimate:
        memory = self.memory
        if memory.older is None:  # no iteration before this one
            return super().estimate(batch)
        mean, var = memory.older
        share = 1.0 / (1 + len(memory))
        if self.adds_bias:
            mean = mean + self.conv.bias.to(mean.dtype)
        return Estimate(*mixed_in(batch.mean, batch.var, mean, var, share), share)

    def stage(self, batch: Moments, estimate: Estimate, y: Tensor) -> None:
        entry = {"mean": batch.mean, "var": batch.var}
        call = self.call
        if call is not None and self.weight_is_trained:
            weight = self.flat_weight(batch.mean.dtype)
            patch = mean_patch(call.x, call.geometry, tuple(y.shape[2:]))
            seen = Seen(call, y, batch.mean, patch, weight)
            anchor = products_with_patches(patch[None], weight)[0]
            entry |= {"patch": patch, "anchor": anchor, **self.derivative.stage(self, seen)}
        if self.adds_bias:
            entry["bias"] = self.conv.bias.detach().clone()
            entry["mean"] = batch.mean - entry["bias"]
        old = self.memory.pending
        self.memory.pending = self._pooled(old, entry) if old.keys() >= entry.keys() else entry

    def _pooled(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The iteration's entry after one more forward: every forward counts the same.

        Pooling adds the spread between forwards to the variance, and its derivative to the
        derivative.
        """
        share = 1.0 / (self.memory.forwards + 1)
        between = share * (1.0 - share)
        step = {key: new[key] - old[key] for key in new}
        pooled = {key: old[key] + share * change for key, change in step.items()}
        pooled["var"] += between * step["mean"].square()
        if "gradient" in new:
            # <step["patch"], w> is the difference of the means as well
            cross, patch = 2.0 * between * step["mean"], step["patch"]
            outer = cross.view(len(patch), -1, 1) * patch.unsqueeze(1)
            pooled["gradient"] += outer.flatten(0, 1)
            pooled["gradient_anchor"] += cross * step["anchor"]
        return pooled

    @classmethod
    def commit(cls, layers: list[CBN2d]) -> None:
        compensates, is_new = layers[0]._compensates, bool(layers[0].memory.pending)
        for layer in layers:
            layer.carry_bias()
            if is_new and compensates:
                layer.derivative.commit(layer.memory, layer.memory.pending)
        row, derived = (ROW, CHANGES) if compensates else (ROW[:2], ())
        rows = push(layers, row, derived) if is_new else rows_of(layers)
        entries = rows[:, :2]
        if compensates:
            change = carry(layers, rows, is_new)
            entries = entries + change
            entries[:, 1].addcmul_(change[:, 0], change[:, 0], value=-1.0).clamp_(min=0.0)
        share_out(layers, even_mixture(entries))

    @property
    def _compensates(self) -> bool:
        """Whether the entries are, or the first one will be, with their derivatives."""
        memory = self.memory
        return "patch" in (memory.stacked if memory.pushed else memory.pending)

    def group_for_commit(self) -> Hashable:
        pending = self.memory.pending
        if pending and self.memory.pushed and ("patch" in pending) != self._compensates:
            self.memory.forget_entries()  # not comparable: the convolution was frozen, or released
        return *super().group_for_commit(), self._compensates, self.positions
