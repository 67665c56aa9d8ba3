"""detectron2's optimizer, and a kind of gradient clipping that it has in its projects only."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2s
from torch import nn

FULL_MODEL = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """detectron2's ``build_optimizer``, which also takes ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE``
    ``full_model``: the norm of all gradients together is clipped, as mmdetection and DETR do it,
    where ``norm`` clips each parameter's."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL):
        return build_detectron2s(cfg, model)
    unclipped = cfg.clone()
    unclipped.defrost()
    unclipped.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = build_detectron2s(unclipped, model)

    def clip_all(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    # a GradScaler, too, has unscaled the gradients by then
    optimizer.register_step_pre_hook(clip_all)
    return optimizer
