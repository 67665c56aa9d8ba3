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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .base import SmallBatchNorm2d, check_groups
from .functional import Estimate, mixture, moments, normalize, statistics_dtype, without_autocast
from .kn import DEFAULT_GAIN, Posterior, Predicting, posterior
from .propagation import Pair
from .spec import register_norm
from .traced import Unscriptable, call_in_graph


@register_norm("GKN")
class GKN2d(Predicting, Unscriptable, nn.GroupNorm):
    """Group Kalman Normalization over [N, C, H, W]; GroupNorm's parameters, and GroupNorm where
    nothing precedes it.

    A subclass of ``nn.GroupNorm``, not of BatchNorm: code that freezes or recomputes BatchNorms
    leaves it alone. As it predicts in evaluation, too, it must know what precedes it. A model that
    was trained knows; for one that was loaded from a checkpoint call
    :func:`cbn_det.norms.find_chain` once with a batch (the trainers of this package do), else its
    first forward in evaluation raises an error. Nothing is kept in the state dict. A layer called
    several times in a forward takes what precedes its first call.

    Args:
        num_channels: channels C.
        groups: number of groups; must divide C.
        gain: weight of the prediction, in [0, 1), 0 being GroupNorm.
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
        gain: float = DEFAULT_GAIN,
        eps: float = 1e-5,
        affine: bool = True,
        **factory: Any,
    ) -> None:
        check_groups("GKN", num_channels, groups, eps)
        super().__init__(groups, num_channels, eps=eps, affine=affine, **factory)
        self._start_predicting(gain)

    @property
    def channels(self) -> int:
        return self.num_channels

    @property
    def predicts_in_evaluation(self) -> bool:
        return self.predicts

    def options(self) -> dict[str, Any]:
        """The constructor's options with their present values, as ``type(self)(C, **options)``
        takes."""
        return {
            "groups": self.num_groups,
            "gain": self.gain,
            "eps": self.eps,
            "affine": self.affine,
        }

    def extra_repr(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return f"{self.num_channels}, {options}"

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
                mixed = self._normalized if self.training else self._in_plain_operations
                output = mixed(input)
        if output is None:  # not F.group_norm, which refuses a single value in a group
            output = torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        self._mark(output)
        return output

    _replicate_for_data_parallel = SmallBatchNorm2d._replicate_for_data_parallel

    def _normalized(self, input: Tensor) -> Tensor | None:
        """None where nothing is predicted."""
        # samples as channels of a single one, so that their groups have statistics of their own
        x = input.reshape(1, -1, *input.shape[2:])
        groups = len(input) * self.num_groups

        def observe() -> Pair:
            batch = moments(x)
            mean, var = _of_groups(batch.mean, batch.var, groups)
            return mean.view(len(input), -1), var.view(len(input), -1)

        like = input.new_empty(0, dtype=statistics_dtype(input))
        mixed = self._mixed(input, like, _OfGroups(observe, self.gain, self.eps, self.num_groups))
        if mixed is None:
            return None
        values = (mixed.mean, mixed.var, mixed.share.expand_as(mixed.mean))
        each = self.num_channels // self.num_groups
        mean, var, share = (value.flatten().repeat_interleave(each) for value in values)
        weight, bias = (
            None if p is None else p.repeat(len(input)) for p in (self.weight, self.bias)
        )
        output = normalize(x, Estimate(mean, var, share, groups), weight, bias, self.eps)
        # not a view: an activation in place would put the graph of views in the chain's way
        output = torch.ops.aten._unsafe_view(output, input.shape)
        if not input.is_contiguous():
            output = output.to(memory_format=torch.channels_last)
        return output

    def _in_plain_operations(self, input: Tensor) -> Tensor | None:
        """The same in operations that can be traced and exported, with autograd's own gradient."""
        like = input.new_empty(0, dtype=statistics_dtype(input))
        prediction = self._predict(input, like, lambda pair: _of_groups(*pair, self.num_groups))
        if prediction is None:
            return None
        x = input.to(like.dtype).unflatten(1, (self.num_groups, -1))
        var, mean = torch.var_mean(x, (2, 3, 4), correction=0)
        prediction = torch.stack(prediction).unsqueeze(1)
        mean, var, *_ = posterior(prediction, mean, var, self.gain, self.eps)
        mean, var = (value[..., None, None, None] for value in (mean, var))
        output = ((x - mean) * (var + self.eps).rsqrt()).flatten(1, 2)
        if self.affine:
            scale, shift = (p.to(x.dtype).view(-1, 1, 1) for p in (self.weight, self.bias))
            output = torch.addcmul(shift, output, scale)
        return output.to(input.dtype)


class _OfGroups(Posterior):
    """Of statistics [N, groups], with a prediction for channels."""

    def __init__(self, observe: Callable[[], Pair], gain: float, eps: float, groups: int) -> None:
        super().__init__(observe, gain, eps)
        self.groups = groups

    def __call__(self, prediction: Tensor) -> Pair:
        mean, var = _of_groups(*prediction, self.groups)
        self.apart = (prediction[0].view(len(mean), -1) - mean.unsqueeze(1)).detach()
        return super().__call__(torch.stack((mean, var)).unsqueeze(1))

    def pull(self, d_mean: Tensor, d_var: Tensor) -> Tensor:
        d_mean, d_var = super().pull(d_mean, d_var).sum(1).unsqueeze(2)
        by_mean = torch.addcmul(d_mean, self.apart, d_var, value=2.0)
        return torch.stack((by_mean, d_var.expand_as(by_mean))).flatten(1) / self.apart.shape[1]


def _of_groups(mean: Tensor, var: Tensor, groups: int) -> Pair:
    """Moments [groups] of the equal mixture of each group's channels [C], which lie together."""
    mean, var = (value.unflatten(0, (groups, -1)).movedim(1, 0) for value in (mean, var))
    return mixture(mean, var, mean.new_full((), 1.0 / len(mean)))
