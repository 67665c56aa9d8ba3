"""``MODEL.WEIGHTS`` of the standalone engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cbn_det.run.errors import ConfigError
from cbn_det.standalone import read_config
from cbn_det.standalone.model import build_model
from cbn_det.standalone.weights import load_weights
from cbn_det.study.backbone import extract_backbone

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "quickstart"


def model(name: str = "faster_rcnn_R_18_FPN_digits_bn", *opts: str) -> nn.Module:
    return build_model(read_config(CONFIGS / f"{name}.yaml", opts))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, with statistics that are not the initial ones."""
    trained = model()
    for name, buffer in trained.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": trained.state_dict(), "iteration": 3}, path)
    return path


def test_whole_checkpoint(checkpoint: Path) -> None:
    fresh = model()
    summary = load_weights(fresh, checkpoint, complete=True)
    saved = torch.load(checkpoint)["model"]
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, saved[key]), key
    body = sum("tracked" not in key and key.startswith("backbone.body.") for key in saved)
    assert f"{body} tensors of backbone.body, " in summary and "left" not in summary
    assert summary.startswith(f"MODEL.WEIGHTS {checkpoint}: ") and "\n" not in summary


@pytest.mark.parametrize("name", ["finetune_faster_rcnn_R_18_FPN_digits_gn", "faster_cbn"])
def test_backbone_alone_under_interchangeable_norms(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    extract_backbone(checkpoint, tmp_path / "backbone.pth")
    frozen = name.startswith("finetune")
    fresh = model(name if frozen else "faster_rcnn_R_18_FPN_digits_cbn")
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    summary = load_weights(fresh, tmp_path / "backbone.pth")
    assert "100 tensors of backbone.body loaded; left at their initial values: " in summary
    assert " tensors of backbone.fpn, " in summary and "6 tensors of rpn" in summary
    saved = torch.load(checkpoint)["model"]
    for key, value in fresh.state_dict().items():
        expected = saved[key] if key.startswith("backbone.body") else before[key]
        assert torch.equal(value, expected), key
    with pytest.raises(
        ConfigError, match=r"backbone\.fpn.* is not in the file.*look at MODEL\.FPN"
    ):
        load_weights(fresh, tmp_path / "backbone.pth", complete=True)


def test_torchvision_classifier(tmp_path: Path) -> None:
    import torchvision

    classifier = torchvision.models.resnet18()
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    detector = model()
    assert "100 tensors of backbone.body loaded" in load_weights(
        detector, tmp_path / "resnet18.pth"
    )
    for key, value in classifier.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(detector.backbone.body.state_dict()[key], value), key


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {"model": {k: v for k, v in state.items() if k != key}}


BAD = {
    "detectron2": (
        lambda state: {"model": {"backbone.bottom_up.stem.conv1.weight": torch.ones(1)}},
        r"backbone\.bottom_up\.stem\.conv1\.weight .*--engine detectron2",
    ),
    "shape": (
        lambda state: {"model": state | {"rpn.head.cls_logits.bias": torch.zeros(7)}},
        r"rpn\.head\.cls_logits\.bias is of shape \[7\], the model's is \[3\]",
    ),
    "stranger": (
        lambda state: {"model": state | {"teacher.weight": torch.zeros(7)}},
        r"teacher\.weight is not in the model\.",
    ),
    "half a norm": (
        without("backbone.body.bn1.running_mean"),
        r"backbone\.body\.bn1\.running_mean is not in the file.*look at MODEL\.RESNETS\.NORM",
    ),
    "no tensor": (
        lambda state: {"model": state | {"rpn.head.cls_logits.bias": 7}},
        r"rpn\.head\.cls_logits\.bias is a int, not a tensor",
    ),
    "deeper classifier": (
        lambda state: {"layer1.9.conv1.weight": torch.zeros(1)},
        r"layer1\.9\.conv1\.weight is not in the model.*look at MODEL\.RESNETS",
    ),
    "only fc": (lambda state: {"fc.weight": torch.zeros(1)}, "no weights in it"),
    "empty": (lambda state: {"model": {}}, "no weights in it"),
    "a list": (lambda state: [torch.zeros(1)], "no weights in it"),
    "a module": (lambda state: nn.Linear(1, 1), "torch.load cannot read it"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_whole(checkpoint: Path, tmp_path: Path, case: str) -> None:
    change, expected = BAD[case]
    path = tmp_path / "bad.pth"
    torch.save(change(torch.load(checkpoint)["model"]), path)
    fresh = model()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(ConfigError, match=f"MODEL.WEIGHTS {path}.*{expected}"):
        load_weights(fresh, path)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_weights_of_a_batch_norm_are_not_a_group_norms(checkpoint: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"bn1\.running_mean is not in the model.*look at MODEL\.RESNETS\.NORM"
    ):
        load_weights(model("faster_rcnn_R_18_FPN_digits_gn"), checkpoint)


@pytest.mark.parametrize("content", [b"", b"just text\n", bytes(range(256)), b"PK\x03\x04"])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"MODEL.WEIGHTS {path}: torch.load cannot read it"):
        load_weights(model(), path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "no.pth", tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            load_weights(model(), path)
