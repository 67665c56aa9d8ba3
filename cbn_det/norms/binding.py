"""Which convolution feeds a norm.

A norm is called as ``norm(y)`` and does not see the convolution that made ``y``. torch calls a hook
whenever a submodule is assigned to its parent, which shows that a norm was put into a convolution
(detectron2's ``Conv2d`` wrapper) or right after one (``nn.Sequential``, torchvision's blocks). What
was inferred is checked in each training forward against the autograd graph or, where there is none
to be seen, by the numbers of the first ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from .conv_call import ConvCall, call_by, computed_weight, mismatch, operation_of, saved
from .conv_statistics import ConvGeometry
from .functional import statistics_dtype
from .recalibration import in_backward

# Forwards whose numbers are read, which waits for the device: two that agree are proof, the others
# are constant.
_ENOUGH = 50

# of the latest call of a layer's convolution
NOTHING_SEEN = {"_conv_input": None, "_computed_weight": None}

_installed = False


def install() -> None:
    """Starts watching module registration in this process; calling it again does nothing."""
    global _installed
    if not _installed:
        register_module_module_registration_hook(_on_registration)
        _installed = True


class ConvBound:
    """Mixin of a norm (an ``nn.Module`` with ``num_features``) that can be bound to a convolution.

    The binding lives in ``__dict__``, not among the submodules: the convolution owns the norm. It
    is made of bound methods only, so that deepcopy and pickling carry it over.
    """

    num_features: int
    training: bool
    conv: nn.Conv2d | None = None  #: the convolution this layer is bound to

    @property
    def needs_conv(self) -> bool:
        """Whether the method must know the convolution that feeds this layer."""
        return False

    @property
    def without_conv(self) -> str:
        """The norm to use in a config where no convolution can be known."""
        return f"{type(self).__name__.removesuffix('2d')}(compensation='none')"

    def bind(self, conv: nn.Conv2d) -> None:
        """Names the convolution whose output this layer normalises. Done by itself wherever the
        norm is registered in, or right after, an ``nn.Conv2d``."""
        self.unbind()
        self.__dict__.update(conv=conv, _conv_handles=self._hooks_on(conv))

    def unbind(self) -> None:
        """Forgets the convolution."""
        for handle in self.__dict__.pop("_conv_handles", ()):
            handle.remove()
        self.__dict__.update(NOTHING_SEEN, conv=None, _checked={})

    def _hooks_on(self, conv: nn.Conv2d) -> list[RemovableHandle]:
        """What is done at each call of the convolution."""
        return [conv.register_forward_pre_hook(self._keep_input)]

    def _keep_input(self, conv: nn.Module, args: tuple[Any, ...]) -> None:
        bound = self.conv
        if bound is None:
            return
        if conv is not bound:
            # put in the place of the other one, with its hooks (torch.ao.quantization does so)
            self.__dict__.update(conv=conv, _checked={})
        self.__dict__["_conv_input"] = args[0].detach() if self.training and args else None

    def _take_conv_input(self) -> Tensor | None:
        """The input of the convolution's latest call, released by this call."""
        kept = self.__dict__.get("_conv_input")
        self.__dict__.update(NOTHING_SEEN)
        return kept

    def _conv_weight(self) -> tuple[Tensor, bool]:
        """The convolution's present weight, without gradient, and whether it is trained. A computed
        one (parametrised) is that of the convolution's call, and computed again at most once."""
        conv = self.conv
        weight = conv._parameters.get("weight")
        if weight is not None:
            return weight.detach(), weight.requires_grad
        if self.__dict__.get("_computed_weight") is None:
            self.__dict__["_computed_weight"] = computed_weight(conv)
        return self.__dict__["_computed_weight"]

    @property
    def weight_shape(self) -> torch.Size:
        """Of the convolution's weight."""
        return self._conv_weight()[0].shape

    def flat_weight(self, dtype: torch.dtype) -> Tensor:
        """[C, d]: the convolution's present weight, without gradient."""
        return self._conv_weight()[0].flatten(1).to(dtype)

    @property
    def weight_is_trained(self) -> bool:
        return self._conv_weight()[1]

    @property
    def weight_is_at_hand(self) -> bool:
        """Whether the convolution's weight is a parameter of its own, whole at any time."""
        weight = self.conv._parameters.get("weight")
        return weight is not None and not self._weight_is_sharded

    @property
    def _weight_is_sharded(self) -> bool:
        """Whether the convolution's weight is whole only while it runs (FSDP)."""
        conv = self.conv
        weight = None if conv is None else conv._parameters.get("weight")
        if weight is None or weight.dim() != 4:
            return weight is not None
        return type(weight) is not nn.Parameter and type(weight.detach()) is not Tensor

    def _find_call(self, y: Tensor, conv_input: Tensor | None, recorded: bool) -> ConvCall | None:
        """The call of the convolution that made ``y``, which was last seen to be called with
        ``conv_input``; None for a forward that is not recorded, which needs none.

        Raises:
            RuntimeError: the layer is bound to no convolution, or ``y`` is not its output.
        """
        conv = self.conv
        if conv is None:
            raise self._binding_error(
                "is bound to no convolution: it was registered neither in nor right after an"
                " nn.Conv2d (deformable, transposed and Trident convolutions are none)"
            )
        if not recorded:
            return None
        node, call = operation_of(y), None
        plain = "weight" in conv._parameters
        if node is not None:
            problem = mismatch(conv, node)
            if problem is not None:
                raise self._binding_error(f"is bound to {self._conv_name()}, but {problem}")
            if not plain:
                self._take_weight(node)
            call = call_by(node, conv.kernel_size)
        by_graph = call is not None
        if call is None:
            call = self._call_seen(y, conv_input)
        if not (by_graph and plain):
            self._check_numbers(call, y, (by_graph, plain))
        return call

    def _see_weight(self, y: Tensor | None) -> None:
        """Forgets a computed weight of before an optimiser step. The present one is that of the
        call that made ``y``, where its graph shows it."""
        self.__dict__["_computed_weight"] = None
        conv = self.conv
        if y is None or conv is None or "weight" in conv._parameters:
            return
        node = operation_of(y)
        if node is not None and mismatch(conv, node) is None:
            self._take_weight(node)

    def _take_weight(self, node: Any) -> None:
        weight = saved(node, "weight")
        # autocast's copy has lost the small changes that statistics are carried over by
        if weight is not None and weight.dtype == statistics_dtype(weight):
            self.__dict__["_computed_weight"] = (weight.detach(), weight.requires_grad)

    def _call_seen(self, y: Tensor, conv_input: Tensor | None) -> ConvCall:
        if conv_input is not None:
            return ConvCall(conv_input, ConvGeometry.of(self.conv))
        if in_backward():
            raise self._binding_error(
                f"is recomputed by a re-entrant activation checkpoint apart from"
                f" {self._conv_name()}, to which it is bound: use checkpoint(...,"
                " use_reentrant=False), or have both in one checkpointed segment"
            )
        raise self._binding_error(
            f"did not see the input of {self._conv_name()}, to which it is bound: where no graph of"
            " single operations shows it, as under torch.compile, the convolution must be called as"
            " conv(x), once before each call of the norm"
        )

    def _check_numbers(self, call: ConvCall, y: Tensor, key: tuple[bool, bool]) -> None:
        """Raises a RuntimeError unless ``y`` is the output of ``call``: by its size and, in the
        first forwards of each kind, by numbers."""
        made = call.fits(y)
        checked = self.__dict__.setdefault("_checked", {})
        if made and checked.get(key, 0) < _ENOUGH:
            made = call.made(y, self._conv_weight()[0], self.conv.bias)
            checked[key] = checked.get(key, 0) + (1 if made is None else _ENOUGH // 2)
        if made is False:
            raise self._binding_error(
                f"is bound to {self._conv_name()}, but its input, {list(y.shape)}, is not what that"
                f" convolution makes of the latest input that it was called with,"
                f" {list(call.x.shape)}: something lies between, or {type(self.conv).__name__}"
                " pads or changes its weight within its forward, or it was called again before"
                " this norm (padding and further calls are no error in eager mode, without"
                " activation checkpoints, where the graph shows what was computed)"
            )

    def _conv_name(self) -> str:
        return f"{type(self.conv).__name__}({self.conv.extra_repr()})"

    def _binding_error(self, problem: str) -> RuntimeError:
        name = type(self).__name__
        return RuntimeError(
            f"{name}({self.num_features}) {problem}. {name} works with the weight of the"
            f' convolution before it. Use NORM: "{self.without_conv}" at this site, or call'
            " norm.bind(conv)."
        )


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    replaced = parent._modules.get(name)
    if isinstance(replaced, ConvBound) and replaced is not child:
        # freeze(), SyncBatchNorm conversion, surgery by users: the convolution must stop feeding it
        replaced.unbind()
    if isinstance(child, ConvBound) and child.needs_conv:
        # torch.fx copies modules into bare ones, in an order that says nothing of what feeds what
        is_copied = type(parent) is nn.Module or isinstance(parent, GraphModule)
        conv = None if is_copied and child.conv is not None else _feeding_conv(parent, name)
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
