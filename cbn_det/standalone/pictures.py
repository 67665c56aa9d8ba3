"""Test images with what the model predicts beside what is annotated: a few, and the worst."""

from __future__ import annotations

import colorsys
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from cbn_det.data.lettering import Lettering
from cbn_det.data.worst_images import write_worst_images

from ..run.folder import PREDICTIONS
from .datasets import CocoFiles, DetectionDataset

logger = logging.getLogger(__name__)

_SCORE = 0.5
_FEW = 3  # shown where nothing reaches _SCORE
_MIN_SIDE = 400  # pixels; smaller images are enlarged so that labels can be read
_MASK_ALPHA = 0.45

Color = tuple[int, int, int]


@torch.no_grad()
def draw_predictions(
    model: nn.Module, dataset: DetectionDataset, cfg: CfgNode, folder: Path, count: int = 4
) -> None:
    """
    Writes ``count`` images of a test set, evenly spaced over it: predictions on the left (score 0.5
    and up, else the best three), annotations on the right.

    Args:
        model: on ``MODEL.DEVICE``; its mode is put back afterwards.
        dataset: not for training.
        folder: gets a PNG named after each image file.

    Raises:
        DataError: an image cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lettering = Lettering(dataset.class_names)
    training = model.training
    model.eval()
    try:
        for index in range(0, len(dataset), max(1, len(dataset) // count))[:count]:
            image, target = dataset[index]
            (output,) = model([image.to(cfg.MODEL.DEVICE)])
            if cfg.INPUT.FORMAT == "BGR":
                image = image.flip(0)
            image = image.to(torch.uint8)
            names = lettering.names
            right = _annotated(target["image_id"], dataset, names, cfg.MODEL.MASK_ON)
            left = _draw(image, *_predicted(output, names), lettering)
            right = _draw(image, *right, lettering)
            file_name = dataset.coco.imgs[target["image_id"]]["file_name"]
            pair = Image.fromarray(np.concatenate([left, right], axis=1))
            pair.save(folder / f"{Path(file_name).stem}.png")
    finally:
        model.train(training)


def draw_worst(files: CocoFiles, folder: Path, path: Path) -> None:
    """Writes the images of a test set that the last evaluation did worst on as one sheet; see
    :mod:`cbn_det.data.worst_images`.

    Args:
        files: of the set.
        folder: holds the predictions.
    """
    worst = write_worst_images(folder / PREDICTIONS, files.annotations, files.images, path)
    if worst:
        logger.info(f"the {len(worst)} images with the lowest F1: {path}")


Drawn = tuple[Tensor, list[str], list[Color], Tensor | None]  # boxes, texts, colours, masks


def _predicted(output: dict[str, Tensor], names: list[str]) -> Drawn:
    order = output["scores"].argsort(descending=True)
    order = order[: int((output["scores"] >= _SCORE).sum()) or _FEW]
    found = {key: value[order].cpu() for key, value in output.items()}
    labels = found["labels"].tolist()
    texts = [
        f"{names[label - 1]} {score:.0%}"
        for label, score in zip(labels, found["scores"].tolist(), strict=True)
    ]
    masks = found["masks"][:, 0] >= 0.5 if "masks" in found else None
    return found["boxes"], texts, [_color(label) for label in labels], masks


def _annotated(
    image_id: Any, dataset: DetectionDataset, names: list[str], with_masks: bool
) -> Drawn:
    annotations = dataset.coco.imgToAnns[image_id]
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    labels = [dataset.category_ids.index(a["category_id"]) + 1 for a in annotations]
    texts = [
        names[label - 1] + (" (crowd)" if a.get("iscrowd") else "")
        for label, a in zip(labels, annotations, strict=True)
    ]
    masks = None
    if with_masks and annotations:
        masks = torch.from_numpy(np.stack([dataset.mask(a) for a in annotations])).bool()
    return box_convert(boxes, "xywh", "xyxy"), texts, [_color(label) for label in labels], masks


def _color(label: int) -> Color:
    """A bright colour; those of neighbouring labels differ strongly."""
    hue = label * 0.618 % 1  # the golden ratio spreads any number of them around the circle
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 1.0))
    return red, green, blue


def _draw(
    image: Tensor,
    boxes: Tensor,
    texts: list[str],
    colors: list[Color],
    masks: Tensor | None,
    lettering: Lettering,
) -> np.ndarray:
    """Returns the picture as uint8 ``[H, W, 3]``."""
    scale = max(1.0, _MIN_SIDE / min(image.shape[1:]))
    size = [round(side * scale) for side in image.shape[1:]]
    image = F.resize(image, size)
    side = min(size)
    if texts:
        if masks is not None:
            masks = F.resize(masks, size, F.InterpolationMode.NEAREST)
            image = draw_segmentation_masks(image, masks, alpha=_MASK_ALPHA, colors=colors)
        image = draw_bounding_boxes(image, boxes * scale, colors=colors, width=max(2, side // 250))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    font = lettering.font(max(14, side // 35))
    _write_texts(picture, (boxes * scale).tolist(), texts, colors, font)
    return np.asarray(picture)


def _write_texts(
    picture: Image.Image,
    boxes: list[list[float]],
    texts: list[str],
    colors: list[Color],
    font: ImageFont.FreeTypeFont,
) -> None:
    """On a field of the box's colour, above the box where the image has room."""
    canvas = ImageDraw.Draw(picture)
    for (x, y, _, _), text, color in zip(boxes, texts, colors, strict=True):
        width, height = canvas.textlength(text, font) + 4, font.size + 4
        x = max(0.0, min(x, picture.width - width))
        y = y - height if y >= height else min(y, picture.height - height)
        canvas.rectangle((x, y, x + width, y + height), fill=color)
        red, green, blue = color
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 110
        canvas.text((x + 2, y + 1), text, fill="white" if dark else "black", font=font)
