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
  ``<d mu / dW, W>`` and ``<d var / dW, W>`` of the time. What a derivative is off by is then
  multiplied by the small weight change only.
- An entry holds the mean and the *variance*. With ``dmu`` and ``dvar`` the two linear terms,
  ``nu - mu**2`` of the compensated entry is ``var + dvar - dmu**2``, which the paper's max clamps
  at 0; written so, nothing cancels.

And one thing is done otherwise with a result that differs a little, unless ``positions=None``: the
derivative of the variance is the same for all remembered iterations, an exponential average ``G``
over iterations of estimates on few positions each. It is followed step by step, with the derivative
of that time::

    dvar_{t-tau -> t} = sum of < G_s, W_{s+1} - W_s > over s = t-tau ... t-1

In expectation the derivative of one mini-batch's variance is that of any other's, and the deviation
of one's own from the average is noise of the size of the sampling error, times the small weight
change. So one tensor of the weight's size is kept in place of one an entry, and longer windows cost
nothing. With ``positions=None`` each entry has the derivative of its own mini-batch at all
positions, the paper's rule to the letter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Estimate, SmallBatchNorm2d, is_number
from .conv_call import ConvCall
from .functional import (
    Moments,
    choose_crops,
    mean_patch,
    patch_covariance,
    variance_gradient,
    variance_gradient_factors,
)
from .schedule import Scheduled
from .spec import register_norm
from .window import Window

COMPENSATIONS = ("taylor", "central", "exact", "none")

#: Output positions an iteration that the averaged derivative is estimated on. On the layers of a
#: Faster R-CNN R18-FPN on digits, 2 images, it made the variance's distance from the truth larger
#: than each entry's own derivative does by 0.5 % at the learning rate before its decay (0.01) and
#: 0.1 % after; 256 positions by half of that, 16 by 1.5 times as much.
DEFAULT_POSITIONS = 64

#: Weight of the newest estimate in the averaged derivative; 0.3 was noisier.
_DERIVATIVE_MOMENTUM = 0.1

#: Factors of the derivative that an iteration of many forwards may stage, in positions, before
#: they are multiplied out: it keeps memory bounded by the weight's size.
_MOST_FACTORS = 4

_NO_DERIVATIVES = (
    "the saved memory has no derivatives by the weight of the convolution, as that of"
    " compensation='none'"
)


def _product_of_factors(row: dict[str, Tensor]) -> Tensor:
    """[groups, C / groups, d]: the derivative that a staged row has in factors."""
    if "dense" in row:
        return row["dense"].baddbmm(row["left"], row["right"])
    return row["left"] @ row["right"]


@register_norm("CBN")
class CBN2d(Scheduled, SmallBatchNorm2d):
    """Cross-Iteration BatchNorm over [N, C, H, W]; BatchNorm2d's parameters, buffers and
    evaluation.

    Args:
        num_features: channels C.
        window: iterations averaged over, the current one included (k in the paper; 1 is BatchNorm).
        burn_in: how long to train as plain BatchNorm before statistics are remembered. An int is a
            number of optimiser steps; a float in (0, 1) is a fraction of the schedule, turned into
            steps by :func:`cbn_det.norms.resolve_burn_in` (the trainer calls it with
            ``SOLVER.MAX_ITER``). Where nobody does, the first forward warns and takes a schedule of
            3000.
        compensation: how a remembered entry is carried over to the present weight.
            ``'taylor'``: the paper's rule. ``'central'``: the variance itself is linearised, which
            leaves out the always negative ``-dmu**2``. ``'exact'``: by the covariance of the input
            patches, exact in the layer's own weight; ``(C_in / groups * kh * kw) ** 2`` numbers a
            group and an entry, smaller than the weight gradient for 1x1 convolutions with ``C_in
            <= C_out`` and large otherwise. ``'none'``: as it is ("naive CBN"; the only one that
            needs no convolution).
        positions: number of output positions an iteration that ``d var / dW`` is estimated on,
            taken as crops of the feature maps or as some of the RoIs; the estimates are averaged
            over iterations. None: all positions, and each entry keeps its own derivative, as in the
            paper. ``d mu / dW`` is always of all positions and each entry's own. (``'exact'``
            averages nothing: each entry has the covariance of so many positions, and more of them
            than the default, or None, is what it needs.)
        cutoff: None, or the largest relative change ``|dvar| / var`` at which an entry still
            counts for a channel. Beyond it the linear term is no longer valid (the neglected
            quadratic term is at least ``(dvar / var)**2 / 4`` of the variance), and that channel
            averages over fewer entries.
        ema, momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.

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
        **factory: Any,
    ) -> None:
        super().__init__(
            num_features, ema=ema, momentum=momentum, eps=eps, affine=affine, **factory
        )
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
        self.window = window
        self._set_times(burn_in=burn_in)
        self.compensation = compensation
        self.positions = positions
        self.cutoff = cutoff
        self._window = Window(window - 1) if window > 1 else None
        # of the latest forward: <averaged derivative, weight>, for stage()
        self._product: Tensor | None = None
        # and for diagnostics: changes of mean and variance, variance, validity
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

    # ---- the method ----

    def estimate(self, batch: Moments) -> Estimate:
        self._product = None
        if not self._memory_takes_part():
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
        if self._adds_bias:
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
        entries = self._window
        mean = self._products_with_patches(entries["patch"]) - entries["anchor_mean"]
        if "change" in entries:
            self._product = self._products_with(self._kept["gradient"].unsqueeze(0))[0]
            return mean, entries["change"] + (self._product - self._kept["anchor"])
        if "covariance" in entries:
            products = self._quadratic_forms(entries["covariance"])
        else:
            products = self._products_with(entries["gradient"])
        return mean, products - entries["anchor_var"]

    def _products_with_patches(self, patches: Tensor) -> Tensor:
        """``<E[p], w>`` at the present weight: [E, groups, d] -> [E, C]. What it is when an entry
        is made is the entry's anchor; likewise below."""
        products = patches.transpose(0, 1) @ self._grouped_weight(patches).transpose(1, 2)
        return products.transpose(0, 1).flatten(1)

    def _products_with(self, gradients: Tensor) -> Tensor:
        """``<d var / dw, w>`` for every channel: [E, C, d] -> [E, C]."""
        weight = self._flat_weight(gradients.dtype)
        # batched products, in the order of operands that BLAS is fast at: [C, 1, d] [C, d, E]
        return torch.bmm(weight.unsqueeze(1), gradients.permute(1, 2, 0)).squeeze(1).T

    def _quadratic_forms(self, covariances: Tensor) -> Tensor:
        """``w^T S w``, the variance, for every channel's w: [E, groups, d, d] -> [E, C]."""
        weight = self._grouped_weight(covariances)
        return torch.einsum("egdk,gok,god->ego", covariances, weight, weight).flatten(1)

    def _grouped_weight(self, like: Tensor) -> Tensor:
        return self._flat_weight(like.dtype).unflatten(0, (self.conv.groups, -1))

    def _flat_weight(self, dtype: torch.dtype) -> Tensor:
        return self._conv_weight()[0].to(dtype).flatten(1)

    def stage(self, batch: Moments, y: Tensor, call: ConvCall | None) -> None:
        if self._window is None or self.in_burn_in:
            return
        row = {"mean": batch.mean, "var": batch.var}
        if self.needs_conv:
            if self._weight_is_trained:
                row |= self._derivatives(batch, y, call)
            if self._adds_bias:
                row["bias"] = self.conv.bias.detach().to(batch.mean.dtype, copy=True)
                row["mean"] = batch.mean - row["bias"]
        self._staged = self._pooled(row)

    @property
    def _adds_bias(self) -> bool:
        """Whether remembered means are without the convolution's bias, and the present one is added
        to them."""
        return self.needs_conv and self.conv is not None and self.conv.bias is not None

    @property
    def _weight_is_trained(self) -> bool:
        return self._conv_weight()[1]

    def _derivatives(self, batch: Moments, y: Tensor, call: ConvCall) -> dict[str, Tensor]:
        """Of this forward's moments by the weight, for an entry, with their anchors."""
        x, geometry = call.x, call.geometry
        patch = mean_patch(x, geometry, tuple(y.shape[2:]))
        row = {"patch": patch, "anchor_mean": self._products_with_patches(patch[None])[0]}
        if self.compensation == "exact":
            crops = choose_crops(tuple(y.shape), self.positions, self.steps)
            covariance = patch_covariance(x, y, patch, geometry, crops)
            anchor = self._quadratic_forms(covariance[None])[0]
            return row | {"covariance": covariance, "anchor_var": anchor}
        if self.positions is None:
            shape = self._conv_weight()[0].shape
            gradient = variance_gradient(x, y, batch.mean, geometry, shape)
            anchor = self._products_with(gradient[None])[0]
            return row | {"gradient": gradient, "anchor_var": anchor}
        # fewer for each further forward of an iteration: all of them count the same, and what is
        # staged stays small
        positions = max(1, self.positions // (self._staged_forwards + 1))
        crops = choose_crops(tuple(y.shape), positions, self.steps)
        left, right, anchor = variance_gradient_factors(x, y, batch.mean, patch, geometry, crops)
        row |= {"left": left, "right": right, "anchor_var": anchor}
        return row if self._product is None else row | {"product": self._product}

    def _pooled(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """The iteration's entry after one more forward: every forward counts the same.

        Pooling adds the spread between forwards to the variance, and its derivative to the
        derivative.
        """
        old = self._staged
        if not old.keys() >= row.keys():
            return row
        share = 1.0 / (self._staged_forwards + 1)
        between = share * (1.0 - share)
        step = {key: row[key] - old[key] for key in row if key not in ("left", "right")}
        pooled = {key: old[key] + share * change for key, change in step.items()}
        pooled["var"] = pooled["var"] + between * step["mean"].square()
        if "patch" not in row:
            return pooled
        # <step["patch"], w> is the difference of the means as well
        patch, slope = step["patch"], step["anchor_mean"]
        if "covariance" in row:
            outer = patch.unsqueeze(2) * patch.unsqueeze(1)
            pooled["covariance"] = pooled["covariance"] + between * outer
            pooled["anchor_var"] = pooled["anchor_var"] + between * slope.square()
            return pooled
        cross = 2.0 * between * step["mean"]
        if "gradient" in row:
            outer = cross.view(len(patch), -1, 1) * patch.unsqueeze(1)
            pooled["gradient"] = pooled["gradient"] + outer.flatten(0, 1)
            pooled["anchor_var"] = pooled["anchor_var"] + cross * slope
            return pooled
        cross, patch, slope = (torch.nan_to_num(v, 0.0, 0.0, 0.0) for v in (cross, patch, slope))
        pooled["anchor_var"] = pooled["anchor_var"] + cross * slope
        lefts = (old["left"] * (1.0 - share), row["left"] * share, cross.view(len(patch), -1, 1))
        pooled["left"] = torch.cat(lefts, 2)
        pooled["right"] = torch.cat((old["right"], row["right"], patch.unsqueeze(1)), 1)
        if "dense" in old:
            pooled["dense"] = old["dense"] * (1.0 - share)
        if pooled["right"].shape[1] > _MOST_FACTORS * self.positions:  # a long accumulation
            pooled["dense"] = _product_of_factors(pooled)
            pooled["left"], pooled["right"] = pooled["left"][..., :0], pooled["right"][:, :0]
        return pooled

    def commit(self) -> None:
        if not self._staged:
            return
        row = dict(self._staged)
        bias = row.pop("bias", None)
        with torch.autocast(row["mean"].device.type, enabled=False):
            self._carry_running_statistics(row, bias)
            if "left" in row:
                row = self._followed(row)
        self._window.push(row)

    def _carry_running_statistics(self, row: dict[str, Tensor], bias: Tensor | None) -> None:
        """Takes the running statistics along with the step that the convolution made in the
        finished iteration. They are averages over iterations, as the window is, and would otherwise
        belong to weights of ten iterations ago."""
        if bias is not None:
            self.running_mean.add_((self.conv.bias.detach() - bias).to(self.running_mean.dtype))
        if "patch" not in row:
            return
        change = self._products_with_patches(row["patch"][None])[0] - row["anchor_mean"]
        anchor = row["anchor_var"]
        if "covariance" in row:
            now = self._quadratic_forms(row["covariance"][None])[0]
        elif "gradient" in row:
            now = self._products_with(row["gradient"][None])[0]
        elif "product" in row:
            now, anchor = self._products_with(self._kept["gradient"][None])[0], row["product"]
        else:
            now = self._products_with(_product_of_factors(row).flatten(0, 1)[None])[0]
        # an iteration that overflowed takes them nowhere
        changes = torch.nan_to_num(torch.stack([change, now - anchor]), 0.0, 0.0, 0.0)
        self.running_mean.add_(changes[0].to(self.running_mean.dtype))
        self.running_var.add_(changes[1].to(self.running_var.dtype)).clamp_(min=0.0)

    def _update_running(self, batch: Moments, estimate: Estimate) -> None:
        # of the mini-batch: the window is of older weights in the layers before this one
        super()._update_running(batch, Estimate(batch.mean, batch.var, 1.0))

    def _followed(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entry for the window, after the finished iteration's step of the weight was added to
        what is remembered, and its estimate to the averaged derivative."""
        left, right, anchor = (row.pop(key) for key in ("left", "right", "anchor_var"))
        product, dense = row.pop("product", None), row.pop("dense", None)
        if dense is not None or product is None:
            dense = left @ right if dense is None else dense.baddbmm(left, right)
        if product is None:  # nothing was remembered that the weight could have moved away from
            self._kept = {"gradient": dense.flatten(0, 1), "anchor": anchor}
        else:
            self._window["change"].add_(product - self._kept["anchor"])
            newest = max(_DERIVATIVE_MOMENTUM, 1.0 / (self._window.pushed + 1))
            average = self._kept["gradient"].unflatten(0, left.shape[:2])
            if dense is None:
                average.baddbmm_(left, right, beta=1.0 - newest, alpha=newest)
            else:
                average.lerp_(dense, newest)
            self._kept["anchor"] = product.lerp(anchor, newest)
        return row | {"change": torch.zeros_like(row["var"])}

    def memory_state_dict(self) -> dict[str, Any]:
        # entries do not tell: those of a frozen convolution are like those of compensation='none'
        return {**super().memory_state_dict(), "adds_bias": self._adds_bias}

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        adds_bias = self._adds_bias
        if self._window is not None and (self.conv is not None or not self.needs_conv):
            entries = state["staged"] or (state["window"] or {}).get("stacked")
            # checkpoints of before do not say
            if entries and state.get("adds_bias", adds_bias) != adds_bias:
                raise ValueError(_NO_DERIVATIVES if adds_bias else self._another_kind())
        super().load_memory_state_dict(state)

    def _another_kind(self) -> str:
        return (
            "the saved memory is of another kind than that of"
            f" compensation={self.compensation!r}, positions={self.positions}"
        )

    def check_memory(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().check_memory(shapes)
        conv = self.conv
        if "patch" not in shapes:
            if "mean" in shapes and self._adds_bias and self._weight_is_trained:
                # a mean of ``compensation='none'`` has the bias in it, which is added here
                raise ValueError(_NO_DERIVATIVES)
            return  # naive, or the convolution was frozen; or not an entry, but what is averaged
        if self.compensation == "exact":
            wanted = {"covariance"}
        elif self.positions is None:
            wanted = {"gradient"}
        else:
            wanted = {"change", "left"}  # remembered; staged
        if not self.needs_conv or wanted.isdisjoint(shapes):
            raise ValueError(self._another_kind())
        if conv is None:
            return
        if shapes["patch"] != (conv.groups, self._conv_weight()[0][0].numel()):
            raise ValueError("the saved memory is of a convolution of another shape")
