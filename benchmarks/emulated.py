"""Several ranks in one process: each rank's images go through norms of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cbn_det.norms import settle


def emulate_ranks(model: nn.Module, ranks: int) -> None:
    """Gives each convolution with a trained BatchNorm-like norm a copy for every other rank, with
    the same weights and affine parameters and a norm with statistics and memory of its own.

    The gradient of a batch is then the mean of the ranks', as DistributedDataParallel makes it, if
    the losses are means over images.

    Args:
        model: detectron2's Faster or Mask R-CNN, before its optimizer is built.
        ranks: that the images of a batch are of, in order, as many of each.
    """
    rois: list[int] = []  # of each image
    sample = model.roi_heads.label_and_sample_proposals

    def counted(*args: Any, **kwargs: Any) -> Any:
        proposals = sample(*args, **kwargs)
        rois[:] = [len(of_image) for of_image in proposals]
        return proposals

    model.roi_heads.label_and_sample_proposals = counted
    for name, conv in list(model.named_modules()):
        if not (isinstance(conv, Conv2d) and isinstance(conv.norm, _BatchNorm)):
            continue
        if conv.norm.weight.requires_grad:
            others = [copy.deepcopy(conv) for _ in range(ranks - 1)]
            for rank, other in enumerate(others, start=1):
                other.weight, other.bias = conv.weight, conv.bias
                other.norm.weight, other.norm.bias = conv.norm.weight, conv.norm.bias
                conv.add_module(f"rank{rank}", other)
            conv.forward = _each_with_its_own(conv, others, rois, name.startswith("roi_heads"))


def _each_with_its_own(
    conv: nn.Module, others: list[nn.Module], rois: list[int], of_rois: bool
) -> Any:
    calls = [conv.forward, *others]

    def forward(x: Tensor) -> Tensor:
        if not conv.training:
            return calls[0](x)
        sizes = rois if of_rois else [1] * len(x)
        each = len(sizes) // len(calls)
        parts = [sum(sizes[i : i + each]) for i in range(0, len(sizes), each)]
        return torch.cat([call(y) for call, y in zip(calls, x.split(parts), strict=True)])

    return forward


def _norms_of_ranks(model: nn.Module) -> Iterator[list[nn.Module]]:
    for module in model.modules():
        if hasattr(module, "rank1"):
            others = [child for name, child in module.named_children() if name.startswith("rank")]
            yield [module.norm, *(other.norm for other in others)]


@torch.no_grad()
def pool_statistics(model: nn.Module) -> None:
    """Gives all ranks their pooled running statistics, as ``sync_running_stats`` does between
    processes."""
    settle(model)
    for norms in _norms_of_ranks(model):
        mean = torch.stack([norm.running_mean for norm in norms]).double()
        var = torch.stack([norm.running_var for norm in norms]).double()
        pooled = mean.mean(0)
        pooled_var = (var + mean.square()).mean(0) - pooled.square()
        for norm in norms:
            norm.running_mean.copy_(pooled)
            norm.running_var.copy_(pooled_var)


def of_one_rank(state: dict[str, Any]) -> dict[str, Any]:
    """The weights of a model with ranks, for one without."""
    return {name: value for name, value in state.items() if ".rank" not in name}
