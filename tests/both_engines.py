"""The trainer of either engine, as the launcher makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import arguments

from cbn_det.run.arguments import argument_parser

ENGINES = ["standalone", pytest.param("detectron2", marks=pytest.mark.detectron2)]
CONFIGS = {"standalone": "standalone.yaml", "detectron2": "tiny.yaml"}


def words_for(engine: str, inputs: Path, output: Path, *words: str) -> list[str]:
    return ["--engine", engine, *arguments(inputs, output, *words, config=CONFIGS[engine])]


def make_trainer(engine: str, inputs: Path, output: Path, *words: str) -> Any:
    args = argument_parser().parse_args(words_for(engine, inputs, output, *words))
    args.command = "a test"
    output.mkdir(parents=True, exist_ok=True)
    if engine == "detectron2":
        from detectron2.utils import comm

        from cbn_det.plugin.config import build_config
        from cbn_det.plugin.datasets import prepare_datasets
        from cbn_det.plugin.trainer import Trainer

        cfg, _ = build_config(args, comm.get_world_size())
        prepare_datasets(cfg, args.coco_dataset)
        torch.manual_seed(cfg.SEED)
        return Trainer(cfg, args.accumulate)
    from cbn_det.standalone.datasets import DetectionDataset, prepare_datasets
    from cbn_det.standalone.launch import build_config
    from cbn_det.standalone.model import build_model
    from cbn_det.standalone.trainer import Trainer

    cfg, _ = build_config(args)
    reports = prepare_datasets(cfg, args.coco_dataset)
    torch.manual_seed(cfg.SEED)
    report = reports[cfg.DATASETS.TRAIN[0]]
    dataset = DetectionDataset(report.annotations, report.images, cfg, training=True)
    return Trainer(cfg, build_model(cfg), dataset, dict, args.accumulate)
