"""The images that a detector did worst on, from its predictions and the annotations.

An image's score is F1: twice the objects found, divided by the objects there are and the
predictions made. Predictions count from a confidence of 0.5, an object is found by a prediction of
its class with an IoU of 0.5; which is matched with which, and that predictions on crowd regions do
not count, is decided by pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cbn_det.data.pictures import GREY, Lettering, Mark, Scenes, draw

__all__ = ["ImageScore", "score_images", "write_worst_images"]

CONFIDENCE = 0.5
IOU = 0.5

_COLUMNS = 3
_PICTURE = (300, 220)  # pixels of an image on the sheet; a place holds two of them and a caption
_CAPTION = 18
_GAP = 6
_GREEN, _RED, _ORANGE = (40, 180, 60), (230, 40, 40), (255, 150, 0)
_LEGEND = (
    "left: predictions (green: right, red: false alarm); right: annotations (green: found, orange: "
    "missed, grey: crowd)"
)


@dataclass(frozen=True)
class ImageScore:
    """What was found in an image.

    Attributes:
        found, missed, false: numbers of objects found and missed, and of false alarms.
        right_predictions: indices of the predictions that found an object.
        found_annotations: ids of the objects found.
    """

    image_id: Any
    found: int
    missed: int
    false: int
    right_predictions: frozenset[int] = frozenset()
    found_annotations: frozenset[int] = frozenset()

    @property
    def f1(self) -> float:
        return 2 * self.found / (2 * self.found + self.missed + self.false)


def score_images(
    coco: COCO, predictions: Sequence[dict[str, Any]], confidence: float = CONFIDENCE
) -> list[ImageScore]:
    """
    Scores every image in which there was anything to find or anything was predicted.

    Args:
        coco: the annotations.
        predictions: in COCO's result format, with boxes.
        confidence: predictions below it do not count.

    Returns:
        worst first: by F1, then by the number of errors, then by image id.
    """
    chosen = [dict(p, index=i) for i, p in enumerate(predictions) if p["score"] >= confidence]
    coco, ids = _numbered(coco)
    with contextlib.redirect_stdout(io.StringIO()):
        if chosen:
            results = coco.loadRes(
                [{k: v for k, v in p.items() if k != "segmentation"} for p in chosen]
            )
        else:  # loadRes refuses an empty list
            results = COCO()
        scores = COCOeval(coco, results, "bbox")
        scores.params.imgIds = sorted(coco.imgs)
        scores.params.iouThrs = np.array([IOU])
        scores.params.areaRng, scores.params.areaRngLbl = [[0, 1e10]], ["all"]
        scores.evaluate()
    by_text = {str(image): image for image in coco.imgs}
    right: dict[Any, set[int]] = {}
    there: dict[Any, set[int]] = {}
    counts: dict[Any, np.ndarray] = {}
    for entry in filter(None, scores.evalImgs):
        image = by_text[str(entry["image_id"])]  # the evaluation makes numpy's numbers of ids
        matches, ignored = entry["dtMatches"][0], entry["dtIgnore"][0]
        hits = [
            i for i, m, skip in zip(entry["dtIds"], matches, ignored, strict=True) if m and not skip
        ]
        false = sum(1 for m, skip in zip(matches, ignored, strict=True) if not m and not skip)
        objects = sum(1 for skip in entry["gtIgnore"] if not skip)
        counted = np.array([len(hits), objects - len(hits), false])
        counts[image] = counts.get(image, 0) + counted
        right.setdefault(image, set()).update(results.anns[i]["index"] for i in hits)
        there.setdefault(image, set()).update(
            ids[int(m)] for m, skip in zip(matches, ignored, strict=True) if m and not skip
        )
    found = [
        ImageScore(image, *map(int, numbers), frozenset(right[image]), frozenset(there[image]))
        for image, numbers in counts.items()
        if numbers.sum()
    ]
    return sorted(found, key=lambda s: (s.f1, -s.missed - s.false, s.image_id))


def _numbered(coco: COCO) -> tuple[COCO, dict[int, int]]:
    """The same with annotations numbered from 1, and the id of each number: pycocotools takes 0 for
    no match, and rounds ids beyond 2^53."""
    annotations = coco.dataset.get("annotations", [])
    numbered = COCO()
    numbered.dataset = {
        **coco.dataset,
        "annotations": [{**a, "id": i} for i, a in enumerate(annotations, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        numbered.createIndex()
    return numbered, {i: a["id"] for i, a in enumerate(annotations, start=1)}


def write_worst_images(
    predictions: str | os.PathLike,
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    path: str | os.PathLike,
    count: int = 12,
) -> list[ImageScore]:
    """
    Writes one PNG of the images with the lowest scores, predictions beside annotations.

    Args:
        predictions, annotations, images: see :class:`~cbn_det.data.pictures.Scenes`.
        path: of the PNG; its folder is there.
        count: of images on the sheet, less where fewer have an error.

    Returns:
        the scores of the images on the sheet; without any there is no sheet, nor an older one.
    """
    scenes = Scenes(predictions, annotations, images)
    worst = [s for s in score_images(scenes.coco, scenes.predictions) if s.f1 < 1][:count]
    if worst:
        _sheet([_place(scenes, score) for score in worst], scenes.lettering).save(path)
    else:
        Path(path).unlink(missing_ok=True)
    return worst


def _sheet(places: list[Image.Image], lettering: Lettering) -> Image.Image:
    width, height = places[0].size
    columns = min(_COLUMNS, len(places))
    lines = -(-len(places) // columns)
    size = (columns * (width + _GAP) + _GAP, lines * (height + _GAP) + _GAP + _CAPTION)
    sheet = Image.new("RGB", size, "white")
    for i, place in enumerate(places):
        at = (i % columns * (width + _GAP) + _GAP, i // columns * (height + _GAP) + _GAP)
        sheet.paste(place, at)
    _write(sheet, (_GAP, sheet.height - _CAPTION), _LEGEND, lettering)
    return sheet


def _place(scenes: Scenes, score: ImageScore) -> Image.Image:
    """The image twice, side by side, under a caption."""
    image = scenes.image(score.image_id)
    scale = min(_PICTURE[0] / image.width, _PICTURE[1] / image.height)
    small = image.resize([max(1, round(side * scale)) for side in image.size])

    def drawn(marks: list[Mark]) -> Image.Image:
        scaled = [replace(mark, box=[scale * side for side in mark.box]) for mark in marks]
        return draw(small, scaled, scenes.lettering, min_side=1, text_size=10)

    left = [
        scenes.mark(one, _GREEN if one["index"] in score.right_predictions else _RED, masks=False)
        for one in scenes.predicted(score.image_id, CONFIDENCE)
    ]
    right = []
    for one in scenes.annotated(score.image_id):
        color = _GREEN if one["id"] in score.found_annotations else _ORANGE
        right.append(scenes.mark(one, GREY if one.get("iscrowd") else color, masks=False))
    place = Image.new("RGB", (2 * _PICTURE[0] + 2, _PICTURE[1] + _CAPTION), (235, 235, 235))
    place.paste(drawn(left), (0, _CAPTION))
    place.paste(drawn(right), (_PICTURE[0] + 2, _CAPTION))
    caption = (
        f"{scenes.coco.imgs[score.image_id]['file_name']}: F1 {score.f1:.2f}, {score.found} found,"
        f" {score.missed} missed, {score.false} false"
    )
    _write(place, (3, 2), caption, scenes.lettering)
    return place


def _write(image: Image.Image, at: tuple[int, int], text: str, lettering: Lettering) -> None:
    text = lettering.drawable(text)
    ImageDraw.Draw(image).text(at, text, fill="black", font=lettering.font(12))
