"""GroupNorm after a weight-standardised convolution (Qiao, Wang, Liu, Shen, Yuille; arXiv
1903.10520).

The convolution in front of the norm computes with its weight standardised over each output
channel's fan-in, in training and in evaluation::

    w' = (w - mean(w)) / (std(w) + 1e-5)

with the unbiased ``std``, and the constant outside the root, as in the authors' layer. What is
trained, decayed and saved is ``w``, the convolution's own parameter under its own name.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.hooks import RemovableHandle

from . import binding
from .binding import ConvBound
from .conv_call import operation_of
from .functional import statistics_dtype
from .group_norm import GroupNorm2d
from .spec import register_norm
from .traced import call_in_graph

_WS_EPS = 1e-5
_LOCK = threading.Lock()


def _lock() -> AbstractContextManager[Any]:
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def standardized(weight: Tensor) -> Tensor:
    """A convolution's weight [C_out, ...] with mean 0 and deviation 1 in each output channel, with
    gradient."""
    exact = weight.to(statistics_dtype(weight))
    std, mean = torch.std_mean(exact, dim=(1, 2, 3), keepdim=True)
    return ((exact - mean) / (std + _WS_EPS)).to(weight.dtype)


@register_norm("GN+WS")
class GNWS2d(ConvBound, GroupNorm2d):
    """GroupNorm over [N, C, H, W] that standardises the weight of the convolution it follows.

    A subclass of ``nn.GroupNorm``, with its parameters and state keys; it cannot be folded.

    Args:
        num_channels: channels C.
        groups, eps, affine, device, dtype: see :class:`GroupNorm2d`.

    Raises:
        ValueError: an option out of range, or groups that do not divide the channels.
        RuntimeError: in the first forward that can tell: the layer is bound to no convolution, or
            to one that did not make its input with the standardised weight.
    """

    needs_conv = True
    without_conv = "GN"

    def __init__(self, num_channels: int, **shared: Any) -> None:
        super().__init__(num_channels, **shared)
        self._callers: set[int] = set()  # threads in which the convolution runs
        binding.install()

    @property
    def num_features(self) -> int:
        return self.num_channels

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return call_in_graph(self, input)
        self._check_input(input)
        # not F.group_norm, which refuses a single value in a group
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    # ---- the convolution ----

    def _hooks_on(self, conv: nn.Conv2d) -> list[RemovableHandle]:
        if conv.weight[0].numel() < 2:
            raise ValueError(
                f"GN+WS after {conv}: its output channels have one weight each, which has no"
                " standard deviation: use GN there"
            )
        return [
            conv.register_forward_pre_hook(self._standardize),
            conv.register_forward_hook(self._restore, always_call=True),
        ]

    def _standardize(self, conv: nn.Module, args: tuple[Any, ...]) -> None:
        if "weight" not in conv._parameters:  # which would hide what is put in its place
            raise self._binding_error(f"is bound to {conv}, which computes its weight itself")
        weight = standardized(conv._parameters["weight"])
        with _lock():
            self._callers.add(_thread())
            # an instance's attribute is found before its parameter of that name
            conv.__dict__["weight"] = weight

    def _restore(self, conv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        with _lock():
            self._callers.discard(_thread())
            if not self._callers:  # else another thread is about to compute with it
                conv.__dict__.pop("weight", None)

    def _check_input(self, y: Tensor) -> None:
        """Refuses a ``y`` that a graph shows not to come from the standardised convolution."""
        conv = self.conv
        if conv is None:
            raise self._binding_error("is bound to no convolution")
        weight = conv._parameters.get("weight")
        node = None if torch.compiler.is_compiling() else operation_of(y)
        if node is None or weight is None or not (weight.is_leaf and weight.requires_grad):
            return
        first = source = node.next_functions[1][0] if "Convolution" in node.name() else None
        while source is not None and not hasattr(source, "variable"):
            source = source.next_functions[0][0]
        if source is None or source.variable is not weight:
            raise self._binding_error(f"is bound to {conv}, which did not make its input")
        if source is first:
            raise self._binding_error(
                f"is bound to {conv}, called without its hooks: call conv(x), not conv.forward(x)"
            )
