"""Draws boxes, masks and names of classes on images, whichever engine found the objects."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

Color = tuple[int, int, int]

#: of the classes, in turn: none is near white, black or grey, and neighbours differ strongly
PALETTE: tuple[Color, ...] = (
    *((230, 25, 75), (0, 130, 200), (60, 180, 75), (245, 130, 48), (145, 30, 180)),
    *((0, 175, 175), (240, 50, 230), (154, 99, 36), (70, 70, 230), (128, 128, 0)),
    *((255, 200, 0), (128, 0, 0), (0, 110, 110), (170, 220, 40), (0, 0, 128)),
    *((255, 110, 130), (110, 60, 20), (120, 200, 255), (180, 100, 255), (30, 100, 30)),
)
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
