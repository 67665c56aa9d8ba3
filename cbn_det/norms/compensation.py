"""How remembered statistics are carried over to the present weight of a convolution.

The mean by the mean input patch of the entry's own iteration, the variance by one of the two
derivatives below.

A layer's pending entry gets what a derivative needs in :meth:`stage`; with the commit of several
layers, :func:`carry` says how much the means and variances of all their entries have changed since.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from .conv_call import ConvCall
from .conv_statistics import choose_crops, sampled_variance_gradient, variance_gradient
from .functional import Moments
from .memory import Memory

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


#: An entry's values a channel: the statistics, what both have changed by since, and the products of
#: patch and derivative with the weight of the time.
ROW = ("mean", "var", "mean_change", "var_change", "anchor", "gradient_anchor")


def carry(layers: list[Any], rows: Tensor, is_new: bool) -> Tensor:
    """Carries statistics over to the present weights, to first order: those of all entries, and the
    running statistics.

    Those are averages over iterations, as the window is, and would otherwise belong to weights of
    ten iterations ago: they change by what the newest entry has changed by since the latest commit.

    Args:
        layers: that are committed together, with the same kind of derivative.
        rows: [E, row, sum of C], their entries.
        is_new: whether the newest entry comes with this commit.

    Returns:
        [E, 2, sum of C], changes of means and variances; a part of ``rows``.
    """
    memory, entries = layers[0].memory, len(rows)
    change = rows[:, 2:4]
    newest = change[(memory.pushed - 1) % memory.capacity]
    before = None if is_new else newest.clone()
    products = [products_with_patches(n.memory.stacked["patch"][:entries], n) for n in layers]
    products += [layer.derivative.products(layer).expand(entries, -1) for layer in layers]
    now = torch.cat(products, 1).view(entries, 2, -1)
    # of what was not finite, after an overflow, nothing is known
    torch.sub(now, rows[:, 4:], out=change).nan_to_num_(0.0, 0.0, 0.0)
    since = newest if before is None else newest - before
    variances = [layer.running_var for layer in layers]
    running = [layer.running_mean for layer in layers] + variances
    widths = [layer.num_features for layer in layers]
    since = since.to(running[0].dtype)
    torch._foreach_add_(running, [*since[0].split(widths), *since[1].split(widths)])
    torch._foreach_clamp_min_(variances, 0.0)
    return change


class Derivative(Protocol):
    """Of the variance by the weight."""

    def stage(self, layer: Any, batch: Moments, y: Tensor, call: ConvCall, patch: Tensor) -> dict:
        """What one forward adds to the pending entry: its estimate ``gradient`` [C, d], if it makes
        one, with its anchor."""

    def commit(self, layer: Any, entry: dict[str, Tensor]) -> None:
        """Makes of these what the entry is remembered with."""

    def products(self, layer: Any) -> Tensor:
        """[entries or 1, C]: with the present weight."""


def _anchored(gradient: Tensor, layer: Any) -> dict[str, Tensor]:
    return {"gradient": gradient, "gradient_anchor": products_with(gradient[None], layer)[0]}


class OwnDerivative:
    """The paper's rule to the letter: each entry has the derivative of its own mini-batch, at all
    positions."""

    def stage(self, layer: Any, batch: Moments, y: Tensor, call: ConvCall, patch: Tensor) -> dict:
        shape = layer.weight_shape
        return _anchored(variance_gradient(call.x, y, batch.mean, call.geometry, shape), layer)

    def commit(self, layer: Any, entry: dict[str, Tensor]) -> None:
        pass

    def products(self, layer: Any) -> Tensor:
        memory = layer.memory
        return products_with(memory.stacked["gradient"][: len(memory)], layer)


class AveragedDerivative:
    """All entries have the same derivative, an exponential average ``G`` over iterations of
    estimates on few positions. When it is refreshed, entries keep what they have changed by before,
    so that their change is made of steps with the derivative of the time::

        dvar_{t-tau -> t} = sum of < G_s, W_{s+1} - W_s > over s = t-tau ... t-1

    In expectation the derivative of one mini-batch's variance is that of any other's, and the
    deviation of one's own from the average is noise of the size of the sampling error, times the
    small weight change. So one tensor of the weight's size is kept in place of one an entry, and
    longer windows cost nothing.

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
        if "gradient" in entry:
            self._refresh(layer.memory, entry.pop("gradient"), entry["gradient_anchor"])
        entry["gradient_anchor"] = kept["anchor"]

    def _refresh(self, memory: Memory, estimate: Tensor, anchor: Tensor) -> None:
        kept = memory.kept
        if "gradient" not in kept:
            kept.update(gradient=torch.nan_to_num(estimate, 0.0, 0.0, 0.0), anchor=anchor)
            return
        finite = anchor.abs() < math.inf  # after an overflow, an estimate is none
        estimate = torch.where(finite.unsqueeze(1), estimate, kept["gradient"])
        step = torch.where(finite, anchor, kept["anchor"]) - kept["anchor"]
        newest = 1.0 - (1.0 - _MOMENTUM) ** EVERY
        kept["gradient"].lerp_(estimate, newest)
        kept["anchor"] = kept["anchor"].add(step, alpha=newest)
        memory.rows[:, 5].add_(step, alpha=newest)  # no entry has changed by it

    def products(self, layer: Any) -> Tensor:
        kept = layer.memory.kept
        now = products_with(kept["gradient"][None], layer)
        kept["anchor"] = now[0]
        return now
