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

from .findings import Findings
from .progress import shown

# What Pillow raises for a file that it cannot read or decode.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

#: who reads the images in training; detectron2 turns a TIFF once more after Pillow has done so
DETECTRON2, PILLOW = "detectron2", "pillow"

# Others are of 16 bits: I;16, I;16B, ... Older versions of Pillow have mode I for these, too.
_MODES = {"F": "32-bit float", "I": "integers of 16 or 32 bits"}

_MOST_FOLDERS = 20  # that are looked into for a file which is not where it should be


def clipped_mode(image: Image.Image) -> str | None:
    """What an opened image holds if reading it as RGB would cut its values off at 255, which makes
    it all white or all black; None where it can be read."""
    if image.mode[0] not in _MODES:
        return None
    return f"{_MODES.get(image.mode, '16-bit grey')}, mode {image.mode}"


def read_rgb(path: str | os.PathLike[str]) -> np.ndarray:
    """An image as it is shown (EXIF's orientation applied), RGB, uint8 ``[H, W, 3]``.

    Raises:
        one of :data:`BROKEN_IMAGE`: it cannot be read as it is meant.
    """
    with Image.open(path) as image:
        if mode := clipped_mode(image):
            raise ValueError(f"{mode}: as RGB its values would be cut off at 255; convert it")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def check_images(
    folder: Path,
    images: dict[Any, dict],
    findings: Findings,
    *,
    decode: int,
    reader: str | None = None,
) -> int:
    """
    Args:
        folder: that the ``file_name`` of each image is relative to.
        images: entries with ``file_name``, ``width`` and ``height``, by id.
        decode: at most this many are decoded, evenly spaced.
        reader: :data:`DETECTRON2`, :data:`PILLOW`, or None where that is not known.

    Returns:
        the number of images that were decoded.
    """
    if not folder.is_dir():
        findings.refuse(f"image folder '{folder}' does not exist: check the path")
        return 0
    present = _check_names(folder, images, findings)
    if len(present) > decode:
        present = [present[i] for i in np.linspace(0, len(present) - 1, decode).astype(int)]
    broken, clipped, turned, wrong_size = [], [], [], []
    for record in shown(present, f"decoding images of {folder}"):
        label = f"image {record['id']} '{record['file_name']}'"
        try:
            width, height, orientation, mode, turned_by_pillow = _decode(
                folder / record["file_name"]
            )
        except BROKEN_IMAGE as e:
            broken.append(f"{label}: {e}")
            continue
        if mode:
            clipped.append(f"{label}: {mode}")
        if turned_by_pillow:
            turned.append(label)
        if (width, height) != (record["width"], record["height"]):
            listed = f"listed as {record['width']} x {record['height']}"
            how = " as its EXIF orientation turns it" if orientation > 1 else ""
            wrong_size.append(f"{label} is {width} x {height}{how}, {listed}")
    findings.refuse(
        f"image files below '{folder}' that are cut off or that Pillow cannot decode: copy them "
        "again, or convert them to RGB of 8 bits",
        broken,
    )
    findings.refuse(
        "images whose values would be cut off at 255 when read as RGB, to all white or black: "
        "convert them to 8 bits",
        clipped,
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


def _decode(path: Path) -> tuple[int, int, int, str | None, bool]:
    """Decodes all of a file. Returns its width and height as shown, EXIF's orientation (1 is
    upright), :func:`clipped_mode`, and whether loading, not the reader, applied the orientation."""
    with Image.open(path) as image:
        mode = clipped_mode(image)
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
        return width, height, orientation, mode, remaining != orientation


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

    present, elsewhere, missing = [], [], []
    others = None
    for record in images.values():
        parent, name = os.path.split(folder / record["file_name"])
        if name in names_in(parent):
            present.append(record)
            continue
        others = _files_below(folder) if others is None else others
        label = f"image {record['id']} '{record['file_name']}'"
        other = others.get(_plain(record["file_name"]))
        if other is None:
            missing.append(label)
        else:
            elsewhere.append(f"{label} is '{other}'")
    hint = ""
    if missing and not present:  # of the other split, most likely
        name = next(iter(images.values()))["file_name"]
        beside = [other for other in sorted(folder.parent.iterdir()) if (other / name).is_file()]
        hint = f", though '{beside[0]}' has the first of them" if beside else ""
    findings.refuse(
        f"image files that lie below '{folder}' under another name than listed: write 'file_name' "
        "as the files are called, or give the folder that it is relative to",
        elsewhere,
    )
    findings.refuse(
        f"image files missing below '{folder}'{hint}: copy them there, or give the folder that "
        "'file_name' is relative to",
        missing,
    )
    return present


def _files_below(folder: Path) -> dict[str, str]:
    """The files in a folder and in those in it, relative to it, by their plain names."""
    inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    found: dict[str, str] = {}
    for below in ("", *inside[:_MOST_FOLDERS]):
        for name in os.listdir(folder / below):
            found.setdefault(_plain(name), os.path.join(below, name))
    return found


def _plain(name: str) -> str:
    """What is the same in all ways of writing the name of a file, wherever it lies: of a tool on
    another system, a browser or an export with folders of its own."""
    if "://" in name:
        name = urlparse(name).path
    last = unquote(name).replace("\\", "/").rpartition("/")[2]
    return unicodedata.normalize("NFC", last).casefold()
