"""Which images a detector does worst on: their F1, and a sheet of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .scenes import GREY, SCORE, Scenes

_IOU = 0.5
_GREEN, _RED, _ORANGE = (40, 180, 60), (230, 40, 40), (255, 150, 0)
_COLUMNS, _PLACE, _CAPTION, _GAP = 2, (640, 320), 20, 8  # pixels; a place holds two pictures
_LEGEND = (
    "left: predictions (green: right, red: false alarm); right: annotations (green: found, orange: "
    "missed, grey: crowd)"
)


@dataclass
class ImageScore:
    """What was found in an image.

    Attributes:
        right: indices of the predictions that found an object.
        found: ids of the objects found.
        missed, false: numbers of objects missed and of false alarms.
    """

    image_id: Any
    right: set[int] = field(default_factory=set)
    found: set[int] = field(default_factory=set)
    missed: int = 0
    false: int = 0

    @property
    def f1(self) -> float:
        """Twice the objects found, divided by the objects there are and the predictions made."""
        return 2 * len(self.found) / (2 * len(self.found) + self.missed + self.false)


def score_images(coco: COCO, predictions: Sequence[dict[str, Any]]) -> list[ImageScore]:
    """
    Scores every image in which there was anything to find or anything was predicted.

    Predictions count from a confidence of 0.5, an object is found by a prediction of its class with
    an IoU of 0.5; which is matched with which, and that predictions on crowd regions do not count,
    is decided by pycocotools.

    Args:
        coco: of :func:`~cbn_det.data.coco_api.open_coco`.
        predictions: in COCO's result format, with boxes.

    Returns:
        worst first: by F1, then by the number of errors, then by image id.
    """
    keys = ("image_id", "category_id", "bbox", "score")
    chosen = [i for i, p in enumerate(predictions) if p["score"] >= SCORE]
    with contextlib.redirect_stdout(io.StringIO()):
        results = COCO()  # loadRes refuses an empty list
        if chosen:
            results = coco.loadRes([{key: predictions[i][key] for key in keys} for i in chosen])
        scores = COCOeval(coco, results, "bbox")
        scores.params.imgIds = sorted(coco.imgs)
        scores.params.iouThrs = np.array([_IOU])
        scores.params.areaRng, scores.params.areaRngLbl = [[0, 1e10]], ["all"]
        scores.evaluate()
    of_image: dict[Any, ImageScore] = {}
    for entry in filter(None, scores.evalImgs):  # of each image and class
        image = np.asarray(entry["image_id"]).item()  # the evaluation makes numpy's numbers of ids
        score = of_image.setdefault(image, ImageScore(image))
        counted = ~entry["dtIgnore"][0].astype(bool)
        matches = entry["dtMatches"][0][counted].astype(int)
        made = np.array(entry["dtIds"], dtype=int)[counted]
        score.right |= {chosen[i - 1] for i in made[matches > 0]}
        score.found |= set(matches[matches > 0].tolist())
        score.false += int((matches == 0).sum())
        score.missed += int((~np.array(entry["gtIgnore"], dtype=bool)).sum() - (matches > 0).sum())
    scored = [s for s in of_image.values() if s.found or s.missed or s.false]
    return sorted(scored, key=lambda s: (s.f1, -s.missed - s.false, s.image_id))


def write_worst_images(scenes: Scenes, path: Path, count: int = 12) -> list[ImageScore]:
    """Writes one PNG of the ``count`` images with the lowest F1, predictions beside annotations.

    Returns:
        the scores of the images on the sheet; where none has an error there is no sheet, nor an
        older one.
    """
    worst = [s for s in score_images(scenes.coco, scenes.predictions) if s.f1 < 1][:count]
    path.unlink(missing_ok=True)
    if not worst:
        return []
    columns = min(_COLUMNS, len(worst))
    width, height = _PLACE[0] + _GAP, _PLACE[1] + _CAPTION + _GAP
    size = (columns * width + _GAP, -(-len(worst) // columns) * height + _GAP + _CAPTION)
    sheet = Image.new("RGB", size, "white")
    canvas, font = ImageDraw.Draw(sheet), scenes.lettering.font(12)
    for i, score in enumerate(worst):
        made = [
            scenes.mark(one, _GREEN if one["index"] in score.right else _RED)
            for one in scenes.predicted(score.image_id)
        ]
        there = []
        for one in scenes.coco.imgToAnns[score.image_id]:
            color = _GREEN if one["id"] in score.found else _ORANGE
            there.append(scenes.mark(one, GREY if one.get("iscrowd") else color))
        x, y = i % columns * width + _GAP, i // columns * height + _GAP
        sheet.paste(
            ImageOps.contain(scenes.pair(score.image_id, made, there), _PLACE), (x, y + _CAPTION)
        )
        name = scenes.coco.imgs[score.image_id]["file_name"]
        caption = (
            f"{name}: F1 {score.f1:.2f}, {len(score.found)} found, {score.missed} missed,"
            f" {score.false} false"
        )
        canvas.text((x, y), caption, fill="black", font=font)
    canvas.text((_GAP, sheet.height - _CAPTION), _LEGEND, fill="black", font=font)
    sheet.save(path)
    return worst
