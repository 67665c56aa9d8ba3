"""Evaluation in which a test image has a share in the statistics that normalise it.

In training an image is part of the statistics that normalise it: all of BatchNorm's at one image
per GPU, half at two. Evaluation leaves it out, so that layers see other inputs than in training.
Mixing the image back in with its share of then closes that gap: EvalNorm (Singh, Shrivastava; ICCV
2019, arXiv 1904.06031), inference example weighing (Summers, Dinneen; ICLR 2020, arXiv 1906.03548).
With the image's moments ``m`` and ``v``, the running ``mu`` and ``sigma^2`` and the share ``s``::

    mean = s m + (1 - s) mu
    var  = s (v + (m - mean)^2) + (1 - s) (sigma^2 + (mu - mean)^2)

A layer evaluated like this depends on its input, so it cannot be folded into the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .base import SmallBatchNorm2d
from .functional import mixture, moments

#: norms below a module of this name see regions, not images
_REGIONS = "roi_heads"


@contextmanager
def image_share(
    model: nn.Module,
    share: float | None = None,
    *,
    images_per_gpu: int | None = None,
    world_size: int = 1,
) -> Iterator[list[str]]:
    """While the block runs, BatchNorm layers in evaluation mode normalise each image by a mixture
    of its own moments and the running statistics.

    Ours and torch's BatchNorms take part, but not those of RoI heads (regions proposed at test time
    are another selection than those sampled in training), nor frozen ones, nor, without a given
    ``share``, BRN and layers with ``freeze``, whose training already looks like their evaluation.

    Args:
        model: any; nothing in it is changed.
        share: weight of the image, in [0, 1], for all layers: 0 is plain evaluation, 1 leaves the
            running statistics out (instance normalisation). None: each layer's share in training,
            which is ``layer.batch_share / images_per_gpu``.
        images_per_gpu, world_size: of the training, for ``share=None``; SyncBN's statistics were of
            ``world_size * images_per_gpu`` images.

    Yields:
        Names of the layers that take part.

    Raises:
        ValueError: ``share`` out of range, or neither it nor ``images_per_gpu`` given.
    """
    if share is None:
        if not images_per_gpu or images_per_gpu < 1:
            raise ValueError("image_share: give share, or the training's images_per_gpu")
    elif not 0.0 <= share <= 1.0:
        raise ValueError(f"share={share!r}: expected a number in [0, 1]")
    handles, names = [], []
    for name, layer in model.named_modules():
        if not _takes_part(name, layer):
            continue
        own = share
        if own is None:
            own = _batch_share(layer) / images_per_gpu
            own /= world_size if "Sync" in type(layer).__name__ else 1
        if own > 0.0:
            handles.append(layer.register_forward_hook(partial(_weighed, own)))
            names.append(name)
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _takes_part(name: str, layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchNorm) or layer.running_mean is None:
        return False
    parameters = list(layer.parameters())
    frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
    return not frozen and _REGIONS not in name.split(".")


def _batch_share(layer: nn.Module) -> float:
    if not isinstance(layer, SmallBatchNorm2d):
        return 1.0
    return layer.batch_share if layer.freeze == 1 else 0.0  # it was trained as it is tested


def _weighed(share: float, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """A forward hook that normalises anew."""
    x = args[0]
    if layer.training or x.numel() == 0:
        return None
    take = layer.batch_moments if isinstance(layer, SmallBatchNorm2d) else moments
    images = [take(image) for image in x.split(1)]
    means = torch.stack([image.mean for image in images])  # [N, C]
    variances = torch.stack([image.var for image in images])
    mean, var = mixture(
        torch.stack([means, layer.running_mean.to(means).expand_as(means)]),
        torch.stack([variances, layer.running_var.to(means).expand_as(means)]),
        means.new_tensor([share, 1.0 - share]).view(2, 1, 1),
    )
    # images side by side as channels: one call of BatchNorm's own kernel, which takes statistics
    # and affine parameters of one dtype only
    weight, bias = (
        None if p is None else p.to(mean.dtype).repeat(len(x)) for p in (layer.weight, layer.bias)
    )
    flat = x.reshape(1, mean.numel(), *x.shape[2:])
    flat = F.batch_norm(flat, mean.flatten(), var.flatten(), weight, bias, eps=layer.eps)
    return flat.view(x.shape)
