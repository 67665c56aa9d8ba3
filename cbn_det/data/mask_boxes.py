"""Compares boxes with the masks of the same annotations: they contradict each other after many a
conversion, and either may be the wrong one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from cbn_det.data.findings import Findings
from cbn_det.data.numbers import are_finite

__all__ = ["compare_with_boxes"]

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


def compare_with_boxes(
    compared: Sequence[tuple[dict, tuple, float]],
    images: dict,
    findings: Findings,
    *,
    masks: bool,
    refused: Collection,
) -> None:
    """
    Args:
        compared: annotations, the corners of their masks in pixels, and the share of the mask's
            pixels within the box where it is known, else 1.
        images: entries with ``width`` and ``height``, by id.
        masks: masks are trained: one that is not in its box is refused.
        refused: ids of annotations whose masks are refused already.
    """
    compared = [one for one in compared if _is_box(one[0]["bbox"])]
    if masks:
        compared = [one for one in compared if one[0]["id"] not in refused]
    if not compared:
        return
    ids = np.array([a["id"] for a, _, _ in compared], dtype=object)  # of any size
    stored = np.array([a["bbox"] for a, _, _ in compared], dtype=np.float64)
    share = np.array([share for _, _, share in compared])
    records = [images[a["image_id"]] for a, _, _ in compared]
    size = np.array([(r["width"], r["height"]) * 2 for r in records], dtype=np.float64)
    mask = np.array([corners for _, corners, _ in compared], dtype=np.float64).clip(0, size)
    box = np.concatenate([stored[:, :2], stored[:, :2] + stored[:, 2:]], axis=1).clip(0, size)
    iou, of_smaller = _overlap(mask, box)
    differs = np.abs(mask - box).max(axis=1) > TOLERANCE
    differs &= iou < SAME_IOU
    most = 2 * differs.sum() > len(compared)
    layout = _layout(stored[differs], mask[differs], size[differs]) if most else None
    contradict = differs if layout else differs & (iou < OTHER_IOU)
    if 2 * contradict.sum() > len(compared):
        layout = layout or (
            "correct 'bbox' or 'segmentation', or remove 'segmentation' to train on boxes alone"
        )
        findings.refuse(
            f"most boxes ({contradict.sum()} of {len(compared)}) contradict their masks; {layout}; "
            "annotations",
            ids[contradict],
        )
        return
    elsewhere = differs & (np.minimum(share, of_smaller) < LEAST_SHARE)
    if masks:
        findings.refuse(
            "masks that hardly overlap their box: correct one of the two; annotations",
            ids[elsewhere],
        )
    findings.warn(
        "boxes that are not those of their masks (IoU below "
        f"{SAME_IOU}, more than {TOLERANCE:.0f} pixels off): correct one of the two; annotations",
        ids[differs & ~(elsewhere & masks)],
    )


def _is_box(box: object) -> bool:
    """Others are refused, or left out of training, for themselves."""
    return isinstance(box, list) and len(box) == 4 and are_finite(box) and min(box[2:]) > 0


def _overlap(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU of boxes ``[n, 4]`` in corners, and the share of the smaller one that is in the other."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    common = sides.clip(0).prod(axis=1)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).clip(0).prod(axis=1) for box in (a, b))
    tiny = np.finfo(np.float64).tiny
    iou = common / np.maximum(area_a + area_b - common, tiny)
    return iou, common / np.maximum(np.minimum(area_a, area_b), tiny)


def _layout(stored: np.ndarray, mask: np.ndarray, size: np.ndarray) -> str | None:
    """What most of ``stored`` hold if not ``[x, y, width, height]``; None: nothing known."""
    for text, corners in _LAYOUTS:
        iou, _ = _overlap(np.stack(corners(*stored.T), axis=1).clip(0, size), mask)
        if 2 * (iou >= SAME_IOU).sum() > len(stored):
            return f"{text}: COCO's format has [x, y, width, height]"
    return None
