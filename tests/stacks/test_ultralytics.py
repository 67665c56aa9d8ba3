"""ultralytics' YOLOv8n, built from its own yaml: every norm is followed by SiLU."""

from __future__ import annotations

import os
import tempfile
import warnings

import pytest
import torch
from torch import nn

import cbn_det
from cbn_det.norms import KN2d, kn_chain

# it writes a settings file where it is imported, and looks for newer versions of itself
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
os.environ.setdefault("YOLO_OFFLINE", "True")
tasks = pytest.importorskip("ultralytics.nn.tasks", reason="no training library: ultralytics")


def build() -> nn.Module:
    return tasks.DetectionModel("yolov8n.yaml", ch=3, nc=2, verbose=False)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    outputs = model(torch.randn(2, 3, 64, 64))
    tensors = outputs.values() if isinstance(outputs, dict) else outputs
    loss = sum(value.square().mean() for value in tensors if torch.is_tensor(value))
    loss.backward()
    assert torch.isfinite(loss)
    optimizer.step()


def test_kn_predicts_through_silu_or_says_once_that_it_does_not() -> None:
    model = build()
    before = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    cbn_det.convert_norm(model, "KN")
    layers = [m for m in model.modules() if isinstance(m, KN2d)]
    assert len(layers) == before == 57
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step(model, optimizer)
    predicted = [layer for layer in layers if layer.diagnostics]
    told = [str(w.message) for w in caught if "KN" in str(w.message)]
    if len(predicted) < len(layers) // 2:
        assert len(told) == 1
        assert str(len(layers) - len(predicted)) in told[0]  # how many, and why
        assert "silu" in told[0].lower()
    assert len(kn_chain(model)) == len(layers)


@pytest.mark.parametrize("norm", ["BGN(groups=16)", "BRN", "CBN(burn_in=0)", "MBN(burn_in=0)"])
@pytest.mark.filterwarnings("ignore")
def test_the_others_train_it(norm) -> None:
    model = build()
    assert len(cbn_det.convert_norm(model, norm, max_iter=100).converted) == 57
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        step(model, optimizer)
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 64, 64))[0]).all()
