"""The branch that norms take on CUDA, run on a machine that has none.

SyncBatchNorm's kernels, which torch has for GPUs alone, are written out in plain operations for
"cpu", and as shapes for "meta".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, library

from cbn_det.norms import functional


def _channels(values: Tensor | None, like: Tensor) -> Tensor:
    values = like.new_ones(()) if values is None else values
    return values.view(1, -1, 1, 1) if values.dim() else values


def _elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float):
    gain = invstd if weight is None else invstd * weight
    shift = -mean * gain if bias is None else bias - mean * gain
    return (x * _channels(gain, x) + _channels(shift, x)).to(x.dtype)


def _backward_reduce(grad, x, mean, invstd, weight, input_g, weight_g, bias_g):
    grad, x = grad.to(mean.dtype), x.to(mean.dtype)
    sum_dy = grad.sum((0, 2, 3))
    sum_dy_xmu = (grad * (x - _channels(mean, x))).sum((0, 2, 3))
    by_weight = sum_dy_xmu * invstd if weight_g else None
    return sum_dy, sum_dy_xmu, by_weight, sum_dy.clone() if bias_g else None


def _backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    total = count.sum()
    mean_dy, mean_dy_xmu = sum_dy / total, sum_dy_xmu / total
    centred = (x.to(mean.dtype) - _channels(mean, x)) * _channels(invstd.square() * mean_dy_xmu, x)
    scale = invstd if weight is None else invstd * weight
    return ((grad - _channels(mean_dy, x) - centred) * _channels(scale, x)).to(x.dtype)


def _statistics_of(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=functional.statistics_dtype(x))


_ON_CPU = {
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}
_ON_META = {
    "batch_norm_update_stats": lambda x, *_: tuple(_statistics_of(x) for _ in range(2)),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, x, *_: tuple(_statistics_of(x) for _ in range(4)),
    "batch_norm_backward_elemt": lambda grad, x, *_: torch.empty_like(x),
}


@contextmanager
def cuda_branch() -> Iterator[None]:
    """Within it, norms on "cpu" and "meta" tensors do what they do on CUDA."""
    before = functional.FUSED
    kernels_of_torch = vars(library)["Library"]("aten", "IMPL")
    try:
        for kind, kernels in (("CPU", _ON_CPU), ("Meta", _ON_META)):
            for name, kernel in kernels.items():
                kernels_of_torch.impl(name, kernel, kind)
        functional.FUSED = ("cpu", *before)
        yield
    finally:
        functional.FUSED = before
        kernels_of_torch._destroy()
