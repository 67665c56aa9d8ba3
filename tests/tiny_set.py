"""A small COCO-format set that a test damages before it is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from cbn_det.data import CocoReport, DataError, check_coco

WIDTH, HEIGHT = 64, 48


class Files(NamedTuple):
    """Of a set in COCO format."""

    annotations: Path
    images: Path


class TinySet:
    """Three images of 64 x 48, category ids with a gap, one image without an object."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.images = root / "images"
        self.images.mkdir(parents=True)
        self.path = root / "set.json"
        rng = np.random.default_rng(seed)
        records = []
        for i, suffix in ((1, "jpg"), (2, "jpg"), (3, "png")):
            pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / f"{i}.{suffix}")
            record = {"id": i, "file_name": f"{i}.{suffix}", "height": HEIGHT, "width": WIDTH}
            records.append(record)
        self.data = {
            "images": records,
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
            "annotations": [self.annotation(11, 1, 1), self.annotation(12, 2, 90)],
        }

    @staticmethod
    def annotation(
        ann_id: int,
        image_id: int,
        category_id: int,
        box: tuple[float, float, float, float] = (10, 10, 20, 20),
        **changes,
    ) -> dict:
        """A triangle in the box."""
        x, y, w, h = box
        return {
            "id": ann_id,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": list(box),
            "area": w * h / 2,
            "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h]],
        } | changes

    def place(self, index: int, *box: float) -> None:
        """Moves an annotation's box and mask."""
        old = self.data["annotations"][index]
        ids = (old[key] for key in ("id", "image_id", "category_id"))
        self.data["annotations"][index] = self.annotation(*ids, box)

    def write(self) -> None:
        self.path.write_text(json.dumps(self.data))

    def check(self, **kwargs) -> CocoReport:
        self.write()
        return check_coco(self.path, self.images, **kwargs)

    def refused(self, *parts: str, **kwargs) -> str:
        """Checks that the set is refused and that the message holds the file and each part."""
        with pytest.raises(DataError) as error:
            self.check(**kwargs)
        message = str(error.value)
        for part in (str(self.path), *parts):
            assert part in message
        return message

    def refused_once(self, *parts: str, **kwargs) -> str:
        """The same, and that this is the only line."""
        message = self.refused(*parts, **kwargs)
        assert len(message.splitlines()) == 1, message
        return message

    def warned(self, *parts: str, **kwargs) -> str:
        """Checks that the set passes with one warning, which holds the file and each part."""
        (warning,) = self.check(**kwargs).warnings
        for part in (str(self.path), *parts):
            assert part in warning
        return warning


@pytest.fixture
def tiny_set(tmp_path: Path) -> TinySet:
    """A test module takes it over as ``tiny``."""
    return TinySet(tmp_path)
