"""Texts on pictures: a font that has glyphs for class names, or the numbers of the classes."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

__all__ = ["Lettering", "drawable_names"]

logger = logging.getLogger(__name__)

# Pillow's own, then those that Pillow finds by their names where they are installed.
_FONTS = (None, "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc")
_NO_CHARACTER = "\U0010ffff"


class Lettering:
    """
    Args:
        names: of the classes, in the order of their indices.

    Attributes:
        names: the same, but "class 3" where the font lacks a glyph.
    """

    def __init__(self, names: Sequence[str]) -> None:
        fonts = [path for path in _FONTS if _load(path, 12) is not None]
        self._path = max(fonts, key=lambda path: sum(_draws(path, name) for name in names))
        self.names = drawable_names(names, lambda name: _draws(self._path, name))

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        return _load(self._path, size)

    def drawable(self, text: str) -> str:
        """``text`` with question marks for what the font has no glyph for."""
        return "".join(c if _draws(self._path, c) else "?" for c in text)


def drawable_names(names: Sequence[str], draws: Callable[[str], bool]) -> list[str]:
    """``names`` with the number of the class, from 0, where ``draws`` says no; told in the log."""
    numbers = {name: f"class {i}" for i, name in enumerate(names) if not draws(name)}
    if numbers:
        meant = ", ".join(f"{number} is '{name}'" for name, number in numbers.items())
        logger.info(
            f"class names that no font here has glyphs for are numbers in pictures: {meant}"
        )
    return [numbers.get(name, name) for name in names]


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
