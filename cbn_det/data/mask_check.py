"""Checks masks, alone and against the boxes that they belong to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from operator import mul
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from cbn_det.data.findings import Findings
from cbn_det.data.mask_boxes import compare_with_boxes
from cbn_det.data.numbers import are_finite
from cbn_det.data.rle import checked_rle, num_pixels_within

__all__ = ["check_masks"]

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


_FLAT = (
    "'segmentation' is a flat list of numbers: put each polygon into a list of its own, "
    "[[x1, y1, x2, y2, ...]]; annotations"
)
_TYPE = (
    "'segmentation' must be a list of polygons [x1, y1, x2, y2, ...] of finite numbers, or an "
    "RLE with 'size' and 'counts'; annotations"
)
_SIZE = "masks (RLE) of another size than their image: 'size' must be [height, width]; annotations"
_RUNS = "masks (RLE) whose runs do not fill their image: annotations"
_FEW_POINTS = (
    "polygons with fewer than 3 points or an odd number of coordinates, left out beside valid "
    "ones; annotations"
)
_MISSING = (
    "annotations without 'segmentation' while MODEL.MASK_ON is True: add their masks, or "
    "train boxes only with MODEL.MASK_ON False; ids"
)
_NO_POLYGON = (
    "polygons with fewer than 3 points (6 coordinates) or an odd number of coordinates: "
    "correct or remove them; annotations"
)


@dataclass
class _Masks:
    """What the masks of objects (crowd regions aside) come to."""

    compared: list[tuple[dict, Corners, float]] = field(default_factory=list)
    without_pixel: list[Any] = field(default_factory=list)
    outside: list[Any] = field(default_factory=list)
    largest: float = 0.0  # coordinate of a polygon
    num_polygons: int = 0


def check_masks(
    anns: list[dict], images: dict, findings: Findings, *, masks: bool, for_evaluation: bool
) -> bool:
    """
    Args:
        anns: whose images are all in ``images``.
        images: entries with ``width`` and ``height``, by id.
        masks: whether masks are trained or evaluated; boxes are compared with them anyway.

    Returns:
        whether the mask of an object (not of a crowd region) is run-length encoded.
    """
    faults: dict[str, list] = defaultdict(list)
    found = _Masks()
    has_rle = False
    for a in anns:
        segm, crowd = a.get("segmentation"), a.get("iscrowd", 0)
        image = images[a["image_id"]]
        if not segm:
            if masks and (not crowd or for_evaluation):  # COCOeval looks at each mask
                faults[_MISSING].append(a["id"])
        elif isinstance(segm, list):
            valid = _valid_polygons(segm, evaluated=masks and for_evaluation)
            if isinstance(valid, str):
                faults[valid].append(a["id"])
                continue
            if len(valid) < len(segm):
                faults[_FEW_POINTS].append(a["id"])
            if not crowd:
                _add_polygons(a, valid, image, found)
        elif isinstance(segm, dict) and "counts" in segm and "size" in segm:
            has_rle |= not crowd
            right_size = _is_size(segm["size"], [image["height"], image["width"]])
            mask = checked_rle(segm) if right_size else None
            if mask is None:
                faults[_RUNS if right_size else _SIZE].append(a["id"])
            elif not crowd:
                _add_rle(a, mask, image, found)
        else:
            faults[_TYPE].append(a["id"])
    for line in (_FLAT, _TYPE, _SIZE, _RUNS, _MISSING, _NO_POLYGON):
        findings.refuse(line, faults[line])
    findings.warn(_FEW_POINTS, faults[_FEW_POINTS])
    _judge(found, images, findings, masks)
    return has_rle


def _valid_polygons(segm: list, evaluated: bool) -> list | str:
    """Those of at least three points; what is wrong where there are none, or where evaluation would
    fail: pycocotools takes a first polygon of 4 numbers for a box."""
    if are_finite(segm):
        return _FLAT
    if not all(isinstance(p, list) and are_finite(p) for p in segm):
        return _TYPE
    if evaluated and len(segm[0]) == 4:
        return _NO_POLYGON
    return [p for p in segm if len(p) >= 6 and len(p) % 2 == 0] or _NO_POLYGON


def _is_size(value: object, size: list[int]) -> bool:
    """Whether it is the size, in integers: 48.0 is not, for pycocotools."""
    return value == size and all(type(side) is int for side in value)


def _add_polygons(a: dict, polygons: list[list], image: dict, found: _Masks) -> None:
    xs = [x for p in polygons for x in p[0::2]]
    ys = [y for p in polygons for y in p[1::2]]
    x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    width, height = image["width"], image["height"]
    found.num_polygons += 1
    found.largest = max(found.largest, abs(x1), abs(y1), abs(x2), abs(y2))
    if (
        # none of it in the image, or so far out that rasterising it costs the memory of many images
        (x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0)
        or (x1 < -width or y1 < -height or x2 > 2 * width or y2 > 2 * height)
    ):
        found.outside.append(a["id"])
        found.compared.append((a, (x1, y1, x2, y2), 0.0))
    elif all(map(_may_be_empty, polygons)) and not _num_pixels(polygons, width, height):
        found.without_pixel.append(a["id"])
    else:
        found.compared.append((a, (x1, y1, x2, y2), 1.0))


def _may_be_empty(polygon: list) -> bool:
    """Whether it may cover no pixel's middle: a line, or a sliver less than a pixel wide."""
    xs, ys = polygon[0::2], polygon[1::2]
    twice = sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, ys, xs[1:] + xs[:1]))
    return abs(twice) / 2 <= max(max(xs) - min(xs), max(ys) - min(ys)) + 1


def _num_pixels(polygons: list[list], width: int, height: int) -> int:
    return int(mask_util.area(mask_util.merge(mask_util.frPyObjects(polygons, height, width))))


def _add_rle(a: dict, mask: dict, image: dict, found: _Masks) -> None:
    area = int(mask_util.area(mask))
    if not area:
        found.without_pixel.append(a["id"])
        return
    left, top, columns, rows = mask_util.toBbox(mask)
    share = 1.0
    if isinstance(a["bbox"], list) and len(a["bbox"]) == 4 and are_finite(a["bbox"]):
        x, y, w, h = a["bbox"]
        low = np.floor([x, y]).clip(0, [image["width"], image["height"]])
        high = np.ceil([x + w, y + h]).clip(low, [image["width"], image["height"]])
        share = num_pixels_within(mask, (*low, *(high - low))) / area
    found.compared.append((a, (left, top, left + columns, top + rows), share))


def _judge(found: _Masks, images: dict, findings: Findings, masks: bool) -> None:
    if found.num_polygons and found.largest <= 1:
        line = (
            "all polygons lie within the first pixel: their coordinates seem to be fractions of "
            "the image, COCO's format has pixels"
        )
        (findings.refuse if masks else findings.warn)(line)
        return
    if masks:
        if found.without_pixel and not found.compared:
            findings.refuse(
                "no mask covers a pixel (polygons that are lines, RLE without an object): there is "
                "nothing to train masks on"
            )
        else:
            findings.warn(
                "masks that cover no pixel (lines, empty RLE): they are lost in training, and "
                "evaluation counts them as missed; annotations",
                found.without_pixel,
            )
        findings.refuse(
            "masks outside their image, or with points far outside: are x and y swapped, or are "
            "they of another image? Correct them; annotations",
            found.outside,
        )
    compare_with_boxes(found.compared, images, findings, masks=masks, refused=set(found.outside))
