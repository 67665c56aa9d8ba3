"""timm's model factory, given a norm of ours; and its BatchNorms converted."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

import cbn_det
from cbn_det.deploy import to_batchnorm
from cbn_det.norms import BGN2d, BRN2d, CBN2d, KN2d, MBN2d, SmallBatchNorm2d

timm = pytest.importorskip("timm", reason="no training library: timm")

NORMS = {
    "BGN": functools.partial(BGN2d, groups=4),
    "BRN": BRN2d,
    "CBN": CBN2d,
    "CBN without burn-in": functools.partial(CBN2d, burn_in=0),
    "KN": KN2d,
    "MBN": functools.partial(MBN2d, burn_in=0, double_forward=False),
}


def trained_and_deployed(model: nn.Module) -> None:
    """Three steps; then the norms become BatchNorm without a change in what comes out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(2, 3, 64, 64)).square().mean()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    model.eval()
    plain = copy.deepcopy(model)
    to_batchnorm(plain)
    assert not [m for m in plain.modules() if isinstance(m, SmallBatchNorm2d)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def ours(model: nn.Module) -> list[SmallBatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, SmallBatchNorm2d)]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.filterwarnings("ignore:burn_in")
@pytest.mark.filterwarnings("ignore:ramp")
def test_create_model_takes_our_class_as_its_norm_layer(kind) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", norm_layer=NORMS[kind], num_classes=3)
    plain = timm.create_model("resnet18", norm_layer=nn.BatchNorm2d, num_classes=3)
    assert len(ours(model)) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()
    trained_and_deployed(model)


def test_the_dtype_and_device_that_timm_hands_on_are_used() -> None:
    model = timm.create_model(
        "test_resnet", norm_layer=CBN2d, num_classes=3, device="meta", dtype=torch.float64
    )
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert all(layer.running_mean.dtype == torch.float64 for layer in ours(model))


@pytest.mark.parametrize("norm", ["BGN(groups=4)", "BRN", "CBN(burn_in=0)", "KN", "MBN(burn_in=0)"])
def test_converted_models_train_and_deploy(norm) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    before = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cbn_det.convert_norm(model, norm, max_iter=100)
        assert len(ours(model)) == before > 0
        trained_and_deployed(model)
