"""Checks image files: that they are there, can be decoded, and are read as they are meant."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..progress import shown
from .findings import Findings

# What Pillow raises for a file that it cannot read or decode.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

#: who reads the images in training; detectron2 turns a TIFF once more after Pillow has done so
DETECTRON2, PILLOW = "detectron2", "pillow"

# Others are of 16 bits: I;16, I;16B, ... Older versions of Pillow have mode I for these, too.
_MODES = {"F": "32-bit float", "I": "integers of 16 or 32 bits"}

#: images that are read and decoded completely, evenly spaced over the set; that each file exists
#: is checked for all
MOST_DECODED = 5000
_MOST_FOLDERS = 20  # that are looked into for a file which is not where it should be


def refuse_clipped(image: Image.Image) -> None:
    """
    Raises:
        ValueError: reading an opened image as RGB would cut its values off at 255, which makes it
            all white or all black.
    """
    if image.mode[0] in _MODES:
        kind = _MODES.get(image.mode, "16-bit grey")
        cut = "as RGB its values are cut off at 255, convert it to 8 bits"
        raise ValueError(f"{kind}, mode {image.mode}: {cut}")


def read_rgb(path: str | os.PathLike[str]) -> np.ndarray:
    """An image as it is shown (EXIF's orientation applied), RGB, uint8 ``[H, W, 3]``.

    Raises:
        one of :data:`BROKEN_IMAGE`: it cannot be read, or not as it is meant.
    """
    with Image.open(path) as image:
        refuse_clipped(image)
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def check_images(
    folder: Path, images: dict[Any, dict], findings: Findings, reader: str | None = None
) -> int:
    """Returns the number of images that were decoded.

    Args:
        images: entries with ``file_name``, ``width`` and ``height``, by id.
        reader: :data:`DETECTRON2`, :data:`PILLOW`, or None where that is not known.
    """
    if not folder.is_dir():
        findings.refuse(f"image folder '{folder}' does not exist: check the path")
        return 0
    present = _check_names(folder, images, findings)
    if len(present) > MOST_DECODED:
        present = [present[i] for i in np.linspace(0, len(present) - 1, MOST_DECODED).astype(int)]
    broken, turned, wrong_size = [], [], []
    for record in shown(present, f"decoding images of {folder}"):
        label = f"image {record['id']} '{record['file_name']}'"
        try:
            width, height, orientation, turned_by_pillow = _decode(folder / record["file_name"])
        except BROKEN_IMAGE as e:
            broken.append(f"{label}: {e}")
            continue
        if turned_by_pillow:
            turned.append(label)
        if (width, height) != (record["width"], record["height"]):
            listed = f"listed as {record['width']} x {record['height']}"
            how = " as its EXIF orientation turns it" if orientation > 1 else ""
            wrong_size.append(f"{label} is {width} x {height}{how}, {listed}")
    findings.refuse(
        f"image files below '{folder}' that are cut off or cannot be read as RGB of 8 bits: copy "
        "them again, or convert them to 8 bits",
        broken,
    )
    findings.refuse(
        "images of another size than listed: correct 'width' and 'height', and the boxes if the "
        "images were resized or rotated",
        wrong_size,
    )
    if reader != PILLOW:
        (findings.refuse if reader == DETECTRON2 else findings.warn)(
            "TIFF images with an orientation tag, which Pillow applies and detectron2 applies once "
            "more: save them turned and without the tag, or use --engine standalone",
            turned,
        )
    return len(present)


def _decode(path: Path) -> tuple[int, int, int, bool]:
    """Decodes all of a file. Returns its width and height as shown, EXIF's orientation (1 is
    upright), and whether loading, not the reader, applied it."""
    with Image.open(path) as image:
        refuse_clipped(image)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = image.size
        # JPEG: reads the whole stream but computes an eighth of the pixels only.
        image.draft("L", (max(width // 8, 1), max(height // 8, 1)))
        image.load()
        remaining = image.getexif().get(ExifTags.Base.Orientation, 1)
        if remaining != orientation:
            width, height = image.size  # Pillow 10 tells the size as stored until it has loaded it
        if remaining >= 5:
            width, height = height, width
        return width, height, orientation, remaining != orientation


def _check_names(folder: Path, images: dict[Any, dict], findings: Findings) -> list[dict]:
    """Returns the entries whose file is there."""
    ids: dict[str, list] = defaultdict(list)
    for i, record in images.items():
        ids[os.path.normpath(record["file_name"])].append(i)
    findings.warn(
        "image files listed under several ids: predictions of objects that one of them lacks count "
        "as wrong; list each file once",
        (f"'{name}' is ids {', '.join(map(str, i))}" for name, i in ids.items() if len(i) > 1),
    )

    @cache
    def names_in(place: str) -> frozenset[str]:
        """Listed once: a request for each file takes minutes on a network disk."""
        return frozenset(os.listdir(place) if os.path.isdir(place) else ())

    present, absent = [], []
    for record in images.values():
        parent, name = os.path.split(folder / record["file_name"])
        (present if name in names_in(parent) else absent).append(record)
    if absent:
        # of another split, where none is there
        beside = [] if present else _folders_in(folder.parent)
        elsewhere: dict[str, str] = {}
        for place in (folder, *_folders_in(folder), *beside):
            for name in os.listdir(place):
                elsewhere.setdefault(_plain(name), os.path.relpath(place / name, folder))
        findings.refuse(
            f"image files that '{folder}' does not hold as they are listed: write 'file_name' as "
            "the files are called, copy missing ones there, or give the folder it is relative to",
            absent,
            lambda r: f"image {r['id']} '{r['file_name']}'"
            + (f" is '{other}'" if (other := elsewhere.get(_plain(r["file_name"]))) else ""),
        )
    return present


def _folders_in(place: Path) -> list[Path]:
    return sorted(Path(entry) for entry in os.scandir(place) if entry.is_dir())[:_MOST_FOLDERS]


def _plain(name: str) -> str:
    """What is the same in all ways of writing the name of a file, wherever it lies: of a tool on
    another system, a browser or an export with folders of its own."""
    if "://" in name:
        name = urlparse(name).path
    last = unquote(name).replace("\\", "/").rpartition("/")[2]
    return unicodedata.normalize("NFC", last).casefold()
