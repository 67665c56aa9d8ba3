"""pycocotools' own view of an annotation file, quiet, and right for any ids and polygons."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from pycocotools.coco import COCO

_LIMIT = 100  # of COCO: more predictions of an image and a category do not count
_NO_LIMIT = 10**6


def open_coco(path: str | os.PathLike[str]) -> COCO:
    """The file, its annotations numbered from 1."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(os.fspath(path))
        number_annotations(coco)
    return coco


def number_annotations(coco: COCO) -> None:
    """Numbers the annotations from 1, in place. COCOeval takes an object that was matched with the
    annotation 0 for unmatched, and detectron2's has 64 bits for an id."""
    for number, annotation in enumerate(coco.dataset.get("annotations", ()), start=1):
        annotation["id"] = number
    coco.createIndex()


def whole_polygons(segmentation: list[list[float]]) -> list[list[float]]:
    """The polygons of at least three points; pycocotools would take one of four numbers for a
    box."""
    return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]


def mask_of(coco: COCO, annotation: dict[str, Any]) -> np.ndarray:
    """The mask of an annotation, uint8 ``[H, W]`` in pixels of its image as it is stored."""
    shape = annotation["segmentation"]
    if isinstance(shape, list):
        shape = whole_polygons(shape)
    return coco.annToMask({**annotation, "segmentation": shape})


def class_names(annotations: str | os.PathLike[str]) -> list[str]:
    """Of a COCO file, in the order of the category ids."""
    categories = json.loads(Path(annotations).read_text(encoding="utf-8"))["categories"]
    return [one["name"] for one in sorted(categories, key=lambda one: one["id"])]


def detections_counted(cfg: CfgNode) -> int:
    """How many predictions of an image count: as many as ``TEST.DETECTIONS_PER_IMAGE`` allows, and
    COCO's 100 where that is less, as then all do."""
    most = cfg.TEST.DETECTIONS_PER_IMAGE
    return _NO_LIMIT if most < 0 else max(_LIMIT, most)
