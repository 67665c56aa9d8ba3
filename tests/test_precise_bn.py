"""Moments pooled over batches: those of everything seen, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cbn_det.run.precise_bn import recompute_statistics

SHAPES = [(5, 7), (4, 7, 9), (2, 7, 5, 6), (2, 7, 200, 100), (1, 7, 1, 1), (2, 7, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_those_of_all_batches(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(shape) * scale + 5).to(dtype) for scale in (1, 3, 0.1)]
    empty = batches[0][:0]
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    model = layer(7)

    def forward(x: torch.Tensor) -> None:
        for hook in model._forward_pre_hooks.values():
            hook(model, (x,))

    calls = [batches[0], empty, *batches[1:]]
    assert recompute_statistics(model, calls, 4, forward) == 1
    everything = torch.cat(batches).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.running_mean.double(), everything.mean(1), rtol=0, atol=2e-6)
    expected = everything.var(1, correction=0)
    torch.testing.assert_close(model.running_var.double(), expected, rtol=3e-6, atol=1e-6)
