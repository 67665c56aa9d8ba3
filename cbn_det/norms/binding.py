"""Which convolution feeds a norm.

A norm is called as ``norm(y)`` and sees neither the weight nor the input of the convolution that
made ``y``. torch calls a hook whenever a submodule is assigned to its parent, which is enough to
see that a norm was put into a convolution (detectron2's ``Conv2d`` wrapper) or right after one
(``nn.Sequential``, torchvision's blocks). Nothing is patched, and what was inferred is checked
against the autograd graph on the first training forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

_installed = False


def install() -> None:
    """Starts watching module registration in this process; calling it again does nothing."""
    global _installed
    if not _installed:
        register_module_module_registration_hook(_on_registration)
        _installed = True


class ConvBound:
    """Mixin of a norm (an ``nn.Module`` with ``num_features``) that can be bound to a convolution.

    The binding lives in ``__dict__``, not among the submodules: the convolution owns the norm, not
    the reverse. It is made of bound methods only, so that deepcopy and pickling carry it over.
    """

    num_features: int
    training: bool

    @property
    def needs_conv(self) -> bool:
        """Whether the method must know the convolution that feeds this layer."""
        return False

    @property
    def conv(self) -> nn.Conv2d | None:
        """The convolution this layer is bound to."""
        return self.__dict__.get("_conv")

    def bind(self, conv: nn.Conv2d) -> None:
        """Names the convolution whose output this layer normalises. Done by itself wherever the
        norm is registered in, or right after, an ``nn.Conv2d``."""
        self.unbind()
        handle = conv.register_forward_pre_hook(self._keep_input)
        self.__dict__.update(_conv=conv, _conv_handle=handle, _binding_checked=False)

    def unbind(self) -> None:
        """Forgets the convolution."""
        handle = self.__dict__.pop("_conv_handle", None)
        if handle is not None:
            handle.remove()
        self.__dict__.update(_conv=None, _conv_input=None, _binding_checked=False)

    def _keep_input(self, conv: nn.Module, args: tuple[Any, ...]) -> None:
        self.__dict__["_conv_input"] = args[0].detach() if self.training and args else None

    def _take_conv_input(self) -> Tensor | None:
        """The input of the convolution's latest forward, released by this call."""
        kept = self.__dict__.get("_conv_input")
        self.__dict__["_conv_input"] = None
        return kept

    def _check_binding(self, y: Tensor, conv_input: Tensor | None) -> None:
        """Raises a RuntimeError unless ``y`` is the output of the convolution this norm is bound
        to."""
        if self.__dict__.get("_binding_checked") and conv_input is not None:
            return
        name = type(self).__name__
        advice = (
            f"{name} carries remembered statistics over to the present weight of the convolution"
            f" before it. Use NORM: \"{name.removesuffix('2d')}(compensation='none')\" at this"
            " site, or call norm.bind(conv)."
        )
        if self.conv is None:
            raise RuntimeError(
                f"{name}({self.num_features}) is bound to no convolution: it was registered neither"
                " in nor right after an nn.Conv2d (deformable, transposed and Trident convolutions"
                f" are none). {advice}"
            )
        if torch.is_grad_enabled() and y.grad_fn is not None:
            problem = _mismatch(self.conv, y)
            if problem is not None:
                raise RuntimeError(
                    f"{name}({self.num_features}) is bound to {self.conv}, but {problem}. {advice}"
                )
            self.__dict__["_binding_checked"] = True
        if conv_input is None:
            raise RuntimeError(
                f"{name}({self.num_features}) did not see the input of {self.conv}, to which it is"
                " bound: the convolution must be called as conv(x), once before each call of the"
                f" norm. {advice}"
            )


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    replaced = parent._modules.get(name)
    if isinstance(replaced, ConvBound) and replaced is not child:
        # freeze(), SyncBatchNorm conversion, surgery by users: the convolution must stop feeding it
        replaced.unbind()
    if isinstance(child, ConvBound) and child.needs_conv:
        conv = _feeding_conv(parent, name)
        if conv is not None and conv.out_channels == child.num_features:
            child.bind(conv)


def _feeding_conv(parent: nn.Module, name: str) -> nn.Conv2d | None:
    if isinstance(parent, nn.Conv2d):
        return parent
    before = None
    for key, module in parent._modules.items():
        if key == name:  # assigned anew: it keeps the place of the module that it replaces
            break
        before = module
    return before if isinstance(before, nn.Conv2d) else None


def past_hooks(node: Any, output: int) -> Any:
    """From a node of an autograd graph, and which of its outputs is meant, past what full backward
    hooks of modules look at gradients with: its outputs are as its inputs."""
    while node is not None and "BackwardHookFunction" in node.name():
        node, output = node.next_functions[output]
    return node


def _mismatch(conv: nn.Conv2d, y: Tensor) -> str | None:
    """What the autograd graph of ``y`` says against its being the output of ``conv``; None if
    nothing."""
    node = past_hooks(y.grad_fn, y.output_nr)
    if node is None:
        return None
    if "CompiledFunction" in node.name():  # its graph is not to be seen
        return None
    if "Convolution" not in node.name():
        return f"its input comes from {node.name()}, not from a convolution"
    source = node.next_functions[1][0]
    if source is not None and "Copy" in source.name():  # the cast of autocast
        source = source.next_functions[0][0]
    if source is None:
        frozen = "the convolution before it is frozen, so it is another one"
        return frozen if conv.weight.requires_grad else None
    weight = getattr(source, "variable", None)  # None: not a leaf
    if (
        weight is None and "weight" in conv._parameters
    ):  # else it is parametrised: conv.weight is it
        return "that computes with another weight than its own (weight standardisation?)"
    if weight is not None and weight is not conv.weight:
        return "another convolution's output reaches it"
    return None
