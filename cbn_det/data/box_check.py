"""Checks boxes and areas."""

from __future__ import annotations

import numpy as np

from cbn_det.data.findings import Findings
from cbn_det.data.numbers import are_finite, are_numbers

__all__ = ["check_boxes"]

# Annotation tools round: a box that leaves the image by less than this is not worth a warning.
OUTSIDE_TOLERANCE = 1.0
# They also round areas, and some take the last pixel for the border: a box of 9 x 9 for 10 x 10.
AREA_MARGIN = 2.0


def check_boxes(anns: list[dict], images: dict, findings: Findings, for_evaluation: bool) -> None:
    """
    Args:
        anns: whose images are all in ``images``.
        images: entries with ``width`` and ``height``, by id.
        for_evaluation: areas are read.
    """
    for line, good in (
        ("boxes that are not four numbers [x, y, width, height]: annotations", _has_four_numbers),
        ("boxes that are not finite: remove these annotations", lambda a: are_finite(a["bbox"])),
    ):
        findings.refuse(line, (a["id"] for a in anns if not good(a)))
        anns = list(filter(good, anns))
    if not anns:
        return
    ids = np.array([a["id"] for a in anns], dtype=object)  # of any size
    box = np.array([a["bbox"] for a in anns], dtype=np.float64)
    records = [images[a["image_id"]] for a in anns]
    size = np.array([(r["width"], r["height"]) for r in records])
    low, extent = box[:, :2], box[:, 2:]
    negative = (extent < 0).any(axis=1)
    findings.refuse(
        "boxes of negative width or height: [x, y, width, height] is expected; annotations",
        ids[negative],
    )
    findings.warn(
        "boxes of zero width or height: left out of training as in COCO, but evaluation counts "
        "them as missed; annotations",
        ids[~negative & (extent == 0).any(axis=1)],
    )
    beyond = np.maximum(-low, low + extent - size).max(axis=1)
    outside = ((low >= size) | (low + extent <= 0)).any(axis=1) & (extent > 0).all(axis=1)
    findings.refuse(
        "boxes wholly outside their image: correct or remove these annotations", ids[outside]
    )
    findings.warn(
        "boxes partly outside their image, clipped in training ([x, y, width, height] is expected, "
        "not corners); annotations",
        ids[(beyond > OUTSIDE_TOLERANCE) & ~outside & ~negative],
    )
    if (low + extent).max() <= 1:
        findings.refuse(
            "all boxes lie within the first pixel: their coordinates seem to be fractions of the "
            "image, COCO's format has pixels"
        )
    elif for_evaluation:
        area = np.array([a["area"] if are_finite([a.get("area")]) else np.nan for a in anns])
        larger = area > (extent + AREA_MARGIN).prod(axis=1)
        none = (area <= 0) & (extent > 0).all(axis=1)
        findings.warn(
            "annotations whose 'area' is larger than their box or not positive, though APs, APm "
            "and APl sort objects by it: write the object's pixel count; annotations",
            ids[(larger | none) & ~negative],
        )


def _has_four_numbers(annotation: dict) -> bool:
    box = annotation["bbox"]
    return isinstance(box, list) and len(box) == 4 and are_numbers(box)
