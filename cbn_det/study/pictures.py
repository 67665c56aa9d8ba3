"""Pictures of a run's folder, made small enough to put into a page."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2

MAX_PICTURES = 4
MAX_WIDTH = 900
JPEG_QUALITY = 82


def picture_strip(folder: Path) -> list[tuple[str, str]]:
    """(name, data URI) of the first few of `folder/pictures`; unreadable files are left out.

    Sorted by name, so that runs evaluated on the same images show the same ones.
    """
    paths = sorted(p for p in (folder / "pictures").glob("*") if p.suffix in (".png", ".jpg"))
    strip = []
    for path in paths[:MAX_PICTURES]:
        image = cv2.imread(str(path))
        if image is None:  # a run that was ended while it wrote
            continue
        height, width = image.shape[:2]
        if width > MAX_WIDTH:
            size = (MAX_WIDTH, max(1, round(height * MAX_WIDTH / width)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        data = base64.b64encode(jpeg.tobytes()).decode("ascii")
        strip.append((path.stem, f"data:image/jpeg;base64,{data}"))
    return strip
