"""Looking through a whole model for what precedes its KN and GKN layers, frozen parts and all.

One forward in evaluation mode in which all parameters take part, so that what is frozen is followed
like the rest, and what was compiled runs as it was written. Predictions start from the norms in it
that normalise by running statistics and are not trained (FrozenBatchNorm2d, ``nn.BatchNorm2d`` in
evaluation), too. Those that never gathered any (mean 0 and variance 1 everywhere, as in untrained
models and in weights into which statistics were folded) end the chain.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .chain import Chained, layers_of, thread
from .graph import mark
from .recalibration import in_backward


def find_chain(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Runs ``model(*args, **kwargs)`` once in evaluation mode, with gradients enabled, so that its
    KN and GKN layers find what precedes them.

    A training forward finds it by itself where nothing is frozen or compiled. Call this before
    training where something is, and before a model with GKN is evaluated that was not trained in
    this process; again after weights with other running statistics were loaded into frozen norms.
    Random state, modes and what is trained are left as they were. Of a model that is sharded over
    processes, all of them call it.

    Args:
        model: all of it, wrapped or compiled or not; layers in a part that is traced alone do not
            know what comes before the part.
        args, kwargs: a batch, as the model takes it in evaluation.
    """
    for layer in layers_of(model):
        layer.look_anew()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    frozen = _norms_that_are_frozen(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        if hasattr(torch.compiler, "set_stance"):  # from torch 2.6 on
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # no cast of a weight is kept, which would be part of a graph of no use
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        for norm in frozen:
            stack.callback(norm.register_forward_hook(_mark_frozen).remove)
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.requires_grad:
                stack.callback(parameter.requires_grad_, False)
                parameter.requires_grad_(True)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        stack.callback(setattr, thread, "tracing", thread.tracing)
        thread.tracing = True
        # past the hooks of the whole, such as Double Forward's; FSDP's are needed
        sharded = any(type(p) is not nn.Parameter for p in model.parameters())
        run = _as_written(model) if sharded else _as_written(model).forward
        # copies: inference tensors take no part in a graph
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        run(*args, **kwargs)


def _mark_frozen(norm: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        mark(output, norm, frozen=True)


# ---- at the first call -----------------------------------------------------------------------


def find_chain_at_call(model: nn.Module) -> None:
    """Calls :func:`find_chain` with the model's own first batch, when it is called with one: before
    the first training forward where parts are frozen or compiled, and before a forward in
    evaluation for whose GKN layers nothing is known. For trainers that call no batch their own."""
    waiting = _before_call in model._forward_pre_hooks.values()
    if not waiting and layers_of(model):
        model.register_forward_pre_hook(_before_call, with_kwargs=True)


def find_no_chain_at_call(model: nn.Module) -> None:
    """Takes back what :func:`find_chain_at_call` did."""
    for key in [k for k, hook in model._forward_pre_hooks.items() if hook is _before_call]:
        del model._forward_pre_hooks[key]  # not by its handle, which copies don't have
        model._forward_pre_hooks_with_kwargs.pop(key, None)


def _before_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_backward():
        return
    if thread.tracing or model.training and not torch.is_grad_enabled():
        return
    layers = layers_of(model)
    lost = any(m.predicts_in_evaluation and not m.training and m.chain is None for m in layers)
    if not model.training:
        if lost:
            find_chain(model, *args, **kwargs)
        return
    find_no_chain_at_call(model)
    unknown = any(m.predicts and not m.chain_is_sure for m in layers)
    if not (lost or unknown and _hides_something(model)):
        return
    try:
        find_chain(model, *args, **kwargs)
    except Exception as error:
        warnings.warn(
            f"no look through frozen parts, or compiled ones, of this {type(model).__name__}: one"
            f" forward in evaluation failed ({error}). KN and GKN layers behind them predict"
            " nothing; cbn_det.norms.find_chain(model, ...) takes inputs of your own.",
            stacklevel=2,
        )


def _hides_something(model: nn.Module) -> bool:
    """Whether parts of a model have no graph of single operations in a training forward."""
    compiled = any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    frozen = any(not p.requires_grad for p in model.parameters())
    return compiled or frozen or bool(_norms_that_are_frozen(model))


def _as_written(model: nn.Module) -> nn.Module:
    """The model in what compiles it or spreads it over devices."""
    spread = nn.DataParallel, nn.parallel.DistributedDataParallel
    while hasattr(model, "_orig_mod") or isinstance(model, spread):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _norms_that_are_frozen(model: nn.Module) -> list[nn.Module]:
    """Those that normalise by running statistics and are not trained."""
    # of a model of which nothing is trained, all BatchNorms would be
    averaged = not any(p.requires_grad for p in model.parameters())
    return [m for m in model.modules() if _is_frozen_norm(m, averaged)]


def _is_frozen_norm(module: nn.Module, averaged: bool) -> bool:
    if isinstance(module, nn.BatchNorm2d):
        trained = averaged or any(p.requires_grad for p in module.parameters())
        own = isinstance(module, Chained)
        return not (own or trained or module.training or module.running_mean is None)
    buffers = (module._buffers.get(n) for n in ("weight", "bias", "running_mean", "running_var"))
    return all(isinstance(buffer, Tensor) and buffer.dim() == 1 for buffer in buffers)
