"""Test images with what the model predicts beside what is annotated: a few, and the worst."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image
from torch import nn

from cbn_det.data.lettering import drawable_names
from cbn_det.data.worst_images import write_worst_images
from cbn_det.run.folder import PREDICTIONS

logger = logging.getLogger(__name__)

_SCORE = 0.5
_FEW = 3  # shown where nothing reaches _SCORE
_MIN_SIDE = 400  # pixels; smaller images are enlarged so that labels can be read


@torch.no_grad()
def draw_predictions(cfg: CfgNode, model: nn.Module, folder: Path, count: int = 4) -> None:
    """Writes ``count`` images of the first test set, evenly spaced over it: predictions on the left
    (score 0.5 and up, else the best three), annotations on the right."""
    name = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(name)
    metadata = _drawable(MetadataCatalog.get(name))
    mapper = DatasetMapper(cfg, is_train=False)
    folder.mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval()
    try:
        for record in records[:: max(1, len(records) // count)][:count]:
            predicted = model([mapper(dict(record))])[0]["instances"].to("cpu")
            image = read_image(record["file_name"], format="RGB")
            scale = max(1.0, _MIN_SIDE / min(image.shape[:2]))
            left = Visualizer(image, metadata, scale).draw_instance_predictions(
                _confident(predicted)
            )
            right = Visualizer(image, metadata, scale).draw_dataset_dict(record)
            pair = np.concatenate([left.get_image(), right.get_image()], axis=1)
            Image.fromarray(pair).save(folder / f"{Path(record['file_name']).stem}.png")
    finally:
        model.train(training)


def draw_worst(cfg: CfgNode, path: Path) -> None:
    """Writes the images of the first test set that the evaluation in the folder of ``path`` did
    worst on as one sheet; see :mod:`cbn_det.data.worst_images`."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    predictions = path.with_name(PREDICTIONS)
    worst = write_worst_images(predictions, metadata.json_file, metadata.image_root, path)
    if worst:
        logger.info(f"the {len(worst)} images with the lowest F1: {path}")


def _drawable(metadata: Metadata) -> Metadata:
    """With class names that the font of detectron2's drawing has glyphs for."""
    names = metadata.get("thing_classes")
    if names is None:
        return metadata
    glyphs = get_font(findfont(FontProperties(family=["sans-serif"]))).get_charmap()
    drawable = drawable_names(names, lambda name: all(ord(c) in glyphs for c in name))
    return Metadata(**metadata.as_dict() | {"thing_classes": drawable})


def _confident(predicted: Any) -> Instances:
    order = predicted.scores.argsort(descending=True)
    confident = int((predicted.scores >= _SCORE).sum())
    return predicted[order[: confident or _FEW]]
