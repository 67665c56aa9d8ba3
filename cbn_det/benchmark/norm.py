"""A norm alone, forward and backward, beside a copy: how near it is to the memory's speed."""

from __future__ import annotations

import torch
from torch import nn

from .layer import build_layer_norm
from .worker import Workload

COPY = "copy"


def norm_workload(norm: str, shape: tuple[int, int, int, int], device: str) -> Workload:
    """
    Args:
        norm: "BN", "GN", a norm of ours, with options or without, or "copy": one tensor written
            over another. There is no convolution: CBN needs ``compensation='none'``, KN has
            nothing to predict from.
        shape: of the float32 input, [N, C, H, W].

    Raises:
        ValueError: an unknown norm, or one that does not fit the channels.
    """
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    gradient = torch.randn_like(x)
    if norm == COPY:
        return Workload(lambda: gradient.copy_(x), nn.Module(), torch.device(device), {})
    model = build_layer_norm(norm, shape[1]).to(device)
    x.requires_grad_()

    def step() -> None:
        x.grad = None
        model(x).backward(gradient)

    return Workload(step, model, torch.device(device), {})
