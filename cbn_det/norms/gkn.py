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
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import Proxy

from .functional import Estimate, mixture, moments, statistics_dtype, without_autocast
from .graph import mark
from .group_norm import GroupNorm2d
from .normalization import normalize
from .posterior import DEFAULT_GAIN, Predicting, posterior
from .spec import register_norm
from .traced import call_in_graph


@register_norm("GKN")
class GKN2d(Predicting, GroupNorm2d):
    """Group Kalman Normalization over [N, C, H, W]; GroupNorm's parameters, and GroupNorm where
    nothing precedes it.

    A subclass of ``nn.GroupNorm``: code that freezes or recomputes BatchNorms leaves it alone. It
    predicts in evaluation, too, and must know what precedes it. A model that was trained knows; for
    one that was loaded from a checkpoint call :func:`cbn_det.norms.find_chain` once with a batch
    (the trainers of this package do), else its first forward in evaluation raises an error. A layer
    called several times in a forward takes what precedes its first call.

    Args:
        num_channels: channels C.
        gain: weight of the prediction, in [0, 1), 0 being GroupNorm.
        groups, eps, affine, device, dtype: see :class:`GroupNorm2d`.

    Raises:
        ValueError: an option out of range, or groups that do not divide the channels.
    """

    predicts_in_evaluation = Predicting.predicts

    def __init__(self, num_channels: int, *, gain: float = DEFAULT_GAIN, **shared: Any) -> None:
        super().__init__(num_channels, **shared)
        self._start_predicting(num_channels, gain)

    def options(self) -> dict[str, Any]:
        return {"gain": self.gain, **super().options()}

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return call_in_graph(self, input)
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")
        if not torch.jit.is_tracing() and input.numel() == 0:
            return super().forward(input)
        output = None
        if self.gain != 0:
            # what is traced holds the prediction's operations, not its gradient's
            gradients = torch.is_grad_enabled() and not torch.jit.is_tracing()
            with without_autocast(input.device), torch.set_grad_enabled(gradients):
                prediction = self._predict(input, input.new_empty(0, dtype=statistics_dtype(input)))
                if prediction is not None:
                    plain = not self.training or torch.compiler.is_compiling()
                    output = (self._in_plain_operations if plain else self._mix)(input, prediction)
        if output is None:  # not F.group_norm, which refuses a single value in a group
            output = torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        mark(output, self)
        return output

    def _mix(self, input: Tensor, prediction: Tensor) -> Tensor:
        n, groups = len(input), self.num_groups
        # samples as channels of a single one, so that their groups have statistics of their own
        x = input.reshape(1, -1, *input.shape[2:])
        batch = moments(x)
        observed = (v.view(n, groups) for v in _of_groups(batch.mean, batch.var, n * groups))
        prediction = _OfGroups.apply(prediction, groups).unsqueeze(1)
        mixed = self._mixed(prediction.expand(2, n, groups), *observed)
        values = (mixed.mean, mixed.var, mixed.share.expand_as(mixed.mean))
        each = self.num_channels // groups
        mean, var, share = (value.flatten().repeat_interleave(each) for value in values)
        weight, bias = (None if p is None else p.repeat(n) for p in (self.weight, self.bias))
        output = normalize(x, Estimate(mean, var, share, n * groups), weight, bias, self.eps)
        # not a view: an activation in place would put the graph of views in the chain's way
        output = torch.ops.aten._unsafe_view(output, input.shape)
        if not input.is_contiguous():
            output = output.to(memory_format=torch.channels_last)
        return output

    def _in_plain_operations(self, input: Tensor, prediction: Tensor) -> Tensor:
        """The same in operations that can be traced and exported, with autograd's own gradient."""
        x = input.to(prediction.dtype).unflatten(1, (self.num_groups, -1))
        var, mean = torch.var_mean(x, (2, 3, 4), correction=0)
        prediction = torch.stack(_of_groups(*prediction, self.num_groups)).unsqueeze(1)
        mean, var, *_ = posterior(prediction, mean, var, self.gain, self.eps)
        mean, var = (value[..., None, None, None] for value in (mean, var))
        output = ((x - mean) * (var + self.eps).rsqrt()).flatten(1, 2)
        if self.affine:
            scale, shift = (p.to(x.dtype).view(-1, 1, 1) for p in (self.weight, self.bias))
            output = torch.addcmul(shift, output, scale)
        return output.to(input.dtype)


class _OfGroups(torch.autograd.Function):
    """:func:`_of_groups` of a prediction [2, C], as [2, groups]."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, groups: int) -> Tensor:
        mean, var = _of_groups(*prediction, groups)
        ctx.save_for_backward(prediction[0].view(groups, -1) - mean.unsqueeze(1))
        return torch.stack((mean, var))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (apart,) = ctx.saved_tensors
        d_mean, d_var = d.unsqueeze(2)
        by_mean = torch.addcmul(d_mean, apart, d_var, value=2.0)
        return torch.stack((by_mean, d_var.expand_as(by_mean))).flatten(1) / apart.shape[1], None


def _of_groups(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Moments [groups] of the equal mixture of each group's channels [C], which lie together."""
    mean, var = (value.unflatten(0, (groups, -1)).movedim(1, 0) for value in (mean, var))
    return mixture(mean, var, mean.new_full((), 1.0 / len(mean)))
