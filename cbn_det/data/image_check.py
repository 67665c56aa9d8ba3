"""Checks image files: that they are there, can be decoded, and are read as they are meant."""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from cbn_det.data.file_names import FolderNames
from cbn_det.data.findings import Findings

__all__ = ["BROKEN_IMAGE", "DETECTRON2", "PILLOW", "check_images", "clipped_mode"]

# What Pillow raises for a file that it cannot read or decode.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

#: who reads the images in training; detectron2 turns a TIFF once more after Pillow has done so
DETECTRON2, PILLOW = "detectron2", "pillow"

# Others are of 16 bits: I;16, I;16B, ... Older versions of Pillow have mode I for these, too.
_MODES = {"F": "32-bit float", "I": "integers of 16 or 32 bits"}


def clipped_mode(image: Image.Image) -> str | None:
    """What an opened image holds if reading it as RGB would cut its values off at 255, which makes
    it all white or all black; None where it can be read."""
    if image.mode[0] not in _MODES:
        return None
    return f"{_MODES.get(image.mode, '16-bit grey')}, mode {image.mode}"


def check_images(
    folder: Path,
    images: dict[Any, dict],
    findings: Findings,
    *,
    decode: int,
    reader: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """
    Args:
        folder: that the ``file_name`` of each image is relative to.
        images: entries with ``file_name``, ``width`` and ``height``, by id.
        decode: at most this many are decoded, evenly spaced.
        reader: :data:`DETECTRON2`, :data:`PILLOW`, or None where that is not known.
        progress: called with the number of images decoded so far and to decode.

    Returns:
        the number of images that were decoded.
    """
    if not folder.is_dir():
        findings.refuse(f"image folder '{folder}' does not exist: check the path")
        return 0
    _check_repeated(images, findings)
    present = _check_names(folder, images, findings)
    if len(present) > decode:
        present = [present[i] for i in np.linspace(0, len(present) - 1, decode).astype(int)]
    broken, unknown, clipped, turned, wrong_size = ([] for _ in range(5))
    for done, record in enumerate(present):
        if progress:
            progress(done, len(present))
        label = f"image {record['id']} '{record['file_name']}'"
        path = folder / record["file_name"]
        try:
            found = _decode(path)
        except UnidentifiedImageError as e:
            bands = _tiff_bands(path)
            (unknown if bands else broken).append(f"{label}: {bands or e}")
            continue
        except BROKEN_IMAGE as e:
            broken.append(f"{label}: {e}")
            continue
        if found.clipped:
            clipped.append(f"{label}: {found.clipped}")
        if found.turned_by_pillow:
            turned.append(label)
        if found.size != (record["width"], record["height"]):
            listed = f"listed as {record['width']} x {record['height']}"
            shown = " as its EXIF orientation turns it" if found.orientation > 1 else ""
            wrong_size.append(f"{label} is {found.size[0]} x {found.size[1]}{shown}, {listed}")
    findings.refuse(
        f"image files below '{folder}' that are cut off or cannot be decoded: copy them again",
        broken,
    )
    findings.refuse(
        f"image files below '{folder}' with bands that Pillow does not read: convert them to RGB "
        "of 8 bits",
        unknown,
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


class _Decoded:
    """What decoding all of a file tells.

    Attributes:
        size: width and height as shown, the orientation applied.
        orientation: EXIF's; 1 is upright.
        turned_by_pillow: loading applied it, not the reader.
        clipped: of :func:`clipped_mode`.
    """

    def __init__(self, image: Image.Image) -> None:
        self.clipped = clipped_mode(image)
        self.orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = image.size
        # JPEG: reads the whole stream but computes an eighth of the pixels only.
        image.draft("L", (max(width // 8, 1), max(height // 8, 1)))
        image.load()
        remaining = image.getexif().get(ExifTags.Base.Orientation, 1)
        self.turned_by_pillow = remaining != self.orientation
        if self.turned_by_pillow:
            width, height = image.size  # Pillow 10 tells the size as stored until it has loaded it
        self.size = (height, width) if remaining >= 5 else (width, height)


def _decode(path: Path) -> _Decoded:
    with Image.open(path) as image:
        return _Decoded(image)


def _tiff_bands(path: Path) -> str | None:
    """The bands of a TIFF that Pillow does not open; None for other and broken files."""
    try:
        with open(path, "rb") as file:
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
            bits = tags[TiffImagePlugin.BITSPERSAMPLE]
            return f"{tags[TiffImagePlugin.SAMPLESPERPIXEL]} bands of {max(bits)} bits"
    except (*BROKEN_IMAGE, KeyError, TypeError, struct.error):
        return None


def _check_repeated(images: dict[Any, dict], findings: Findings) -> None:
    ids: dict[str, list] = defaultdict(list)
    for i, record in images.items():
        ids[os.path.normpath(record["file_name"])].append(i)
    findings.warn(
        "image files listed under several ids: predictions of objects that one of them lacks count "
        "as wrong; list each file once",
        (f"'{name}' is ids {', '.join(map(str, i))}" for name, i in ids.items() if len(i) > 1),
    )


def _check_names(folder: Path, images: dict[Any, dict], findings: Findings) -> list[dict]:
    """Returns the entries whose file is there."""
    names = FolderNames(folder)
    present, elsewhere, missing = [], [], []
    for record in images.values():
        label = f"image {record['id']} '{record['file_name']}'"
        if names.holds(record["file_name"]):
            present.append(record)
        elif (other := names.find(record["file_name"])) is not None:
            elsewhere.append(f"{label} is '{other}'")
        else:
            missing.append(label)
    findings.refuse(
        f"image files that lie below '{folder}' under another name than listed: write 'file_name' "
        "as the files are called, or give the folder that it is relative to",
        elsewhere,
    )
    findings.refuse(
        f"image files missing below '{folder}': copy them there, or give the folder that "
        "'file_name' is relative to",
        missing,
    )
    return present
