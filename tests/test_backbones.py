"""A small ResNet with FPN of detectron2 under every norm: memory format, activation checkpointing,
compilation for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.detectron2

KINDS = ["CBN", "KN", "GKN", "MBN", "BGN", "BRN", "GN+WS"]
LEVELS = ["p2", "p3", "p4", "p5", "p6"]


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    import zoo_models

    import cbn_det

    cbn_det.register()
    yield zoo_models
    cbn_det.unregister()


def backbone(zoo: Any, kind: str, depth: int = 4) -> nn.Module:
    """Narrow, with ``depth`` stages of two blocks; in float64, so that what differs by rounding is
    told from what differs."""
    from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
    from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

    torch.manual_seed(0)
    norm, widths = {**zoo.NORMS, "GN+WS": "GN+WS(groups=4)"}[kind], (8, 12, 16, 24, 32)
    stages = [
        ResNet.make_stage(
            BasicBlock,
            2,
            stride_per_block=[2 if stage else 1, 1],
            in_channels=widths[stage],
            out_channels=widths[stage + 1],
            norm=norm,
        )
        for stage in range(depth)
    ]
    levels = ["res2", "res3", "res4", "res5"][:depth]
    net = ResNet(BasicStem(3, widths[0], norm), stages, out_features=levels)
    top = LastLevelMaxPool() if depth == 4 else None
    return FPN(net, levels, 16, norm=norm, top_block=top).double().train()


def images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step of SGD, and the second pass that MBN wants; the feature maps before it."""
    from cbn_det.norms import DoubleForward

    double_forward = DoubleForward(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    out = model(x)
    sum((level - 0.3).square().mean() for level in out.values()).backward()
    optimizer.step()
    double_forward.refresh()
    double_forward.remove()
    return {name: level.detach() for name, level in out.items()}


def same_state(ours: nn.Module, expected: nn.Module, running: bool = True, **tolerance) -> None:
    """Parameters, memory and, with ``running``, running statistics."""
    from cbn_det.norms import memory_state_dict

    theirs = expected.state_dict()
    for key, value in ours.state_dict().items():
        if running or ".running_" not in key:
            torch.testing.assert_close(value, theirs[key], **tolerance, msg=key)
    memory, other = (_tensors(memory_state_dict(model)) for model in (ours, expected))
    assert memory.keys() == other.keys()
    for key, value in memory.items():
        torch.testing.assert_close(value, other[key], **tolerance, msg=key)


def _tensors(value: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else ()
    return {k: v for key, item in items for k, v in _tensors(item, f"{prefix}/{key}").items()}


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last(zoo, kind):
    model = backbone(zoo, kind)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for seed in range(3):
        x = images(seed)
        expected = step(model, x)
        found = step(other, x.to(memory_format=torch.channels_last))
        assert list(found) == LEVELS
        for level in LEVELS:
            torch.testing.assert_close(found[level], expected[level], rtol=1e-4, atol=1e-5)
            assert found[level].is_contiguous(memory_format=torch.channels_last), level
    same_state(other, model, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not re-entrant", "re-entrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(zoo, kind, reentrant):
    """Of every residual block."""
    from detectron2.modeling.backbone.resnet import BasicBlock

    from cbn_det.norms import find_chain

    model = backbone(zoo, kind)
    find_chain(model, images(0))  # a re-entrant checkpoint hides it from KN and GKN
    other = copy.deepcopy(model)
    find_chain(other, images(0))
    # a re-entrant one adds up the gradients of a block before those of the FPN
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if reentrant else {"rtol": 0, "atol": 0}
    forwards = []
    for block in other.modules():
        if isinstance(block, BasicBlock):
            block.register_forward_pre_hook(lambda *_: forwards.append(1))
            block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
            block.conv1.register_forward_pre_hook(lambda *_: forwards.append(1))
    for seed in range(3):
        expected = step(model, images(seed))
        found = step(other, images(seed))
        for level in LEVELS:
            torch.testing.assert_close(found[level], expected[level], **tolerance)
    assert len(forwards) >= 3 * 8 * 3  # each block was called, and its first convolution twice
    # the first pass of a re-entrant one has no graph: its running statistics are the mini-batch's,
    # as PreciseBN wants them, and not those of the window or the prediction
    same_state(other, model, running=not (reentrant and kind in ("CBN", "KN")), **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_evaluation(zoo, kind):
    model = backbone(zoo, kind, depth=1)
    for seed in range(2):
        step(model, images(seed))
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = model(images(9))
        found = compiled(images(9))
        assert list(found) == list(expected) == ["p2"]
        for level, value in expected.items():
            torch.testing.assert_close(found[level], value, rtol=1e-9, atol=1e-9)
        found = compiled(images(8))  # the same graph again
        torch.testing.assert_close(found["p2"], model(images(8))["p2"], rtol=1e-9, atol=1e-9)
