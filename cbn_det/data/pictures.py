"""The one maker of pictures: an image with boxes, masks and names of classes on it.

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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO

from cbn_det.data.image_check import BROKEN_IMAGE

__all__ = ["Lettering", "Mark", "class_names", "color_of", "draw", "write_pictures"]

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


def draw(
    image: Image.Image,
    marks: Sequence[Mark],
    lettering: Lettering,
    min_side: int = _MIN_SIDE,
    text_size: int | None = None,
) -> Image.Image:
    """
    Args:
        image: RGB; left as it is.
        marks: later ones lie on top.
        min_side: in pixels; a smaller image is enlarged.
        text_size: in pixels; None: follows the size of the picture.
    """
    scale = max(1.0, min_side / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(size, Image.Resampling.BILINEAR))
    for mark in marks:
        if mark.mask is not None:
            inside = np.asarray(Image.fromarray(mark.mask.astype(bool)).resize(size))
            blended = (1 - _MASK_ALPHA) * pixels[inside] + _MASK_ALPHA * np.array(mark.color)
            pixels[inside] = blended.round()
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    font = lettering.font(text_size or max(14, min(size) // 32))
    boxes = [[scale * side for side in mark.box] for mark in marks]
    for (x1, y1, x2, y2), mark in zip(boxes, marks, strict=True):
        width = max(2, min(size) // 250)
        canvas.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=mark.color, width=width)
    for (x, y, _, _), mark in zip(boxes, marks, strict=True):
        text = lettering.drawable(mark.text)
        width, height = canvas.textlength(text, font) + 4, font.size + 4
        x = max(0.0, min(x, picture.width - width))
        y = y - height if y >= height else max(0.0, min(y, picture.height - height))
        canvas.rectangle((x, y, x + width, y + height), fill=mark.color)
        canvas.text((x + 2, y + 1), text, fill=_readable_on(mark.color), font=font)
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

    def drawable(self, text: str) -> str:
        """``text`` with question marks for what the font has no glyph for."""
        return "".join(c if _draws(self._path, c) else "?" for c in text)


@lru_cache(maxsize=32)
def _load(path: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    """None where the font is not installed."""
    if path is None:
        return ImageFont.load_default(size)
    places = [path]
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None:  # brings DejaVu along
        folder = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf"
        places.append(str(folder / path))
    for place in places:
        try:
            return ImageFont.truetype(place, size)
        except OSError:
            continue
    return None


def _draws(path: str | None, text: str) -> bool:
    return all(_has_glyph(path, character) for character in text)


@cache
def _has_glyph(path: str | None, character: str) -> bool:
    font = _load(path, 12)
    found, none = (font.getmask(c) for c in (character, _NO_CHARACTER))
    return (found.size, bytes(found)) != (none.size, bytes(none))


# ---- COCO's files ----------------------------------------------------------------------------


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
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(annotations))
        self.lettering = Lettering([self.coco.cats[i]["name"] for i in sorted(self.coco.cats)])
        self._label = {category: i for i, category in enumerate(sorted(self.coco.cats))}
        self._with_masks = any("segmentation" in one for one in self.predictions)
        self._of_image: dict[Any, list[dict]] = {}
        for index, one in enumerate(self.predictions):
            self._of_image.setdefault(one["image_id"], []).append(one | {"index": index})

    def image(self, image_id: Any) -> Image.Image:
        """As it is shown, a grey one where it cannot be read."""
        record = self.coco.imgs[image_id]
        try:
            with Image.open(self.folder / record["file_name"]) as file:
                return ImageOps.exif_transpose(file).convert("RGB")  # boxes lie on it as shown
        except BROKEN_IMAGE:
            return Image.new("RGB", (record["width"], record["height"]), GREY)

    def predicted(self, image_id: Any, score: float = SCORE) -> list[dict]:
        """Those with at least this score, best last; each with its ``index`` in the file."""
        made = sorted(self._of_image.get(image_id, []), key=lambda one: one["score"])
        return [one for one in made if one["score"] >= score]

    def annotated(self, image_id: Any) -> list[dict]:
        return self.coco.imgToAnns[image_id]

    def mark(self, one: dict, color: Color | None = None, masks: bool = True) -> Mark:
        """Of a prediction or an annotation; None: its class's colour."""
        x, y, width, height = one["bbox"]
        label = self._label[one["category_id"]]
        text = self.lettering.names[label]
        text += f" {one['score']:.0%}" if "score" in one else ""
        text += " (crowd)" if one.get("iscrowd") else ""
        mask = self._mask(one) if masks and self._with_masks else None
        return Mark((x, y, x + width, y + height), text, color or color_of(label), mask)

    def _mask(self, one: dict) -> np.ndarray | None:
        shape = one.get("segmentation")
        if isinstance(shape, list):  # pycocotools would take a polygon of four numbers for a box
            shape = [polygon for polygon in shape if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if not shape:
            return None
        if "score" in one:
            return mask_util.decode(shape).astype(bool)
        return self.coco.annToMask(one | {"segmentation": shape}).astype(bool)


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
        predictions, annotations, images: see :class:`Scenes`.
        folder: gets a PNG named after each image file.

    Returns:
        the files.
    """
    scenes = Scenes(predictions, annotations, images)
    Path(folder).mkdir(parents=True, exist_ok=True)
    ids = sorted(scenes.coco.imgs)
    paths = []
    for image_id in ids[:: max(1, len(ids) // count)][:count]:
        image = scenes.image(image_id)
        made = scenes.predicted(image_id) or scenes.predicted(image_id, 0.0)[-_FEW:]
        sides = [
            draw(image, list(map(scenes.mark, objects)), scenes.lettering)
            for objects in (made, scenes.annotated(image_id))
        ]
        pair = Image.fromarray(np.concatenate([np.asarray(side) for side in sides], axis=1))
        paths.append(Path(folder, f"{Path(scenes.coco.imgs[image_id]['file_name']).stem}.png"))
        pair.save(paths[-1])
    return paths


def class_names(annotations: str | os.PathLike[str]) -> list[str]:
    """Of a COCO file, in the order of the category ids."""
    categories = json.loads(Path(annotations).read_text(encoding="utf-8"))["categories"]
    return [one["name"] for one in sorted(categories, key=lambda one: one["id"])]
