"""A detector and a COCO-format data set that train for a few iterations inside a test."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]

CONFIG = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    DEPTH: 50
    STEM_OUT_CHANNELS: 8
    RES2_OUT_CHANNELS: 16
    WIDTH_PER_GROUP: 4
    OUT_FEATURES: [res2, res3, res4, res5]
    NORM: BN
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16, NORM: BN}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [96]], ASPECT_RATIOS: [[1.0]]}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    PRE_NMS_TOPK_TRAIN: 64
    PRE_NMS_TOPK_TEST: 64
    POST_NMS_TOPK_TRAIN: 32
    POST_NMS_TOPK_TEST: 16
    BATCH_SIZE_PER_IMAGE: 16
    CONV_DIMS: [16]
  ROI_HEADS:
    NAME: StandardROIHeads
    IN_FEATURES: [p2, p3, p4, p5]
    NUM_CLASSES: 2
    BATCH_SIZE_PER_IMAGE: 16
    SCORE_THRESH_TEST: 0.0
  ROI_BOX_HEAD:
    NAME: FastRCNNConvFCHead
    NUM_CONV: 1
    CONV_DIM: 16
    NUM_FC: 1
    FC_DIM: 16
    POOLER_RESOLUTION: 5
    NORM: BN
INPUT: {MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}
DATASETS: {TRAIN: [tiny_boxes], TEST: [tiny_boxes]}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.01, MAX_ITER: 4, WARMUP_ITERS: 0, STEPS: []}
SEED: 1
VERSION: 2
"""


# stem, stages and RPN head of torchvision have fixed widths, and GN has 32 groups
STANDALONE_CONFIG = (
    CONFIG.replace(
        "    STEM_OUT_CHANNELS: 8\n    RES2_OUT_CHANNELS: 16\n", "    STRIDE_IN_1X1: false\n"
    )
    .replace("    CONV_DIMS: [16]\n", "")
    .replace("OUT_CHANNELS: 16", "OUT_CHANNELS: 32")
    .replace("CONV_DIM: 16", "CONV_DIM: 32")
    .replace("MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96", "MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64")
)


def write_boxes(folder: Path, count: int = 6, size: int = 96) -> None:
    """Writes ``count`` images of two coloured rectangles each, with boxes and masks."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(1, count + 1):
        pixels = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
        name = f"{index}.png"
        images.append({"id": index, "file_name": name, "width": size, "height": size})
        for category in (1, 2):
            w, h = (int(v) for v in rng.integers(20, 40, 2))
            x, y = int(rng.integers(0, size - w)), int(rng.integers(0, size - h))
            pixels[y : y + h, x : x + w] = (200, 80, 40) if category == 1 else (40, 120, 220)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / name)
    categories = [{"id": 1, "name": "orange"}, {"id": 2, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set and a config for each engine. A test module takes it over as ``inputs``."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def write_inputs(folder: Path) -> None:
    """Writes the data set, ``tiny.yaml`` and ``standalone.yaml``."""
    write_boxes(folder)
    for name, text in (("tiny", CONFIG), ("standalone", STANDALONE_CONFIG)):
        text = text.replace("tiny_boxes", dataset_name(folder))
        (folder / f"{name}.yaml").write_text(text)


def write_mixed_inputs(folder: Path) -> None:
    """The same with every other image wider than high, and two sizes of training."""
    write_inputs(folder)
    boxes = json.loads((folder / "boxes.json").read_text())
    for record in boxes["images"][::2]:
        path = folder / "images" / record["file_name"]
        wide = Image.new("RGB", (record["width"] + 24, record["height"]))
        wide.paste(Image.open(path))
        wide.save(path)
        record["width"] += 24
    (folder / "boxes.json").write_text(json.dumps(boxes))
    for config in folder.glob("*.yaml"):
        text = config.read_text()
        for size in (64, 96):
            sizes = f"MIN_SIZE_TRAIN: [{size - 16}, {size}]"
            text = text.replace(f"MIN_SIZE_TRAIN: [{size}]", sizes)
        config.write_text(text)


def dataset_name(inputs: Path) -> str:
    # detectron2's catalogue lives as long as the process, and a name stands for one set of files
    return f"tiny_boxes_{inputs.name}"


def arguments(
    inputs: Path, output: Path | str, *words: str, config: str = "tiny.yaml"
) -> list[str]:
    """The launcher's arguments: options of ``words`` first, then KEY VALUE pairs."""
    split = next((i for i, w in enumerate(words) if w[:1].isupper()), len(words))
    return [
        "--config-file",
        str(inputs / config),
        "--coco-dataset",
        dataset_name(inputs),
        str(inputs / "boxes.json"),
        str(inputs / "images"),
        *words[:split],
        "OUTPUT_DIR",
        str(output),
        *words[split:],
    ]


def parsed(inputs: Path, output: Path | str, *words: str) -> argparse.Namespace:
    from cbn_det.run.arguments import argument_parser

    args = argument_parser().parse_args(arguments(inputs, output, *words))
    args.command = "a test"
    return args


def result_of(output: Path) -> dict:
    return json.loads((output / "result.json").read_text(encoding="utf-8"))


def evaluation_of(output: Path) -> dict:
    """Of an evaluation on its own."""
    return json.loads((output / "evaluation" / "result.json").read_text(encoding="utf-8"))


def contents(output: Path) -> dict[str, bytes]:
    """All that a training left, by path, without the log."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != "log.txt" and "evaluation" not in path.parts
    }


@contextmanager
def run_loggers_removed() -> Iterator[None]:
    """A run logs to the stdout and folder of its time; afterwards both are gone."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "cbn_det")]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
        if "detectron2.utils.logger" in sys.modules:
            sys.modules["detectron2.utils.logger"].setup_logger.cache_clear()
