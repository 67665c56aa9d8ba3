"""How remembered statistics are carried over to the present weight of a convolution.

The mean by the mean input patch of the entry's own iteration, the variance by one of the two
derivatives below.

A layer's pending entry gets what a derivative needs in :meth:`stage`; with the commit of several
layers, :meth:`changes` says how much the variances of all their entries have changed since.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .conv_call import ConvCall
from .conv_statistics import choose_crops, sampled_variance_gradient, variance_gradient
from .functional import Moments
from .memory import unknown_like, zeros_like

#: The averaged derivative is estimated once in so many iterations, on so many times the positions.
EVERY = 8

#: Weight of one iteration's positions in the averaged derivative; 0.3 was noisier.
_MOMENTUM = 0.1


def products_with_patches(patches: Tensor, layer: Any) -> Tensor:
    """``<E[p], w>`` at the layer's present weight: [E, groups, d] -> [E, C]. What it is when an
    entry is made is the entry's anchor; likewise below."""
    weight = layer.flat_weight(patches.dtype).unflatten(0, (patches.shape[1], -1))
    return (patches.transpose(0, 1) @ weight.transpose(1, 2)).transpose(0, 1).flatten(1)


def products_with(gradients: Tensor, layer: Any) -> Tensor:
    """``<d var / dw, w>`` for every channel: [E, C, d] -> [E, C]."""
    weight = layer.flat_weight(gradients.dtype)
    # batched products, in the order of operands that BLAS is fast at: [C, 1, d] [C, d, E]
    return torch.bmm(weight.unsqueeze(1), gradients.permute(1, 2, 0)).squeeze(1).T


def changes(layers: list[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
    """[E, sum of C] each: by how much mean and variance of every entry have changed, to first
    order, since it was made."""
    entries = rows.shape[1]
    products = [products_with_patches(n.memory.stacked["patch"][:entries], n) for n in layers]
    step = (torch.cat(products, 1) - rows[2]).nan_to_num_(0.0, 0.0, 0.0)
    return step, layers[0].derivative.changes(layers, rows[3])


def carry_running_statistics(layers: list[Any], step: Tensor, change: Tensor, is_new: bool) -> None:
    """Takes the running statistics along with the steps that the convolutions made since the latest
    commit, by what the newest entries changed by. They are averages over iterations, as the window
    is, and would otherwise belong to weights of ten iterations ago."""
    first, widths = layers[0].memory, [layer.num_features for layer in layers]
    newest = (first.pushed - 1) % first.capacity
    carried = since = torch.cat([step[newest], change[newest]])
    if not is_new:
        before = [layer.memory.kept[key] for key in ("mean", "var") for layer in layers]
        since = carried - torch.cat(before)
    for layer, mean, var in zip(layers, *(v.split(widths) for v in carried.chunk(2)), strict=True):
        layer.memory.kept.update(mean=mean, var=var)
    variances = [layer.running_var for layer in layers]
    running = [layer.running_mean for layer in layers] + variances
    torch._foreach_add_(running, since.to(running[0].dtype).split(widths * 2))
    torch._foreach_clamp_min_(variances, 0.0)


class Derivative(Protocol):
    """Of the variance by the weight."""

    def stage(self, layer: Any, batch: Moments, y: Tensor, call: ConvCall, patch: Tensor) -> dict:
        """What one forward adds to the pending entry: its estimate ``gradient`` [C, d], if it makes
        one, with its anchor."""

    def commit(self, layer: Any, entry: dict[str, Tensor]) -> None:
        """Makes of these what the entry is remembered with."""

    def instead(self, entry: dict[str, Tensor]) -> Tensor:
        """A ``change`` by which nothing has changed."""

    def changes(self, layers: list[Any], row: Tensor) -> Tensor:
        """[E, C]: first-order changes of the variance of every entry, of the layers side by side,
        since it was made; ``row`` are the entries' ``change``."""


def _anchored(gradient: Tensor, layer: Any) -> dict[str, Tensor]:
    return {"gradient": gradient, "gradient_anchor": products_with(gradient[None], layer)[0]}


class OwnDerivative:
    """The paper's rule to the letter: each entry has the derivative of its own mini-batch, at all
    positions. ``change`` is its anchor."""

    def stage(self, layer: Any, batch: Moments, y: Tensor, call: ConvCall, patch: Tensor) -> dict:
        shape = layer.weight_shape
        gradient = variance_gradient(call.x, y, batch.mean, call.geometry, shape)
        return _anchored(gradient, layer)

    def commit(self, layer: Any, entry: dict[str, Tensor]) -> None:
        entry["change"] = entry.pop("gradient_anchor")

    def instead(self, entry: dict[str, Tensor]) -> Tensor:
        return unknown_like(entry["var"])

    def changes(self, layers: list[Any], row: Tensor) -> Tensor:
        products = [
            products_with(layer.memory.stacked["gradient"][: len(row)], layer) for layer in layers
        ]
        return (torch.cat(products, 1) - row).nan_to_num_(0.0, 0.0, 0.0)


class AveragedDerivative:
    """All entries have the same derivative, an exponential average ``G`` over iterations of
    estimates on few positions. It is followed step by step, with the derivative of that time::

        dvar_{t-tau -> t} = sum of < G_s, W_{s+1} - W_s > over s = t-tau ... t-1

    In expectation the derivative of one mini-batch's variance is that of any other's, and the
    deviation of one's own from the average is noise of the size of the sampling error, times the
    small weight change. So one tensor of the weight's size is kept in place of one an entry, and
    longer windows cost nothing. ``change`` is the sum.

    Args:
        positions: of one layer in one iteration, on average.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions

    def stage(self, layer: Any, batch: Moments, y: Tensor, call: ConvCall, patch: Tensor) -> dict:
        shape = layer.weight_shape
        if "gradient" in layer.memory.kept and layer.steps % EVERY:
            return {}
        # fewer for each further forward of an iteration: all of them count the same
        positions = max(1, self.positions * EVERY // (layer.memory.forwards + 1))
        crops = choose_crops(tuple(y.shape), positions, layer.steps)
        gradient = sampled_variance_gradient(
            call.x, y, batch.mean, patch, call.geometry, shape, crops
        )
        return _anchored(gradient, layer)

    def commit(self, layer: Any, entry: dict[str, Tensor]) -> None:
        kept = layer.memory.kept
        estimate, anchor = (entry.pop(k, None) for k in ("gradient", "gradient_anchor"))
        if estimate is not None:
            newest = 1.0 - (1.0 - _MOMENTUM) ** EVERY
            if "gradient" not in kept:
                newest = 1.0
                kept.update(gradient=torch.zeros_like(estimate), anchor=torch.zeros_like(anchor))
            # an estimate that is not finite, after an overflow, is none
            finite = torch.isfinite(anchor)
            estimate = torch.where(finite.unsqueeze(1), estimate, kept["gradient"])
            kept["gradient"].lerp_(estimate, newest)
            kept["anchor"] = kept["anchor"].lerp(
                torch.where(finite, anchor, kept["anchor"]), newest
            )
        entry["change"] = zeros_like(entry["var"])

    def instead(self, entry: dict[str, Tensor]) -> Tensor:
        return entry["change"]

    def changes(self, layers: list[Any], row: Tensor) -> Tensor:
        kept = [layer.memory.kept for layer in layers]
        now = [
            products_with(k["gradient"][None], layer) for k, layer in zip(kept, layers, strict=True)
        ]
        steps = torch._foreach_sub(now, [k["anchor"] for k in kept])
        for k, product in zip(kept, now, strict=True):
            k["anchor"] = product[0]
        return row.add_(torch.cat(steps, 1))
