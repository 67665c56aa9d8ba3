"""Clipping the norm of all gradients together, on the detectron2 engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.detectron2


def solver(**values: Any) -> Any:
    from detectron2.config import get_cfg

    cfg = get_cfg()
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "full_model", 2.0
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 1.0, 0.0
    for key, value in values.items():
        clip[key] = value
    return cfg


def stepped(cfg: Any, scaler: Any = None) -> torch.Tensor:
    """How a step moves five weights in two parameters with gradients 3, 0, 4 and 12, 0."""
    from cbn_det.plugin.trainer import Trainer

    model = nn.ParameterList([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))])
    optimizer = Trainer.build_optimizer(cfg, model)
    loss = 3 * model[0][0] + 4 * model[0][2] + 12 * model[1][0]
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
    return -torch.cat([parameter.detach() for parameter in model])


def test_all_gradients_are_scaled_alike() -> None:
    full = torch.tensor([3.0, 0.0, 4.0, 12.0, 0.0])  # of norm 13
    assert torch.allclose(stepped(solver()), full * 2 / 13)
    assert torch.allclose(stepped(solver(CLIP_VALUE=14.0)), full)
    assert torch.allclose(stepped(solver(NORM_TYPE=math.inf)), full * 2 / 12)
    assert torch.allclose(stepped(solver(ENABLED=False)), full)


def test_detectron2s_norm_clips_each_parameter() -> None:
    each = torch.tensor([3 * 2 / 5, 0.0, 4 * 2 / 5, 2.0, 0.0])
    assert torch.allclose(stepped(solver(CLIP_TYPE="norm")), each)


def test_a_gradient_scaler_does_not_count() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert torch.allclose(stepped(solver(), scaler), stepped(solver()))


def test_the_trainer_builds_it() -> None:
    from cbn_det.plugin.trainer import Trainer

    layer = nn.Linear(2, 1, bias=False)
    optimizer = Trainer.build_optimizer(solver(), layer)
    layer.weight.grad = torch.tensor([[30.0, 40.0]])
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.allclose(before - layer.weight.detach(), torch.tensor([[1.2, 1.6]]))
