"""One call of a convolution as it was computed, and whether an activation is its output.

The node of an activation in the autograd graph keeps the very input, with what the module's forward
padded, and the stride and padding that it was computed with. Where that is not to be seen
(``torch.compile``, activation checkpoints), what a hook on the module saw is compared by numbers.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_statistics import ConvGeometry
from .functional import statistics_dtype, without_autocast

# Of nodes whose inside is not to be seen.
_CLOSED = ("CompiledFunction", "CheckpointFunction")

# Of the standard deviation of a convolution's output: the largest deviation from it that may be
# the rounding of its weight (fake quantisation). Another convolution's output is off by 1.4, a
# dropout of one in a hundred by 0.1.
_LARGEST_DEVIATION = 0.05


@dataclass(frozen=True)
class ConvCall:
    """What one call of a convolution computed with, beside its weight and bias.

    Attributes:
        x: [N, C_in, H_in, W_in], its input, without gradient.
        geometry: of the operation.
    """

    x: Tensor
    geometry: ConvGeometry

    def fits(self, y: Tensor) -> bool:
        """Whether its output has the size of ``y`` [N, C, H, W]."""
        size = self.geometry.output_size(tuple(self.x.shape[2:]))
        return len(self.x) == len(y) and size == tuple(y.shape[2:])

    @torch.no_grad()
    def made(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> bool | None:
        """Whether ``y`` is its output up to rounding, by the first and the last sample; None where
        these numbers cannot tell, being constant or not finite.

        Waits for the device.
        """
        some = slice(None, None, max(1, len(y) - 1))
        geometry, kind = self.geometry, y.dtype
        dtype = statistics_dtype(y)
        with without_autocast(y.device):
            # rounded to 16 bits where autocast or the model's dtype did so
            x, weight = (t.to(kind).to(dtype) for t in (self.x[some], weight))
            bias = None if bias is None else bias.to(kind).to(dtype)
            x = geometry.padded(x)
            expected = F.conv2d(
                x, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups
            )
            y = y[some].to(dtype)
            error = (y - expected).square().mean()
            spread = expected.var((0, 2, 3), correction=0).mean()
            size = torch.maximum(expected.square().mean(), y.square().mean())
        error, spread, size = torch.stack([error, spread, size]).tolist()
        if not isfinite(error + size):
            return None
        rounding = max(2e-3, 8 * torch.finfo(kind).eps)
        if error > _LARGEST_DEVIATION**2 * spread + rounding**2 * size:
            return False
        return True if spread > 0 else None


def past_hooks(node: Any, output: int) -> Any:
    """From a node of an autograd graph, and which of its outputs is meant, past what full backward
    hooks of modules look at gradients with: its outputs are as its inputs."""
    while node is not None and "BackwardHookFunction" in node.name():
        node, output = node.next_functions[output]
    return node


def operation_of(y: Tensor) -> Any:
    """The node of the operation that made ``y``; None where it is not to be seen."""
    node = past_hooks(y.grad_fn, y.output_nr)
    if node is None or any(kind in node.name() for kind in _CLOSED):
        return None
    return node


def mismatch(conv: nn.Conv2d, node: Any) -> str | None:
    """What the operation that made an activation says against its being the output of ``conv``;
    None if nothing."""
    if "Convolution" not in node.name():
        return f"its input comes from {node.name()}, not from a convolution"
    if node._saved_transposed:
        return "its input comes from a transposed convolution"
    source = node.next_functions[1][0]
    if source is not None and "Copy" in source.name():  # the cast of autocast
        source = source.next_functions[0][0]
    plain = conv._parameters.get("weight")
    if source is None:
        frozen = plain is not None and not plain.requires_grad
        return None if frozen else "the convolution before it is frozen, so it is another one"
    if plain is not None and plain.grad_fn is not None:  # functional_call, shards of FSDP
        return None if source is plain.grad_fn else "another convolution's output reaches it"
    weight = getattr(source, "variable", None)  # None: not a leaf
    if weight is None and plain is not None:  # else it is parametrised: conv.weight is it
        return (
            "that computes with another weight than its own (weight standardisation,"
            " quantisation-aware training?)"
        )
    if weight is not None and weight is not plain:
        return "another convolution's output reaches it"
    return None


def call_by(node: Any, kernel: tuple[int, int]) -> ConvCall | None:
    """The call that a convolution's node stands for; None where it does not show its input."""
    x = saved(node, "input")
    if x is None:
        return None
    geometry = ConvGeometry.of_operation(
        kernel, node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_groups
    )
    return ConvCall(x.detach(), geometry)


def saved(node: Any, name: str) -> Tensor | None:
    """What a node keeps for its backward pass; None where hooks hold it elsewhere (an activation
    checkpoint would run its segment again to show it), or this version of torch does not say."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is None or getattr(raw, "unpack_hook", raw) is not None:
        return None
    try:
        return getattr(node, f"_saved_{name}")
    except RuntimeError:  # changed in place since: the backward pass will say so
        return None


def computed_weight(conv: nn.Conv2d) -> tuple[Tensor, bool]:
    """A weight that is no parameter of its own, as the convolution's latest call had it, without
    gradient; and whether it is trained.

    Parametrisations are read in evaluation mode, in which none of their state moves on: the power
    iteration of ``spectral_norm`` takes a step whenever its weight is read in training. No graph is
    built, which an activation checkpoint would miss where nothing is recorded.
    """
    made_by = getattr(conv, "parametrizations", {})
    if "weight" not in made_by:
        with torch.enable_grad():
            return conv.weight.detach(), conv.weight.requires_grad
    with torch.no_grad(), ExitStack() as stack:
        for part in made_by["weight"].modules():
            stack.callback(setattr, part, "training", part.training)
            part.training = False
        weight = conv.weight
    return weight, any(p.requires_grad for p in made_by["weight"].parameters())
