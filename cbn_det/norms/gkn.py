"""Group Kalman Normalization: GroupNorm's statistics, combined with a prediction as in KN.

The paper's abstract (arXiv 1802.03133) says that Kalman Normalization generalises to groups and
gives no equations that were at hand; this is our reading. For each sample, with ``m, v`` mean and
variance over a group's channels and positions, and ``m'_c, v'_c`` the prediction for its channels::

    m' = mean_c m'_c
    v' = mean_c (v'_c + m'_c^2) - m'^2

Both are mixed as in :mod:`.kn`. Nothing is averaged over samples or over time, so a sample's result
does not depend on its mini-batch, and evaluation does what training does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .base import SmallBatchNorm2d, is_number
from .functional import Moments, mixture, moments, normalize, statistics_dtype
from .kn import DEFAULT_GAIN, Predicting, observed
from .prediction import Pair, pooled_samples
from .spec import register_norm
from .traced import Unscriptable, call_in_graph


@register_norm("GKN")
class GKN2d(Predicting, Unscriptable, nn.GroupNorm):
    """Group Kalman Normalization over [N, C, H, W]; GroupNorm's parameters, and GroupNorm where
    nothing precedes it.

    A subclass of ``nn.GroupNorm``, not of BatchNorm: code that freezes or recomputes BatchNorms
    leaves it alone. As it predicts in evaluation, too, it must know what precedes it. A model that
    was trained knows; one that was loaded from a checkpoint runs its first forward in evaluation
    twice, the first time with gradients enabled to find out (layers that this forward does not
    reach, such as a head without a RoI, have it done again).
    :func:`cbn_det.norms.find_chain` does it explicitly, and should where a loaded model is run in
    parts, one by one, before it runs whole: a part does not know what comes before it. Nothing is
    kept in the state dict. A layer called several times in a forward takes what precedes its first
    call. Results of ``torch.func.functional_call`` are wrong, in evaluation, too: predictions are
    made with the model's own convolutions, as in :class:`KN2d`.

    Args:
        num_channels: channels C.
        groups: number of groups; must divide C.
        gain: weight of the prediction, in [0, 1), 0 being GroupNorm; or ``'learned'``: one
            parameter ``gain_logit`` a layer, as in KN.
        recursion, detach: as in :class:`KN2d`, whose limits under activation checkpoints
            ``'authors'`` has here, too: between segments of re-entrant ones it is a constant for
            the gradient, and with another forward before the backward pass that one's, which
            ``'consistent'`` avoids. With ``'authors'`` each sample has its own chain; RoIs take the
            mixture of all samples, so there a sample's mini-batch does count.
        eps: added to the variance.
        affine: whether there are a weight and a bias per channel.

    Raises:
        ValueError: an option out of range, or groups that do not divide the channels.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        groups: int = 32,
        gain: float | str = DEFAULT_GAIN,
        recursion: str = "consistent",
        detach: bool = False,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        if type(groups) is not int or groups < 1:
            raise ValueError(f"groups={groups!r}: expected a positive int")
        if num_channels % groups:
            fitting = max(g for g in range(1, groups) if num_channels % g == 0)
            raise ValueError(
                f"groups={groups} does not divide the {num_channels} channels: use"
                f" GKN(groups={fitting}) there"
            )
        if not (is_number(eps) and eps >= 0.0):
            raise ValueError(f"eps={eps!r}: expected a number of at least 0")
        super().__init__(groups, num_channels, eps=eps, affine=affine)
        self._start_predicting(gain, recursion, detach)

    @property
    def channels(self) -> int:
        return self.num_channels

    @property
    def predicts_in_evaluation(self) -> bool:
        return self.predicts

    def options(self) -> dict[str, Any]:
        """The constructor's options with their present values, as ``type(self)(C, **options)``
        takes."""
        return (
            {"groups": self.num_groups}
            | self._predicting_options()
            | {"eps": self.eps, "affine": self.affine}
        )

    def extra_repr(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return f"{self.num_channels}, {options}"

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return call_in_graph(self, input)
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")
        if input.numel() == 0:
            return self._connected(super().forward(input))
        with torch.autocast(input.device.type, enabled=False):
            output, handed = (None, None) if self.gain == 0 else self._predicted(input)
        if output is None:  # not F.group_norm, which refuses a single value in a group
            output = torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
            output = self._connected(output)
        self._hand_on(handed, output)
        return output

    _replicate_for_data_parallel = SmallBatchNorm2d._replicate_for_data_parallel

    def _predicted(self, input: Tensor) -> tuple[Tensor | None, Pair | None]:
        """The output with the prediction taken in, or None; and what is handed on, or None."""
        prediction = self._predict(input, input.new_empty(0, dtype=statistics_dtype(input)))
        if prediction is None and self.recursion == "consistent":
            return None, None
        # samples as channels of a single one, so that their groups have statistics of their own
        x = input.reshape(1, -1, *input.shape[2:])
        batch = moments(x)
        if prediction is not None:
            prediction = self._of_groups(*prediction, samples=len(input))
        handed = self._posterior(x, batch, prediction) if self.recursion == "authors" else None
        if prediction is None:
            return None, handed
        combined = self._combine(prediction, *self._of_samples(batch.mean, batch.var))
        mean, var, share = (self._of_channels(value, len(input)).flatten() for value in combined)
        weight, bias = (
            None if p is None else p.repeat(len(input)) for p in (self.weight, self.bias)
        )
        groups = len(input) * self.num_groups
        output = normalize(x, mean, var, weight, bias, share, self.eps, groups)
        # not a view: an activation in place would put the graph of views in the chain's way
        output = torch.ops.aten._unsafe_view(output, input.shape)
        if not input.is_contiguous():
            output = output.to(memory_format=torch.channels_last)
        return output, handed

    def _posterior(self, x: Tensor, batch: Moments, prediction: Pair | None) -> Pair:
        """The estimate [N, C] with all of its dependence on the input, for the layers that
        follow."""
        mean, var = batch.mean, batch.var
        if not self.detach and torch.is_grad_enabled() and x.requires_grad:
            mean, var = observed(x, mean, var)
        mean, var = self._of_samples(mean, var)
        if prediction is not None:
            mean, var, _ = self._combine(prediction, mean, var)
        mean, var = (self._of_channels(value, len(mean)) for value in (mean, var))
        return (mean.detach(), var.detach()) if self.detach else (mean, var)

    def _of_samples(self, mean: Tensor, var: Tensor) -> Pair:
        """Statistics of each sample's groups, [N, groups], from those of its channels, [N * C]."""
        return _grouped(mean.view(-1, self.num_channels), var.view(-1, self.num_channels), self)

    def _of_groups(self, mean: Tensor, var: Tensor, samples: int) -> Pair:
        """The prediction for groups, [1 or N, groups], from that for channels."""
        if mean.dim() == 2 and len(mean) != samples:
            mean, var = pooled_samples(mean, var)
        return _grouped(mean.view(-1, self.num_channels), var.view(-1, self.num_channels), self)

    def _of_channels(self, values: Tensor, samples: int) -> Tensor:
        """[N, C] from [N or 1, groups or 1]."""
        each = self.num_channels // self.num_groups
        return values.expand(samples, self.num_groups).repeat_interleave(each, 1)


def _grouped(mean: Tensor, var: Tensor, layer: nn.GroupNorm) -> Pair:
    """[N, groups] from [N, C]: moments of the equal mixture of a group's channels."""
    mean, var = (value.unflatten(1, (layer.num_groups, -1)).movedim(2, 0) for value in (mean, var))
    return mixture(mean, var, mean.new_full((), 1.0 / len(mean)))
