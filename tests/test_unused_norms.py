"""Norm keys that give the model no layer: code that knows norms by names of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from both_engines import ENGINES, words_for
from tiny_run import parsed, run_loggers_removed, tiny_inputs
from torch import nn

from cbn_det.launch import main

inputs = tiny_inputs

TOLD = "the model has no layer of this norm"


@pytest.fixture
def towers() -> Iterator[None]:
    """Two RPN heads with a norm of the key MODEL.TOWER.NORM: one knows three names, the other asks
    detectron2."""
    from detectron2.config import configurable
    from detectron2.layers import batch_norm
    from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead

    class Tower(StandardRPNHead):
        @configurable
        def __init__(self, *, norm: str, **options: Any) -> None:
            super().__init__(**options)
            channels = options["in_channels"]
            self.conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
            layer = self.norm_layer(norm, channels)
            if layer is not None:
                self.conv.append(layer)
            self.conv.append(nn.ReLU())

        @classmethod
        def from_config(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
            return super().from_config(cfg, input_shape) | {"norm": cfg.MODEL.TOWER.NORM}

    class KnownNames(Tower):
        @staticmethod
        def norm_layer(norm: str, channels: int) -> nn.Module | None:
            if norm == "GN":
                return nn.GroupNorm(4, channels)
            elif norm == "BN":
                return nn.BatchNorm2d(channels)
            elif norm == "SyncBN":
                return nn.SyncBatchNorm(channels)
            return None  # where such code simply ends

    class AsksDetectron2(Tower):
        @staticmethod
        def norm_layer(norm: str, channels: int) -> nn.Module | None:
            return batch_norm.get_norm(norm, channels)

    for head in (KnownNames, AsksDetectron2):
        RPN_HEAD_REGISTRY.register(head)
    yield
    for head in (KnownNames, AsksDetectron2):
        del RPN_HEAD_REGISTRY._obj_map[head.__name__]


def trainer_of(inputs: Path, output: Path, head: str, tower: str, fpn: str) -> Any:
    from detectron2.config import CfgNode

    from cbn_det.plugin.config import build_config
    from cbn_det.plugin.datasets import prepare_datasets
    from cbn_det.plugin.registry import check_config_norms
    from cbn_det.plugin.trainer import Trainer

    args = parsed(inputs, output, "MODEL.FPN.NORM", fpn, "DATASETS.TEST", "()")
    output.mkdir()
    cfg, _ = build_config(args, 1)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TOWER, cfg.MODEL.RPN.HEAD_NAME = CfgNode({"NORM": tower}), head
    cfg.MODEL.RPN.CONV_DIMS = [-1]
    cfg.freeze()
    check_config_norms(cfg)
    prepare_datasets(cfg, args.coco_dataset)
    return Trainer(cfg)


@pytest.mark.detectron2
@pytest.mark.parametrize(
    "head, tower, fpn, unused",
    [
        ("KnownNames", "CBN", "CBN", ["MODEL.TOWER.NORM"]),  # layers of the FPN hide nothing
        ("KnownNames", "CBN(window=3)", "BN", ["MODEL.TOWER.NORM"]),
        ("KnownNames", "BN(freeze=0.8)", "SyncBN(start=0.5)", ["MODEL.TOWER.NORM"]),
        ("KnownNames", "GN", "CBN", []),
        ("AsksDetectron2", "CBN", "CBN", []),
        ("AsksDetectron2", "BGN(groups=2)", "CBN", []),
    ],
)
@pytest.mark.usefixtures("towers")
def test_a_head_that_does_not_know_the_norm(
    inputs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    head: str,
    tower: str,
    fpn: str,
    unused: list[str],
) -> None:
    log = logging.getLogger("cbn_det.plugin.trainer")
    monkeypatch.setattr(log, "handlers", [caplog.handler])  # it may not propagate
    trainer = trainer_of(inputs, tmp_path / "out", head, tower, fpn)
    assert trainer.unused_norms == unused
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert {line.partition(":")[0] for line in warned if TOLD in line} == set(unused)
    # the model is what its head makes of it, and the config as it was
    built = len(list(trainer.bare_model.proposal_generator.rpn_head.conv)) == 3
    assert built == (not unused)
    assert trainer.cfg.MODEL.TOWER.NORM == tower and tower in trainer.cfg.dump()


@pytest.mark.parametrize("engine", ENGINES)
def test_strict_refuses_such_a_key(
    engine: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    empty = ("MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NORM", "CBN")
    with run_loggers_removed():
        assert main(words_for(engine, inputs, tmp_path, "--strict", *empty)) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line[:7] == "error: "]
    assert "MODEL.ROI_BOX_HEAD.NORM" in error
    # a key that the model is not meant to read: it has no masks
    short = ("MODEL.ROI_MASK_HEAD.NORM", "CBN", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    with run_loggers_removed():
        assert main(words_for(engine, inputs, tmp_path, "--strict", *short)) == 0
