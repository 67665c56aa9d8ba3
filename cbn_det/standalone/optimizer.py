"""The optimizer that a config's SOLVER describes, as detectron2 understands its keys."""

from __future__ import annotations

from bisect import bisect_right

import torch
from fvcore.common.config import CfgNode
from torch import nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    """SGD with ``WEIGHT_DECAY_NORM`` for the parameters of norms, ``WEIGHT_DECAY`` for all
    others."""
    of_norms, others = [], []
    for module in model.modules():
        group = of_norms if isinstance(module, _NORMS) else others
        group += [p for p in module.parameters(recurse=False) if p.requires_grad]
    solver = cfg.SOLVER
    groups = [
        {"params": others, "weight_decay": solver.WEIGHT_DECAY},
        {"params": of_norms, "weight_decay": solver.WEIGHT_DECAY_NORM},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
    )


def learning_rate(cfg: CfgNode, iteration: int) -> float:
    """Of an iteration (from 0): multi-step decay after a linear warm-up, which ends with the run at
    the latest."""
    solver = cfg.SOLVER
    warmup = min(solver.WARMUP_ITERS, solver.MAX_ITER)
    if iteration < warmup:
        decayed = _decay(cfg, warmup)  # what the warm-up ends at
        done = iteration / warmup
        start = solver.WARMUP_FACTOR
        return solver.BASE_LR * (start + (decayed - start) * done)
    return solver.BASE_LR * _decay(cfg, iteration)


def _decay(cfg: CfgNode, iteration: int) -> float:
    return cfg.SOLVER.GAMMA ** bisect_right(sorted(cfg.SOLVER.STEPS), iteration)


def clip_gradients(cfg: CfgNode, model: nn.Module) -> None:
    """``SOLVER.CLIP_GRADIENTS``: by value, or ("norm") by the norm of each parameter's gradient."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return
    if clip.CLIP_TYPE == "value":
        nn.utils.clip_grad_value_(model.parameters(), clip.CLIP_VALUE)
        return
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)
