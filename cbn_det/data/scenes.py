"""Images of a set in COCO's format, predictions beside annotations."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from .coco_api import mask_of, open_coco
from .image_check import BROKEN_IMAGE, read_rgb
from .pictures import Color, Lettering, Mark, color_of, draw

GREY: Color = (130, 130, 130)
SCORE = 0.5  # predictions below it are left out
_FEW = 3  # shown where nothing reaches it


class Scenes:
    """Images with their annotations and predictions.

    Args:
        predictions: JSON file in COCO's result format; one that is missing holds none.
        annotations: JSON file in COCO's instance format.
        images: folder that the ``file_name`` of each image is relative to.
    """

    def __init__(
        self,
        predictions: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str],
    ) -> None:
        made = Path(predictions)
        self.predictions = json.loads(made.read_text(encoding="utf-8")) if made.exists() else []
        self.folder = Path(images)
        self.coco = open_coco(annotations)
        categories = sorted(self.coco.cats)
        self._label = {category: label for label, category in enumerate(categories)}
        self.lettering = Lettering([self.coco.cats[i]["name"] for i in categories])
        self._with_masks = any("segmentation" in one for one in self.predictions)
        self._of_image: dict[Any, list[dict]] = defaultdict(list)
        for index, one in enumerate(self.predictions):
            self._of_image[one["image_id"]].append(one | {"index": index})

    def predicted(self, image_id: Any, score: float = SCORE) -> list[dict]:
        """Those with at least this score, best last; each with its ``index`` in the file."""
        made = sorted(self._of_image.get(image_id, []), key=lambda one: one["score"])
        return [one for one in made if one["score"] >= score]

    def mark(self, one: dict, color: Color | None = None) -> Mark:
        """Of a prediction or an annotation, with its mask; with a colour other than its class's,
        without."""
        x, y, width, height = one["bbox"]
        label = self._label[one["category_id"]]
        text = self.lettering.names[label]
        text += f" {one['score']:.0%}" if "score" in one else ""
        text += " (crowd)" if one.get("iscrowd") else ""
        mask = None
        if self._with_masks and one.get("segmentation") and color is None:
            predicted = "score" in one
            mask = mask_util.decode(one["segmentation"]) if predicted else mask_of(self.coco, one)
            mask = mask.astype(bool)
        return Mark((x, y, x + width, y + height), text, color or color_of(label), mask)

    def pair(self, image_id: Any, predicted: list[Mark], annotated: list[Mark]) -> Image.Image:
        """The image twice, side by side, a grey one where it cannot be read."""
        record = self.coco.imgs[image_id]
        try:
            image = Image.fromarray(read_rgb(self.folder / record["file_name"]))
        except BROKEN_IMAGE:
            image = Image.new("RGB", (record["width"], record["height"]), GREY)
        sides = [np.asarray(draw(image, marks, self.lettering)) for marks in (predicted, annotated)]
        return Image.fromarray(np.concatenate(sides, axis=1))


def write_pictures(scenes: Scenes, folder: Path, count: int = 4) -> list[Path]:
    """
    Writes some images of a set, evenly spaced over it, as PNGs named after the image files:
    predictions on the left (score 0.5 and up, else the best three), annotations on the right; masks
    where the predictions have any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = sorted(scenes.coco.imgs)
    paths = []
    for image_id in ids[:: max(1, len(ids) // count)][:count]:
        made = scenes.predicted(image_id) or scenes.predicted(image_id, 0.0)[-_FEW:]
        there = scenes.coco.imgToAnns[image_id]
        pair = scenes.pair(image_id, list(map(scenes.mark, made)), list(map(scenes.mark, there)))
        paths.append(folder / f"{Path(scenes.coco.imgs[image_id]['file_name']).stem}.png")
        pair.save(paths[-1])
    return paths
