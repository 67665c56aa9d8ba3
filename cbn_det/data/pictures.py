"""The one maker of pictures: images with boxes, masks and names of classes on them.

Which engine found the objects does not matter: it draws :class:`Mark` objects, or what the two JSON
files of COCO's format hold, annotations and predictions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .coco_api import mask_of, open_coco
from .image_check import BROKEN_IMAGE, read_rgb

logger = logging.getLogger(__name__)

Color = tuple[int, int, int]

#: of the classes, in turn: none is near white, black or grey, and neighbours differ strongly
PALETTE: tuple[Color, ...] = (
    *((230, 25, 75), (0, 130, 200), (60, 180, 75), (245, 130, 48), (145, 30, 180)),
    *((0, 175, 175), (240, 50, 230), (154, 99, 36), (70, 70, 230), (128, 128, 0)),
    *((255, 200, 0), (128, 0, 0), (0, 110, 110), (170, 220, 40), (0, 0, 128)),
    *((255, 110, 130), (110, 60, 20), (120, 200, 255), (180, 100, 255), (30, 100, 30)),
)
GREY: Color = (130, 130, 130)
SCORE = 0.5  # predictions below it are left out
_FEW = 3  # shown where nothing reaches it
_MIN_SIDE = 400  # pixels; smaller images are enlarged so that names can be read
_MASK_ALPHA = 0.4

# of the sheet of the worst images
_IOU = 0.5
_GREEN, _RED, _ORANGE = (40, 180, 60), (230, 40, 40), (255, 150, 0)
_COLUMNS, _PLACE, _CAPTION, _GAP = 2, (640, 320), 20, 8  # pixels; a place holds two pictures
_LEGEND = (
    "left: predictions (green: right, red: false alarm); right: annotations (green: found, orange: "
    "missed, grey: crowd)"
)

# Pillow's own, then those that Pillow finds by their names where they are installed.
_FONTS = (None, "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc")
_NO_CHARACTER = "\U0010ffff"


@dataclass(frozen=True)
class Mark:
    """An object on a picture.

    Attributes:
        box: corners x1, y1, x2, y2 in pixels of the image.
        text: on a field of the colour.
        mask: bool [H, W] of the image's size, or None.
    """

    box: Sequence[float]
    text: str
    color: Color
    mask: np.ndarray | None = None


def color_of(label: int) -> Color:
    """The colour of a class, by its label from 0."""
    return PALETTE[label % len(PALETTE)]


def draw(image: Image.Image, marks: Sequence[Mark], lettering: Lettering) -> Image.Image:
    """
    Args:
        image: RGB; left as it is. A small one is enlarged.
        marks: later ones lie on top.
    """
    scale = max(1.0, _MIN_SIDE / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(size, Image.Resampling.BILINEAR))
    for mark in marks:
        if mark.mask is not None:
            inside = np.asarray(Image.fromarray(mark.mask.astype(bool)).resize(size))
            blended = (1 - _MASK_ALPHA) * pixels[inside] + _MASK_ALPHA * np.array(mark.color)
            pixels[inside] = blended.round()
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    font = lettering.font(max(14, min(size) // 32))
    boxes = [[scale * side for side in mark.box] for mark in marks]
    for (x1, y1, x2, y2), mark in zip(boxes, marks, strict=True):
        width = max(2, min(size) // 250)
        canvas.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=mark.color, width=width)
    for (x, y, _, _), mark in zip(boxes, marks, strict=True):
        width, height = canvas.textlength(mark.text, font) + 4, font.size + 4
        x = max(0.0, min(x, picture.width - width))
        y = y - height if y >= height else max(0.0, min(y, picture.height - height))
        canvas.rectangle((x, y, x + width, y + height), fill=mark.color)
        canvas.text((x + 2, y + 1), mark.text, fill=_readable_on(mark.color), font=font)
    return picture


def _readable_on(color: Color) -> str:
    """White or black, whichever has the larger contrast by WCAG 2."""
    red, green, blue = ((part / 255) ** 2.2 for part in color)
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18 else "black"


class Lettering:
    """A font that has glyphs for class names; where none has, the numbers of the classes.

    Args:
        names: of the classes, in the order of their labels.

    Attributes:
        names: the same, but "class 3" where the font lacks a glyph, which the log tells.
    """

    def __init__(self, names: Sequence[str]) -> None:
        fonts = [path for path in _FONTS if _load(path, 12) is not None]
        self._path = max(fonts, key=lambda path: sum(_draws(path, name) for name in names))
        numbers = {n: f"class {i}" for i, n in enumerate(names) if not _draws(self._path, n)}
        if numbers:
            meant = ", ".join(f"{number} is '{name}'" for name, number in numbers.items())
            logger.info(
                f"class names that no font here has glyphs for are numbers in pictures: {meant}"
            )
        self.names = [numbers.get(name, name) for name in names]

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        return _load(self._path, size)


@cache
def _load(path: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    """None where the font is not installed."""
    if path is None:
        return ImageFont.load_default(size)
    matplotlib = importlib.util.find_spec("matplotlib")  # brings DejaVu along
    folder = Path(matplotlib.origin).parent / "mpl-data/fonts/ttf" if matplotlib else Path()
    for place in (path, str(folder / path)):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(place, size)
    return None


def _draws(path: str | None, text: str) -> bool:
    return all(_glyph(path, c) != _glyph(path, _NO_CHARACTER) for c in text)


@cache
def _glyph(path: str | None, character: str) -> tuple:
    mask = _load(path, 12).getmask(character)
    return mask.size, bytes(mask)


# ---- COCO's files ----------------------------------------------------------------------------


class _Scenes:
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


def write_pictures(
    predictions: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    count: int = 4,
) -> list[Path]:
    """
    Writes some images of a set, evenly spaced over it: predictions on the left (score 0.5 and up,
    else the best three), annotations on the right; masks where the predictions have any.

    Args:
        predictions: JSON file in COCO's result format; one that is missing holds none.
        annotations: JSON file in COCO's instance format.
        images: folder that the ``file_name`` of each image is relative to.
        folder: gets a PNG named after each image file.

    Returns:
        the files.
    """
    scenes = _Scenes(predictions, annotations, images)
    Path(folder).mkdir(parents=True, exist_ok=True)
    ids = sorted(scenes.coco.imgs)
    paths = []
    for image_id in ids[:: max(1, len(ids) // count)][:count]:
        made = scenes.predicted(image_id) or scenes.predicted(image_id, 0.0)[-_FEW:]
        there = scenes.coco.imgToAnns[image_id]
        pair = scenes.pair(image_id, list(map(scenes.mark, made)), list(map(scenes.mark, there)))
        paths.append(Path(folder, f"{Path(scenes.coco.imgs[image_id]['file_name']).stem}.png"))
        pair.save(paths[-1])
    return paths


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


def write_worst_images(
    predictions: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    path: str | os.PathLike[str],
    count: int = 12,
) -> list[ImageScore]:
    """
    Writes one PNG of the images with the lowest scores, predictions beside annotations.

    Args:
        predictions, annotations, images: see :func:`write_pictures`.
        path: of the PNG; its folder is there.
        count: of images on the sheet, less where fewer have an error.

    Returns:
        the scores of the images on the sheet; without any there is no sheet, nor an older one.
    """
    scenes = _Scenes(predictions, annotations, images)
    worst = [s for s in score_images(scenes.coco, scenes.predictions) if s.f1 < 1][:count]
    Path(path).unlink(missing_ok=True)
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


def class_names(annotations: str | os.PathLike[str]) -> list[str]:
    """Of a COCO file, in the order of the category ids."""
    categories = json.loads(Path(annotations).read_text(encoding="utf-8"))["categories"]
    return [one["name"] for one in sorted(categories, key=lambda one: one["id"])]
