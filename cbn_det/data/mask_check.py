"""Checks masks, alone and against the boxes beside them: the two contradict each other after many a
conversion, and either may be the wrong one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from operator import mul

import numpy as np
import pycocotools.mask as mask_util

from ..progress import shown
from .coco_api import whole_polygons
from .findings import Findings, are_finite

# A box drawn by hand around a mask drawn by hand differs a little, one around all of a half hidden
# object more: a warning is for other boxes, a refusal for sets most of whose boxes are others.
TOLERANCE = 2.0  # pixels
SAME_IOU, OTHER_IOU = 0.9, 0.5
# A mask with less than this of it in its box is of no use to a head that looks into the box.
LEAST_SHARE = 0.1

# What tools write where COCO's format has [x, y, width, height]: the corners that it stands for.
_LAYOUTS: tuple[tuple[str, Callable[..., tuple]], ...] = (
    (
        "'bbox' seems to hold the centre, [center x, center y, width, height]",
        lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
    ),
    ("'bbox' seems to hold corners, [x1, y1, x2, y2]", lambda *corners: corners),
    ("x and y seem to be swapped in one of the two", lambda x, y, w, h: (y, x, y + h, x + w)),
)

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
_MISSING = (
    "annotations without 'segmentation' while MODEL.MASK_ON is True: add their masks, or "
    "train boxes only with MODEL.MASK_ON False; ids"
)
_NO_POLYGON = (
    "polygons with fewer than 3 points (6 coordinates) or an odd number of coordinates: "
    "correct or remove them; annotations"
)
_FEW_POINTS = (
    "polygons with fewer than 3 points or an odd number of coordinates, left out beside valid "
    "ones; annotations"
)
_MOST_DIGITS = 7  # of 5 bits, in a run length: longer than any image's


@dataclass(frozen=True, slots=True)
class _Mask:
    """Of an object.

    Attributes:
        extent: x1, y1, x2, y2 in pixels.
        share: of its pixels, how many are in the box; 1 where that is not known.
    """

    extent: tuple[float, float, float, float]
    share: float = 1.0
    empty: bool = False
    outside: bool = False


def check_masks(
    anns: list[dict], images: dict, findings: Findings, *, masks: bool, for_evaluation: bool
) -> bool:
    """
    Args:
        anns: whose images are all in ``images``, with boxes of four finite numbers.
        images: entries with ``width`` and ``height``, by id.
        masks: whether masks are trained or evaluated; boxes are compared with them anyway.

    Returns:
        whether the mask of an object (not of a crowd region) is run-length encoded.
    """
    faults: dict[str, list] = defaultdict(list)
    found: list[tuple[dict, _Mask]] = []
    has_rle = False
    for a in shown(anns, "checking annotations"):
        segm, crowd, image = a.get("segmentation"), a.get("iscrowd", 0), images[a["image_id"]]
        if isinstance(segm, list) and segm:
            mask = _of_polygons(segm, image, evaluated=masks and for_evaluation)
            if isinstance(mask, _Mask) and len(whole_polygons(segm)) < len(segm):
                faults[_FEW_POINTS].append(a["id"])
        elif isinstance(segm, dict) and segm.keys() >= {"counts", "size"}:
            has_rle |= not crowd
            mask = _of_runs(segm, image, a["bbox"])
        elif segm:
            mask = _TYPE
        else:
            mask = _MISSING
        if isinstance(mask, _Mask):
            found += [] if crowd else [(a, mask)]
        elif mask != _MISSING or masks and (not crowd or for_evaluation):  # COCOeval reads crowd's
            faults[mask].append(a["id"])
    findings.warn(_FEW_POINTS, faults.pop(_FEW_POINTS, []))
    for line, ids in faults.items():
        findings.refuse(line, ids)
    polygons = [mask.extent for a, mask in found if isinstance(a["segmentation"], list)]
    if polygons and np.abs(polygons).max() <= 1:
        line = (
            "all polygons lie within the first pixel: their coordinates seem to be fractions of "
            "the image, COCO's format has pixels"
        )
        (findings.refuse if masks else findings.warn)(line)
        return has_rle
    compared = [(a, mask) for a, mask in found if not mask.empty]
    if masks:
        if found and not compared:
            findings.refuse(
                "no mask covers a pixel (polygons that are lines, RLE without an object): there is "
                "nothing to train masks on"
            )
        else:
            findings.warn(
                "masks that cover no pixel (lines, empty RLE): they are lost in training, and "
                "evaluation counts them as missed; annotations",
                (a["id"] for a, mask in found if mask.empty),
            )
        findings.refuse(
            "masks outside their image, or with points far outside: are x and y swapped, or are "
            "they of another image? Correct them; annotations",
            (a["id"] for a, mask in found if mask.outside),
        )
        compared = [(a, mask) for a, mask in compared if not mask.outside]
    compared = [(a, mask) for a, mask in compared if min(a["bbox"][2:]) > 0]
    if compared:
        _compare_with_boxes(compared, images, findings, masks)
    return has_rle


def _of_polygons(segm: list, image: dict, evaluated: bool) -> _Mask | str:
    """The mask, or what is wrong with it."""
    if are_finite(segm):
        return _FLAT
    if not all(isinstance(p, list) and are_finite(p) for p in segm):
        return _TYPE
    polygons = whole_polygons(segm)
    if not polygons or evaluated and len(segm[0]) == 4:  # a box, for pycocotools
        return _NO_POLYGON
    xs = [x for p in polygons for x in p[0::2]]
    ys = [y for p in polygons for y in p[1::2]]
    extent = x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    width, height = image["width"], image["height"]
    if (
        # none of it in the image, or so far out that rasterising it costs the memory of many images
        (x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0)
        or (x1 < -width or y1 < -height or x2 > 2 * width or y2 > 2 * height)
    ):
        return _Mask(extent, outside=True, share=0.0)
    if all(map(_may_be_empty, polygons)):
        runs = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
        return _Mask(extent, empty=not mask_util.area(runs))
    return _Mask(extent)


def _may_be_empty(polygon: list) -> bool:
    """Whether it may cover no pixel's middle: a line, or a sliver less than a pixel wide."""
    xs, ys = polygon[0::2], polygon[1::2]
    twice = sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, ys, xs[1:] + xs[:1]))
    return abs(twice) / 2 <= max(max(xs) - min(xs), max(ys) - min(ys)) + 1


def _of_runs(segm: dict, image: dict, bbox: list) -> _Mask | str:
    """The mask, or what is wrong with it."""
    size = segm["size"]
    width, height = image["width"], image["height"]
    if size != [height, width] or not all(type(side) is int for side in size):  # 48.0 is not one
        return _SIZE
    mask = checked_rle(segm)
    if mask is None:
        return _RUNS
    left, top, columns, rows = mask_util.toBbox(mask)
    extent, area = (left, top, left + columns, top + rows), int(mask_util.area(mask))
    if not area:
        return _Mask(extent, empty=True)
    x, y, w, h = bbox
    low = np.floor([x, y]).clip(0, [width, height])
    high = np.ceil([x + w, y + h]).clip(low, [width, height])
    inside = num_pixels_within(mask, (*low, *(high - low)))
    return _Mask(extent, share=inside / area)


def checked_rle(segmentation: dict) -> dict | None:
    """
    A mask as run lengths, in pycocotools' own form.

    Args:
        segmentation: with ``counts``, a list of integers or COCO's compressed text, and ``size``,
            ``[height, width]``, two positive integers.

    Returns:
        None where ``counts`` are something else, or do not fill the image exactly: pycocotools
        relies on it.
    """
    counts, (height, width) = segmentation["counts"], segmentation["size"]
    if height * width >= 2**31:  # more than pycocotools counts
        return None
    if isinstance(counts, list):
        if (
            not all(type(run) is int and run >= 0 for run in counts)
            or sum(counts) != height * width
        ):
            return None
        return mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    runs = _decompressed(counts) if isinstance(counts, str) else None
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        return None
    return {"size": [height, width], "counts": counts.encode("ascii")}


def _decompressed(text: str) -> np.ndarray | None:
    """Each number is a row of digits of 5 bits, the lowest first, the last one with the sign; from
    the fourth on, numbers are differences to the last but one."""
    if not text.isascii():
        return None
    digits = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() >= 64 or digits[-1] >= 32:
        return None
    ends = np.flatnonzero(digits < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_DIGITS:
        return None
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((digits & 31) << 5 * place, starts)
    numbers -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def num_pixels_within(mask: dict, box: tuple[int, int, int, int]) -> int:
    """How many pixels of a mask lie in a box ``x, y, width, height`` of whole pixels."""
    boxed = mask_util.frPyObjects(np.array([box], dtype=np.float64), *mask["size"])
    return int(mask_util.area(mask_util.merge([mask, *boxed], intersect=True)))


def _compare_with_boxes(
    found: list[tuple[dict, _Mask]], images: dict, findings: Findings, masks: bool
) -> None:
    ids = np.array([a["id"] for a, _ in found], dtype=object)  # of any size
    stored = np.array([a["bbox"] for a, _ in found], dtype=np.float64)
    records = [images[a["image_id"]] for a, _ in found]
    size = np.array([(r["width"], r["height"]) * 2 for r in records], dtype=np.float64)
    extent = np.array([mask.extent for _, mask in found], dtype=np.float64).clip(0, size)
    box = np.concatenate([stored[:, :2], stored[:, :2] + stored[:, 2:]], axis=1).clip(0, size)
    iou, of_smaller = _overlap(extent, box)
    differs = (np.abs(extent - box).max(axis=1) > TOLERANCE) & (iou < SAME_IOU)
    most = 2 * differs.sum() > len(found)
    layout = _layout(stored[differs], extent[differs], size[differs]) if most else None
    contradict = differs if layout else differs & (iou < OTHER_IOU)
    if 2 * contradict.sum() > len(found):
        layout = layout or (
            "correct 'bbox' or 'segmentation', or remove 'segmentation' to train on boxes alone"
        )
        findings.refuse(
            f"most boxes ({contradict.sum()} of {len(found)}) contradict their masks; {layout}; "
            "annotations",
            ids[contradict],
        )
        return
    share = np.minimum([mask.share for _, mask in found], of_smaller)
    elsewhere = differs & (share < LEAST_SHARE) & masks
    findings.refuse(
        "masks that hardly overlap their box: correct one of the two; annotations", ids[elsewhere]
    )
    findings.warn(
        f"boxes that are not those of their masks (IoU below {SAME_IOU}, more than "
        f"{TOLERANCE:.0f} pixels off): correct one of the two; annotations",
        ids[differs & ~elsewhere],
    )


def _overlap(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU of boxes ``[n, 4]`` in corners, and the share of the smaller one that is in the other."""
    common = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(axis=1)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).clip(0).prod(axis=1) for box in (a, b))
    tiny = np.finfo(np.float64).tiny
    iou = common / np.maximum(area_a + area_b - common, tiny)
    return iou, common / np.maximum(np.minimum(area_a, area_b), tiny)


def _layout(stored: np.ndarray, extent: np.ndarray, size: np.ndarray) -> str | None:
    """What most of ``stored`` hold if not ``[x, y, width, height]``; None: nothing known."""
    for text, corners in _LAYOUTS:
        iou, _ = _overlap(np.stack(corners(*stored.T), axis=1).clip(0, size), extent)
        if 2 * (iou >= SAME_IOU).sum() > len(stored):
            return f"{text}: COCO's format has [x, y, width, height]"
    return None
