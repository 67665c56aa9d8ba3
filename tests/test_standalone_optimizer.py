"""The standalone engine reads SOLVER as detectron2 does: learning rate, weight decay, clipping."""

from __future__ import annotations

import copy

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from cbn_det.norms import build_norm
from cbn_det.standalone.config import get_cfg
from cbn_det.standalone.optimizer import build_optimizer, clip_gradients, learning_rate


def solver(**values) -> CfgNode:
    cfg = get_cfg()
    for key, value in values.items():
        node, _, name = f"SOLVER.{key}".rpartition(".")
        parent = cfg
        for part in node.split("."):
            parent = parent[part]
        parent[name] = value
    return cfg


SCHEDULES = [
    {"MAX_ITER": 60, "STEPS": (30, 45), "WARMUP_ITERS": 10},
    {"MAX_ITER": 60, "STEPS": (4, 9, 40), "WARMUP_ITERS": 20, "WARMUP_FACTOR": 0.1},
    {"MAX_ITER": 60, "STEPS": (20,), "WARMUP_ITERS": 20},
    {"MAX_ITER": 60, "STEPS": (30,), "WARMUP_ITERS": 0, "GAMMA": 0.5},
    {"MAX_ITER": 60, "STEPS": (), "WARMUP_ITERS": 1},
    {"MAX_ITER": 30, "STEPS": (20,), "WARMUP_ITERS": 1000},  # the default warm-up, a short run
    {"MAX_ITER": 30, "STEPS": (20, 40), "WARMUP_ITERS": 7},  # a step after the end
    {"MAX_ITER": 601, "STEPS": (333, 467), "WARMUP_ITERS": 100},  # no round fractions
]


@pytest.mark.detectron2
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_is_detectron2s_at_every_iteration(schedule: dict) -> None:
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.solver import build_lr_scheduler

    theirs = detectron2_cfg()
    for key, value in schedule.items():
        theirs.SOLVER[key] = value
    theirs.SOLVER.BASE_LR = 0.02
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=theirs.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(theirs, optimizer)
    ours = solver(**schedule, BASE_LR=0.02)
    for iteration in range(ours.SOLVER.MAX_ITER):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(ours, iteration) == pytest.approx(expected, rel=1e-12), iteration
        optimizer.step()
        scheduler.step()


def test_learning_rate_of_a_schedule_worked_out_by_hand() -> None:
    cfg = solver(MAX_ITER=100, STEPS=(50, 80), WARMUP_ITERS=4, WARMUP_FACTOR=0.2, BASE_LR=1.0)
    rates = [learning_rate(cfg, iteration) for iteration in (0, 1, 2, 3, 4, 49, 50, 79, 80, 99)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


class EveryKind(nn.Module):
    """Norms and layers, with and without biases, frozen ones, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.cbn = build_norm("CBN(compensation='none')", 8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.group = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(8)
        self.sync = nn.SyncBatchNorm(8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.frozen_norm = FrozenBatchNorm2d(8)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.fc = nn.Linear(8, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.again = self.group


def decay_of_each(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = [(names[p], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(decays) == len(dict(decays))  # no parameter twice
    return dict(decays)


def test_weight_decay_of_norms_is_their_own() -> None:
    cfg = solver(WEIGHT_DECAY=1e-3, WEIGHT_DECAY_NORM=2e-3, MOMENTUM=0.5, NESTEROV=True)
    model = EveryKind()
    optimizer = build_optimizer(cfg, model)
    decays = decay_of_each(optimizer, model)
    others = {"conv.weight", "block.0.weight", "block.0.bias", "fc.weight", "fc.bias"}
    assert {name for name, decay in decays.items() if decay == 1e-3} == others
    assert {name for name, decay in decays.items() if decay == 2e-3} == {
        f"{norm}.{kind}"
        for norm in ("cbn", "block.1", "group", "layer", "sync", "instance")
        for kind in ("weight", "bias")
    }
    assert all(g["momentum"] == 0.5 and g["nesterov"] for g in optimizer.param_groups)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm2d(2)])
def test_a_model_of_one_kind_of_layer_has_one_group(model: nn.Module) -> None:
    assert len(build_optimizer(get_cfg(), model).param_groups) == 1


@pytest.mark.detectron2
def test_weight_decay_is_detectron2s() -> None:
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.solver import build_optimizer as detectron2_optimizer

    theirs = detectron2_cfg()
    theirs.SOLVER.WEIGHT_DECAY, theirs.SOLVER.WEIGHT_DECAY_NORM = 1e-3, 2e-3
    model = EveryKind()
    expected = decay_of_each(detectron2_optimizer(theirs, model), model)
    ours = build_optimizer(solver(WEIGHT_DECAY=1e-3, WEIGHT_DECAY_NORM=2e-3), model)
    assert decay_of_each(ours, model) == expected


@pytest.mark.detectron2
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("kind", "norm_type"), [("value", 2.0), ("norm", 2.0), ("norm", 1.0), ("norm", float("inf"))]
)
def test_a_clipped_step_is_detectron2s(kind: str, norm_type: float, enabled: bool) -> None:
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.solver import build_optimizer as detectron2_optimizer

    ours, theirs = get_cfg(), detectron2_cfg()
    for cfg in (ours, theirs):
        clip = cfg.SOLVER.CLIP_GRADIENTS
        clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE = (
            enabled,
            kind,
            0.7,
            norm_type,
        )
        cfg.SOLVER.BASE_LR = 0.1
    one = EveryKind()
    other = copy.deepcopy(one)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
    optimizer = build_optimizer(ours, one)
    clip_gradients(ours, one)
    optimizer.step()
    detectron2_optimizer(theirs, other).step()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)


def test_clipping_by_value_and_by_norm() -> None:
    layer = nn.Linear(2, 1)
    for kind, expected in (("value", [1.0, -1.0]), ("norm", [0.6, -0.8])):
        layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, -4.0]]), torch.tensor([0.5])
        cfg = solver(**{"CLIP_GRADIENTS.ENABLED": True, "CLIP_GRADIENTS.CLIP_TYPE": kind})
        clip_gradients(cfg, layer)
        assert layer.weight.grad[0].tolist() == pytest.approx(expected, abs=1e-5)
        assert layer.bias.grad.item() == 0.5  # each parameter for itself
        layer.bias.grad = None  # of a layer that took no part in this step
        clip_gradients(cfg, layer)
