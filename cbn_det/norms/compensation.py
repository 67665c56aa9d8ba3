"""How remembered statistics are carried over to the present weight of a convolution: the mean by
the mean input patch of the entry's own iteration, the variance by one of the derivatives below."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_call import ConvCall
from .conv_statistics import choose_crops, sampled_variance_gradient, variance_gradient
from .memory import Memory

#: The averaged derivative is estimated once in so many iterations, on so many times the positions.
EVERY = 8

#: Weight of one iteration's positions in the averaged derivative; 0.3 was noisier.
_MOMENTUM = 0.1


def products_with_patches(patches: Tensor, weight: Tensor) -> Tensor:
    """``<E[p], w>``: [E, groups, d], [C, d] -> [E, C]. What it is when an entry is made is the
    entry's anchor; likewise below."""
    _, groups, d = patches.shape
    if groups == 1:
        return F.linear(patches.squeeze(1), weight)
    products = torch.bmm(patches.transpose(0, 1), weight.view(groups, -1, d).mT)
    return products.transpose(0, 1).flatten(1)


def products_with(gradients: Tensor, weight: Tensor) -> Tensor:
    """``<d var / dw, w>`` for every channel: [C, E, d], [C, d] -> [E, C]."""
    # batched products, in the order of operands that BLAS is fast at: [C, 1, d] [C, d, E]
    return torch.bmm(weight.unsqueeze(1), gradients.mT).squeeze(1).T


#: An entry's values a channel: the statistics, and the products of patch and derivative with the
#: weight of the time
ROW = ("mean", "var", "anchor", "gradient_anchor")
#: behind them: what the statistics have changed by since
CHANGES = ("mean_change", "var_change")
_ANCHORS, _CHANGES, _GRADIENT_ANCHOR = slice(2, 4), slice(4, 6), 3


def carry(layers: list[Any], rows: Tensor, is_new: bool) -> Tensor:
    """Carries statistics over to the present weights, to first order: those of all entries, and the
    running statistics, which change by what the newest entry has since the latest commit.

    Args:
        layers: that are committed together, with the same kind of derivative.
        rows: [E, row and changes, sum of C], their entries.
        is_new: whether the newest entry comes with this commit.

    Returns:
        [E, 2, sum of C], changes of means and variances; a part of ``rows``.
    """
    memory, entries = layers[0].memory, rows.shape[0]
    change = rows[:, _CHANGES]
    newest = change[(memory.pushed - 1) % memory.capacity]
    before = None if is_new else newest.clone()
    of_means, of_variances = [], []
    for layer in layers:
        weight = layer.flat_weight(rows.dtype)
        of_means.append(products_with_patches(layer.memory.stacked["patch"][:entries], weight))
        of_variance = layer.derivative.products(layer.memory, weight)
        of_variances.append(of_variance.expand(entries, -1))
    now = torch.cat(of_means + of_variances, 1).view(entries, 2, -1)
    # of what was not finite, after an overflow, nothing is known
    torch.sub(now, rows[:, _ANCHORS], out=change).nan_to_num_(0.0, 0.0, 0.0)
    since = newest if before is None else newest - before
    variances = [layer.running_var for layer in layers]
    running = [layer.running_mean for layer in layers] + variances
    widths = [layer.num_features for layer in layers]
    since = since.to(running[0].dtype)
    torch._foreach_add_(running, [*since[0].split(widths), *since[1].split(widths)])
    torch._foreach_clamp_min_(variances, 0.0)
    return change


class Seen(NamedTuple):
    """What a forward shows of the convolution before a layer."""

    call: ConvCall
    y: Tensor  # its output
    mean: Tensor  # [C], of y
    patch: Tensor  # [groups, d], the mean patch of its input
    weight: Tensor  # [C, d]

    def anchored(self, gradient: Tensor) -> dict[str, Tensor]:
        anchor = products_with(gradient.unsqueeze(1), self.weight)[0]
        return {"gradient": gradient, "gradient_anchor": anchor}


class OwnDerivative:
    """The paper's rule to the letter: each entry has the derivative of its own mini-batch, at all
    positions."""

    def stage(self, layer: Any, seen: Seen) -> dict[str, Tensor]:
        """What one forward adds to the pending entry: its estimate ``gradient`` [C, d], if it makes
        one, with its anchor."""
        x, geometry = seen.call.x, seen.call.geometry
        gradient = variance_gradient(x, seen.y, seen.mean, geometry, layer.weight_shape)
        return seen.anchored(gradient)

    def commit(self, memory: Memory, entry: dict[str, Tensor]) -> None:
        """Makes of these what the entry is remembered with."""

    def products(self, memory: Memory, weight: Tensor) -> Tensor:
        """[entries or 1, C]: with the present weight [C, d]."""
        return products_with(memory.stacked["gradient"][: len(memory)].transpose(0, 1), weight)


class AveragedDerivative:
    """All entries have the same derivative, an exponential average ``G`` over iterations of
    estimates on few positions. When it is refreshed, entries keep what they have changed by::

        dvar_{t-tau -> t} = sum of < G_s, W_{s+1} - W_s > over s = t-tau ... t-1

    In expectation every mini-batch's derivative is the same; the deviation of one's own is noise,
    times the small weight change. One tensor of the weight's size is kept in place of one an entry.

    Args:
        positions: of one layer in one iteration, on average.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions

    def stage(self, layer: Any, seen: Seen) -> dict[str, Tensor]:
        memory, steps = layer.memory, layer.memory.steps
        if "gradient" in memory.kept and steps % EVERY:
            return {}
        # fewer for each further forward of an iteration: all of them count the same
        positions = max(1, self.positions * EVERY // (memory.forwards + 1))
        crops = choose_crops(tuple(seen.y.shape), positions, steps)
        call, shape = seen.call, layer.weight_shape
        gradient = sampled_variance_gradient(
            call.x, seen.y, seen.mean, seen.patch, call.geometry, shape, crops
        )
        return seen.anchored(gradient)

    def commit(self, memory: Memory, entry: dict[str, Tensor]) -> None:
        if "gradient" in entry:
            self._refresh(memory, entry.pop("gradient"), entry["gradient_anchor"])
        entry["gradient_anchor"] = memory.kept["anchor"]

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
        # no entry has changed by it
        memory.rows[:, _GRADIENT_ANCHOR].add_(step, alpha=newest)

    def products(self, memory: Memory, weight: Tensor) -> Tensor:
        now = products_with(memory.kept["gradient"].unsqueeze(1), weight)
        memory.kept["anchor"] = now[0]
        return now
