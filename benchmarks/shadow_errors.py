"""How far the statistics that norms normalise with are from the truth, measured in a training run.

What is compared. A network is trained with one norm, and beside each of its BatchNorms stand
:mod:`shadows`: layers of all the norms under study, which get the same input in every forward and
whose output nobody uses. So all methods are asked about the same weights and the same images, and
what differs between them is the estimate alone. If each norm trained a network of its own, the
networks would differ as well, and with them the task: a network whose weights move less has
statistics that are easier to remember. The price: a norm is not seen on the way that
it would have taken itself, where what it leaves in its output reaches the layers above; statistics
that are better here can be worse there. For that, train with it: it can be its own shadow.

The truth. Before the forward of iteration t, with the weights as they are then, 200 training images
(those that come after the end of training) go through the network in mini-batches of the training's
size, in training mode and without gradient. ``M`` and ``V`` are mean and variance of all values
that reach a layer then, a channel each: its estimate of so many mini-batches at once. The layers
below normalise as they do in training, so that it is of the distribution that the layer does see. A
method that pools groups of channels (BGN) is after the statistics of the group: its truth is pooled
likewise. GN and GKN normalise each sample by itself; of their statistics there is no other truth
than the sample, and nothing to measure.

The estimate. Each of those mini-batches is what iteration t might have been given. For each of the
first 32, every shadow estimates mean ``m`` and variance ``v`` as in training, from the mini-batch
and from what it remembers of the iterations before t; nothing is remembered of it. With these::

    mean  = sqrt( E_b E_c  (m - M)**2 / (V + eps) )              in standard deviations
    var   = sqrt( E_b E_c  log((v + eps) / (V + eps))**2 )       0.1 is about 10 % of the variance

over mini-batches b and channels c. ``var_fixed`` is the part that all of the iteration's
mini-batches have in common (``E_b`` inside the square): stale memory, bad predictions, bias. Where
a method corrects the normalised values (BRN's r and d), m and v are those that would have given the
same output. ``running_mean`` and ``running_var`` say the same of the running statistics, with which
the network would be evaluated.

Against a reference. Where a norm is an approximation of another, its distance from the truth says
little about what the approximation costs. ``apart_var`` is the root mean square of
``log((v + eps) / (v_ref + eps))``, with what the reference estimates from the same mini-batch and
its own memory.

How exact that is. Mini-batches are part of the truth that they are compared with, which makes
errors smaller by the factor sqrt(1 - n/200): 1 % with n = 4 images. One run is one draw of what is
remembered, so that errors of methods with memory vary more from iteration to iteration.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from shadows import Shadows, Site
from torch import Tensor, nn

from cbn_det.norms import (
    DoubleForward,
    Estimate,
    Moments,
    SmallBatchNorm2d,
    reading_memory,
)
from cbn_det.norms.functional import group_mean
from cbn_det.run.precise_bn import PooledMoments, kept_statistics

#: mini-batches that estimates are made of; more would cost time and say little more
_ESTIMATED = 32


class StatisticsError:
    """Measures during a training run.

    The weights, buffers and losses of the run are those of a run without it, bit for bit.

    Args:
        model: the bare model, in training mode.
        double_forward: of the training loop.
        norms: whose estimates to measure, as in a config; ``"BN"`` is BatchNorm.
        max_iter: of the training.
        reference: one of the norms, which the others are compared with; "" for none.

    Raises:
        ConfigError: a norm cannot be measured beside those of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        double_forward: DoubleForward,
        norms: Sequence[str],
        max_iter: int,
        reference: str = "",
    ) -> None:
        self._model = model
        self._reference = reference
        # the reference estimates first, so that it is there to compare with
        self.shadows = Shadows(model, sorted(norms, key=lambda norm: norm != reference), max_iter)
        double_forward.include(self.shadows.layers())

    def measure(
        self, batches: Iterable[Any], count: int, forward: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """Measures, before the forward of an iteration.

        Args:
            batches: of training images, as the training loader gives them.
            count: how many of them the truth is taken from.
            forward: runs the model on one of them, in training mode.

        Returns:
            ``channels``, ``values`` and errors by norm, for each layer by name in the order in
            which the network runs them; a layer that saw no RoI in any image is left out.

        Raises:
            ValueError: the batches ended early.
        """
        measured = _Measured(self._reference)
        shadows = self.shadows
        layers = nn.ModuleList(shadows.layers())
        with (
            torch.no_grad(),
            reading_memory(nn.ModuleList([self._model, layers])),
            kept_statistics(self._model),
            _kept_random(),
        ):
            shadows.on_input, shadows.on_estimate = measured.see, measured.compare
            try:
                for batch in islice(batches, count):
                    shadows.asleep = measured.batches >= _ESTIMATED
                    forward(batch)
                    measured.batches += 1
            finally:
                shadows.on_input = shadows.on_estimate = None
                shadows.asleep = False
        if measured.batches < count:
            raise ValueError(f"only {measured.batches} of {count} mini-batches to measure with")
        return measured.result()


class _Spread:
    """Mean and scatter, a channel each, of what one method says in the mini-batches."""

    def __init__(self, layer: SmallBatchNorm2d) -> None:
        self.layer = layer
        self.groups: int | None = None
        device = layer.running_mean.device
        self.mean = PooledMoments(layer.num_features, device)
        self.log_var = PooledMoments(layer.num_features, device)
        self.apart: list[Tensor] = []  # [C] each: squared differences of the log variance

    def add(self, mean: Tensor, log_var: Tensor, reference: Tensor | None) -> None:
        one, none = torch.ones_like(mean[0]), torch.zeros_like(mean)
        self.mean.add(one, mean, none)
        self.log_var.add(one, log_var, none)
        if reference is not None:
            self.apart.append((log_var - reference).square())


class _Measured:
    """What is seen of all sites while the mini-batches go through."""

    def __init__(self, reference: str) -> None:
        self.batches = 0
        self._reference = reference
        self._wanted: dict[Site, Tensor] = {}  # log variance of the reference, this mini-batch
        self._inputs: dict[Site, PooledMoments] = {}
        self._spreads: dict[Site, dict[str, _Spread]] = {}

    def see(self, site: Site, y: Tensor) -> None:
        if site not in self._inputs:
            self._inputs[site] = PooledMoments(site.channels, y.device)
            self._spreads[site] = {}
        self._inputs[site].see(site.host, (y,))

    def compare(self, site: Site, norm: str, layer: SmallBatchNorm2d, found: Estimate) -> None:
        spread = self._spreads[site].setdefault(norm, _Spread(layer))
        spread.groups = found.groups
        mean, var = used_statistics(found, layer.eps)
        if norm == self._reference:
            self._wanted[site] = var.log()
        spread.add(mean, var.log(), self._wanted.get(site))

    def result(self) -> dict[str, Any]:
        layers = {}
        for site, inputs in self._inputs.items():
            if inputs.count == 0:  # no RoI in any image
                continue
            count = int(inputs.count)
            truth = Moments(inputs.mean, inputs.deviation / inputs.count, count)
            spreads = self._spreads[site].items()
            layers[site.name] = {
                "channels": site.channels,
                "values": count,
                "norms": {norm: _errors(spread, truth) for norm, spread in spreads},
            }
        return layers


def used_statistics(found: Estimate, eps: float) -> tuple[Tensor, Tensor]:
    """Mean [C], and variance [C] with ``eps`` added, that normalise as an estimate does together
    with its scale and shift."""
    mean, var = found.mean.double(), found.var.double() + eps
    scale = 1.0 if found.scale is None else found.scale.double()
    shift = 0.0 if found.shift is None else found.shift.double()
    return mean - shift * var.sqrt() / scale, var / scale**2


def _of_groups(batch: Moments, groups: int) -> Moments:
    """Moments of groups of neighbouring channels, expanded to [C], from those of the channels."""
    mean = group_mean(batch.mean, groups)
    var = group_mean(batch.var + (batch.mean - mean).square(), groups)
    return Moments(mean, var, batch.count * (len(mean) // groups))


def _errors(spread: _Spread, truth: Moments) -> dict[str, float | None]:
    """Numbers of six digits for JSON, None for one that is not finite."""
    layer, count = spread.layer, spread.mean.count
    if spread.groups is not None:
        truth = _of_groups(truth, spread.groups)
    scale, log_truth = truth.var + layer.eps, (truth.var + layer.eps).log()
    mean_fixed = (spread.mean.mean - truth.mean).square() / scale
    var_fixed = (spread.log_var.mean - log_truth).square()
    running = layer.running_mean.double(), (layer.running_var.double() + layer.eps).log()
    squares = {
        "mean": mean_fixed + spread.mean.deviation / count / scale,
        "var": var_fixed + spread.log_var.deviation / count,
        "var_fixed": var_fixed,
        "running_mean": (running[0] - truth.mean).square() / scale,
        "running_var": (running[1] - log_truth).square(),
    }
    if spread.apart:
        squares["apart_var"] = torch.stack(spread.apart)
    errors = {key: float(square.mean().sqrt()) for key, square in squares.items()}
    return {k: float(f"{x:.6g}") if math.isfinite(x) else None for k, x in errors.items()}


@contextmanager
def _kept_random() -> Iterator[None]:
    """Puts all random states back: the mini-batches' RoIs are drawn at random."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same RoIs whenever it is measured
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
