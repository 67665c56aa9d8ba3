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

- Both derivatives are closed forms of the convolution's input and output (:func:`.mean_patch`,
  :func:`.variance_gradient`), no ``autograd.grad``; and no old weight is kept, only the scalars
  ``<d mu / dW, W>`` and ``<d var / dW, W>`` of the time. A derivative estimated on few positions
  then has its noise multiplied by the small weight change only.
- An entry holds the mean and the *variance*. With ``dmu`` and ``dvar`` the two linear terms,
  ``nu - mu**2`` of the compensated entry is ``var + dvar - dmu**2``, which the paper's max clamps
  at 0; written so, nothing cancels.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .base import Estimate, SmallBatchNorm2d, is_number
from .functional import (
    ConvGeometry,
    Moments,
    choose_crops,
    mean_patch,
    patch_covariance,
    variance_gradient,
)
from .spec import register_norm
from .window import Window

COMPENSATIONS = ("taylor", "central", "exact", "none")

#: Output positions a forward that derivatives are estimated on. At 2 images, on the layers of a
#: Faster R-CNN R18-FPN on digits that have more positions (first 16 iterations, no warm-up), the
#: average over the window was off by 0.1 to 0.3 % of the sampling error of a mini-batch's variance
#: at the learning rate after its decay (0.001; the 7x7 stem 3 %), and by 2 to 6 % (22 %) at ten
#: times as much, where weights move faster than compensation is meant for. Errors add in squares:
#: 5 % makes the sampling error larger by 0.1 %. Half as many positions: up to 1.7 times the error.
DEFAULT_POSITIONS = 512

#: How many numbers of remembered derivatives are made float32 at a time: few on a CPU, for its
#: caches (15 entries of 512 x 4608 took five times as long all at once), more where launches cost.
_WIDENED_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}

#: burn-in, in optimiser steps, of a layer whose fraction nobody resolved against a schedule
UNRESOLVED_BURN_IN = 2000


@register_norm("CBN")
class CBN2d(SmallBatchNorm2d):
    """Cross-Iteration BatchNorm over [N, C, H, W]; BatchNorm2d's parameters, buffers and
    evaluation.

    Args:
        num_features: channels C.
        window: iterations averaged over, the current one included (k in the paper; 1 is BatchNorm).
        burn_in: how long to train as plain BatchNorm before statistics are remembered. An int is a
            number of optimiser steps; a float in (0, 1) is a fraction of the schedule, turned into
            steps by :func:`cbn_det.norms.resolve_burn_in` (the trainer calls it with
            ``SOLVER.MAX_ITER``). Where nobody does, the first forward warns and takes
            ``UNRESOLVED_BURN_IN`` steps.
        compensation: how a remembered entry is carried over to the present weight.
            ``'taylor'``: the paper's rule. ``'central'``: the variance itself is linearised, which
            leaves out the always negative ``-dmu**2``. ``'exact'``: by the covariance of the input
            patches, exact in the layer's own weight; ``(C_in / groups * kh * kw) ** 2`` numbers a
            group and an entry, smaller than the weight gradient for 1x1 convolutions with ``C_in
            <= C_out`` and large otherwise. ``'none'``: as it is ("naive CBN"; the only one that
            needs no convolution).
        positions: number of output positions a forward that ``d var / dW`` is estimated on, taken
            as a few crops of each feature map or as some of the RoIs, and kept in bfloat16; None
            means all, in float32. Means always use all. What the estimate is off by is multiplied
            by the small change of the weight only.
        cutoff: None, or the largest relative change ``|dvar| / var`` at which an entry still
            counts for a channel. Beyond it the linear term is no longer valid (the neglected
            quadratic term is at least ``(dvar / var)**2 / 4`` of the variance), and that channel
            averages over fewer entries.
        ema, momentum, eps, affine: see :class:`SmallBatchNorm2d`.

    Raises:
        ValueError: an option out of range.
        RuntimeError: in the first training forward, when the layer compensates and is bound to no
            convolution or to the wrong one.
    """

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 4,
        burn_in: int | float = 2 / 3,
        compensation: str = "taylor",
        positions: int | None = DEFAULT_POSITIONS,
        cutoff: float | None = None,
        ema: str = "pooled",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, ema=ema, momentum=momentum, eps=eps, affine=affine)
        if type(window) is not int or window < 1:
            raise ValueError(
                f"window={window!r}: expected an int, 1 or more (it counts the current iteration)"
            )
        if compensation not in COMPENSATIONS:
            raise ValueError(f"compensation={compensation!r}: expected one of {COMPENSATIONS}")
        if positions is not None and (type(positions) is not int or positions < 1):
            raise ValueError(f"positions={positions!r}: expected a positive int, or None for all")
        if cutoff is not None and not (is_number(cutoff) and cutoff > 0):
            raise ValueError(f"cutoff={cutoff!r}: expected a positive number, or None")
        if not (
            (type(burn_in) is int and burn_in >= 0)
            or (isinstance(burn_in, float) and 0.0 < burn_in < 1.0)
        ):
            raise ValueError(
                f"burn_in={burn_in!r}: expected an int (optimiser steps, 0 or more) or a float"
                " between 0 and 1 (fraction of SOLVER.MAX_ITER)"
            )
        self.window = window
        self.burn_in = burn_in
        self.burn_in_steps: int | None = burn_in if isinstance(burn_in, int) else None
        self.compensation = compensation
        self.positions = positions
        self.cutoff = cutoff
        self._window = Window(window - 1) if window > 1 else None
        # of the latest forward, for diagnostics: changes of mean and variance, variance, validity
        self._compared: tuple[Tensor | None, ...] = ()

    def options(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "burn_in": self.burn_in,
            "compensation": self.compensation,
            "positions": self.positions,
            "cutoff": self.cutoff,
            **super().options(),
        }

    @property
    def batch_share(self) -> float:
        return 1.0 / self.window

    @property
    def needs_conv(self) -> bool:
        return self.compensation != "none" and self.window > 1

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Of the latest forward, 0-dim tensors: share of (entry, channel) pairs clamped or dropped,
        and mean size of the compensation relative to the standard deviation (mean) and variance.
        Empty before anything is remembered."""
        if not self._compared:
            return {}
        mean_change, change, var, valid = self._compared
        values = {
            "clamped": (var + change < 0).to(var.dtype).mean(),
            "dropped": (~valid).to(var.dtype).mean(),
        }
        if mean_change is not None:
            values["compensation_mean"] = (mean_change.abs() / (var + self.eps).sqrt()).mean()
            values["compensation_var"] = (change.abs() / (var + self.eps)).mean()
        return values

    def resolve_burn_in(self, max_iter: int) -> None:
        """Turns a fractional ``burn_in`` into optimiser steps of a schedule of ``max_iter``
        steps."""
        if isinstance(self.burn_in, float):
            self.burn_in_steps = round(self.burn_in * max_iter)

    # ---- the method ----

    def estimate(self, batch: Moments) -> Estimate:
        if self.burn_in_steps is None:
            self.burn_in_steps = UNRESOLVED_BURN_IN
            warnings.warn(
                f"burn_in={self.burn_in!r} is a fraction of a schedule that this CBN layer was not"
                f" told: taking {UNRESOLVED_BURN_IN} optimiser steps. Call"
                " cbn_det.norms.resolve_burn_in(model, max_iter) before training, or give burn_in"
                " as an int.",
                stacklevel=4,
            )
        if self._window is None or len(self._window) == 0 or self.recomputing_statistics:
            return Estimate(batch.mean, batch.var, 1.0)

        mean, var, valid = self._compensated()
        entries = 1.0 + valid.sum(0).to(mean.dtype)  # [C]; 1 / an int tensor would be float32
        zero = mean.new_zeros(())
        # masked before they are used: the gradient of an unused branch is 0 * inf otherwise
        mean, var = torch.where(valid, mean, zero), torch.where(valid, var, zero)
        mean_now = (batch.mean + mean.sum(0)) / entries
        spread = torch.where(valid, var + (mean - mean_now).square(), zero).sum(0)
        var_now = (batch.var + (batch.mean - mean_now).square() + spread) / entries
        return Estimate(mean_now, var_now, 1.0 / entries)

    def _compensated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and validity of every remembered entry at the present weight: [E, C]
        each."""
        mean, var = self._window["mean"], self._window["var"]
        mean_change, change = None, torch.zeros_like(var)
        if "patch" in self._window:
            mean_change, change = self._changes()
            mean = mean + mean_change
            if self.compensation == "taylor":
                change = change - mean_change.square()
        if self.needs_conv and self.conv.bias is not None:
            mean = mean + self.conv.bias.to(mean.dtype)
        moved_var = var + change
        # a step that overflowed and was skipped by a GradScaler leaves its forward behind
        valid = torch.isfinite(mean) & torch.isfinite(moved_var)
        if self.cutoff is not None:
            valid &= (change.abs() <= self.cutoff * var) & (moved_var >= 0)
        self._compared = (mean_change, change, var, valid)
        return mean, moved_var.clamp(min=0), valid

    def _changes(self) -> tuple[Tensor, Tensor]:
        """First-order changes of mean and variance of every entry: [E, C] each, without
        gradient."""
        mean, var = self._linear_terms(self._window)
        return mean - self._window["anchor_mean"], var - self._window["anchor_var"]

    def _linear_terms(self, entries: Window | dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What each entry's derivatives give at the present weight: [E, C] each, without gradient.
        Their value when the entry was made is its anchor."""
        patch = entries["patch"]  # [E, groups, d]
        weight = self._flat_weight(patch.dtype)
        grouped = weight.view(patch.shape[1], -1, patch.shape[2])
        mean = torch.einsum("egd,god->ego", patch, grouped).flatten(1)
        if "covariance" in entries:
            covariance = entries["covariance"]  # w^T S w for every channel's w
            var = torch.einsum("egdk,gok,god->ego", covariance, grouped, grouped).flatten(1)
        else:
            gradient = entries["gradient"]
            rows = len(weight)
            if gradient.dtype != weight.dtype:
                numbers = _WIDENED_AT_ONCE.get(weight.device.type, 2**20)
                rows = max(1, numbers // (len(gradient) * weight.shape[1]))
            # batched products, in the order of operands that BLAS is fast at: [C, 1, d] [C, d, E]
            parts = [
                torch.bmm(w.unsqueeze(1), g.to(weight.dtype).permute(1, 2, 0)).squeeze(1)
                for w, g in zip(weight.split(rows), gradient.split(rows, 1), strict=True)
            ]
            var = (parts[0] if len(parts) == 1 else torch.cat(parts)).T
        return mean, var

    def _flat_weight(self, dtype: torch.dtype) -> Tensor:
        return self.conv.weight.detach().to(dtype).flatten(1)

    def stage(self, batch: Moments, y: Tensor, conv_input: Tensor | None) -> None:
        if self._window is None or self.steps < self.burn_in_steps:
            return
        row = {"mean": batch.mean, "var": batch.var}
        if self.needs_conv:
            with torch.enable_grad():  # a parametrised weight is computed anew whenever it is read
                trainable = self.conv.weight.requires_grad
            if trainable:
                row |= self._derivatives(batch, y, conv_input)
            if self.conv.bias is not None:
                row["mean"] = batch.mean - self.conv.bias.detach().to(batch.mean.dtype)
        self._staged = self._pooled(row)

    def _derivatives(self, batch: Moments, y: Tensor, x: Tensor) -> dict[str, Tensor]:
        geometry = ConvGeometry.of(self.conv)
        crops = choose_crops(tuple(y.shape), self.positions, self.steps)
        patch = mean_patch(x, geometry, tuple(y.shape[2:]))
        if self.compensation == "exact":
            return {"patch": patch, "covariance": patch_covariance(x, y, patch, geometry, crops)}
        shape = self.conv.weight.shape
        gradient = variance_gradient(x, y, batch.mean, patch, geometry, shape, crops)
        return {"patch": patch, "gradient": gradient}

    def _pooled(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """The iteration's entry after one more forward: every forward counts the same.

        Pooling adds the spread between forwards to the variance, and its derivative to the
        derivative.
        """
        if self._staged.keys() >= row.keys():
            old, share = self._staged, 1.0 / (self._staged_forwards + 1)
            between = share * (1.0 - share)
            step = {key: row[key] - old[key] for key in row}
            row = {key: old[key] + share * step[key] for key in row}
            row["var"] = row["var"] + between * step["mean"].square()
            if "gradient" in row:
                groups, _ = step["patch"].shape
                cross = step["mean"].view(groups, -1, 1) * step["patch"].unsqueeze(1)
                row["gradient"] = row["gradient"] + 2.0 * between * cross.flatten(0, 1)
            elif "covariance" in row:
                outer = step["patch"].unsqueeze(2) * step["patch"].unsqueeze(1)
                row["covariance"] = row["covariance"] + between * outer
        if "gradient" in row and self.positions is not None:
            row["gradient"] = _halved(row["gradient"])
        if "patch" in row:
            anchors = self._linear_terms({key: value[None] for key, value in row.items()})
            row["anchor_mean"], row["anchor_var"] = (anchor[0] for anchor in anchors)
        return row

    def check_memory(self, shapes: dict[str, tuple[int, ...]]) -> None:
        width = shapes.get("mean", (self.num_features,))
        if width != (self.num_features,):
            raise ValueError(f"the saved memory has {width[0]} channels, not {self.num_features}")
        derivative = "covariance" if self.compensation == "exact" else "gradient"
        if "patch" not in shapes:
            return  # naive, or the convolution was frozen
        if not self.needs_conv or derivative not in shapes:
            raise ValueError(
                f"the saved memory is of another compensation than {self.compensation!r}"
            )
        groups, d = shapes["patch"]
        if self.conv is not None and (groups, d) != (
            self.conv.groups,
            self.conv.weight[0].numel(),
        ):
            raise ValueError("the saved memory is of a convolution of another shape")

    def commit(self) -> None:
        if self._staged:
            self._window.push(self._staged)


def _halved(gradient: Tensor) -> Tensor:
    """An estimated derivative in half the memory: bfloat16's rounding, up to 0.4 % of each number
    and independent from number to number, is far below what few positions are off by."""
    return gradient.bfloat16() if gradient.dtype == torch.float32 else gradient
