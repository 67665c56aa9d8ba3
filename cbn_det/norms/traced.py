"""A norm layer in the graphs that ``torch.fx`` and ``torch.jit`` make of a model."""

from __future__ import annotations

from typing import NoReturn

from torch import nn
from torch.fx import Proxy


def call_in_graph(layer: nn.Module, input: Proxy) -> Proxy:
    """One node that calls the layer, as ``torch.fx`` traces torch's own modules: what a layer does
    depends on its mode and on earlier iterations, so it is no part of a graph that is traced once.
    """
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})


class Unscriptable:
    """Mixin of a norm that ``torch.jit.script`` cannot compile."""

    def __prepare_scriptable__(self) -> NoReturn:
        become = ""
        if isinstance(self, nn.BatchNorm2d):
            become = (
                ", or script a model in which cbn_det.deploy.to_batchnorm(model) made its norms"
                " nn.BatchNorm2d (in place: give it a copy of one that goes on training)"
            )
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.jit.trace on"
            f" model.eval(){become}"
        )
