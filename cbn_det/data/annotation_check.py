"""Checks annotations: their flags, boxes and areas, and which of them count."""

from __future__ import annotations

import numpy as np

from .coco_file import CocoFile
from .findings import Findings, are_finite

_CROWD_SHARE = 0.5  # COCO has 1 %, sets with many ignored regions a fifth
_LARGEST_AREA = 1e10  # pycocotools leaves out what is larger
# Annotation tools round: a box that leaves the image by less than this is not worth a warning.
_OUTSIDE_TOLERANCE = 1.0
# They also round areas, and some take the last pixel for the border: a box of 9 x 9 for 10 x 10.
_AREA_MARGIN = 2.0


def check_annotations(
    file: CocoFile, findings: Findings, *, for_training: bool, for_evaluation: bool
) -> list[dict]:
    """Returns those that masks can be compared with: with a box of four finite numbers."""
    anns = findings.keep(
        file.annotations,
        lambda a: not a.get("ignore"),
        "annotations with 'ignore' set, which detectron2 does not support: use 'iscrowd' or remove "
        "them",
    )
    anns = findings.keep(
        anns,
        lambda a: a.get("iscrowd", 0) in (0, 1),
        "annotations whose 'iscrowd' is neither 0 nor 1: write 0 for a single object, 1 for a "
        "crowd region",
        lambda a: f"annotation {a['id']}: {a['iscrowd']!r}",
    )
    if for_evaluation:
        anns = findings.keep(
            anns,
            lambda a: are_finite([a.get("area")]),
            "annotations without a number for 'area', which evaluation needs: add the object's "
            "pixel count",
        )
        anns = findings.keep(
            anns,
            lambda a: "iscrowd" in a,
            "annotations without 'iscrowd', which evaluation needs: add it, 0 for a single object",
        )
    anns = findings.keep(
        anns,
        lambda a: isinstance(a["bbox"], list) and len(a["bbox"]) == 4 and are_finite(a["bbox"]),
        "boxes that are not four finite numbers [x, y, width, height]: annotations",
    )
    if not findings.refused:
        _check_counted(anns, file, findings, for_training, for_evaluation)
    if anns:
        _check_repeated(anns, findings)
        _check_boxes(anns, file.images, findings, for_evaluation)
    return anns


def _check_counted(
    anns: list[dict], file: CocoFile, findings: Findings, for_training: bool, for_evaluation: bool
) -> None:
    """Whether anything is left to train on and to evaluate: crowd regions do not count."""
    objects = [a for a in anns if not a.get("iscrowd")]
    crowd = [a for a in anns if a.get("iscrowd")]
    if objects:
        why = "no object has an 'area' from 0 to 1e10: write the object's pixel count as its 'area'"
    elif crowd:
        why = (
            f"{len(crowd)} of {len(anns)} annotations have iscrowd 1: set iscrowd 0 for single "
            "objects"
        )
    else:
        why = "there are no annotations"
    if for_training and not objects:
        findings.refuse(f"no image has an object: nothing to train on; {why}")
    elif (
        for_evaluation
        and file.has_annotations
        and not any(0 <= a["area"] <= _LARGEST_AREA for a in objects)
    ):
        findings.refuse(f"nothing counts in its evaluation, AP would be nan: {why}")
    elif len(crowd) > _CROWD_SHARE * len(anns):  # some tools set it for every RLE
        findings.warn(
            f"most annotations ({len(crowd)} of {len(anns)}) have iscrowd 1, which are left out of "
            "training and of AP: set iscrowd 0 where they are single objects",
            [a["id"] for a in crowd],
        )
    else:
        of_objects = {a["category_id"] for a in objects}
        only_crowd = {a["category_id"] for a in crowd} - of_objects
        findings.warn(
            "categories all of whose annotations have iscrowd 1, which are left out of training "
            "and of AP: set iscrowd 0 where they are single objects",
            [repr(file.categories[i]) for i in sorted(only_crowd)],
        )


def _check_repeated(anns: list[dict], findings: Findings) -> None:
    first: dict[tuple, int] = {}
    again = []
    for a in anns:
        what = a["image_id"], a["category_id"], bool(a.get("iscrowd")), *a["bbox"]
        if first.setdefault(what, a["id"]) != a["id"]:
            again.append(f"{first[what]} = {a['id']}")
    findings.warn(
        "annotations repeated (same image, category and box), which evaluation counts as missed: "
        "remove them",
        again,
    )


def _check_boxes(anns: list[dict], images: dict, findings: Findings, for_evaluation: bool) -> None:
    ids = np.array([a["id"] for a in anns], dtype=object)  # of any size
    box = np.array([a["bbox"] for a in anns], dtype=np.float64)
    low, extent = box[:, :2], box[:, 2:]
    high = low + extent
    records = [images[a["image_id"]] for a in anns]
    size = np.array([(r["width"], r["height"]) for r in records])
    negative = (extent < 0).any(axis=1)
    positive = (extent > 0).all(axis=1)
    outside = ((low >= size) | (high <= 0)).any(axis=1) & positive
    beyond = np.maximum(-low, high - size).max(axis=1) > _OUTSIDE_TOLERANCE
    findings.refuse(
        "boxes of negative width or height: [x, y, width, height] is expected; annotations",
        ids[negative],
    )
    findings.warn(
        "boxes of zero width or height: left out of training as in COCO, but evaluation counts "
        "them as missed; annotations",
        ids[~negative & ~positive],
    )
    findings.refuse(
        "boxes wholly outside their image: correct or remove these annotations", ids[outside]
    )
    findings.warn(
        "boxes partly outside their image, clipped in training ([x, y, width, height] is expected, "
        "not corners); annotations",
        ids[beyond & ~outside & ~negative],
    )
    if high.max() <= 1:
        findings.refuse(
            "all boxes lie within the first pixel: their coordinates seem to be fractions of the "
            "image, COCO's format has pixels"
        )
    elif for_evaluation:
        area = np.array([a["area"] for a in anns], dtype=np.float64)
        larger = area > (extent + _AREA_MARGIN).prod(axis=1)
        findings.warn(
            "annotations whose 'area' is larger than their box or not positive, though APs, APm "
            "and APl sort objects by it: write the object's pixel count; annotations",
            ids[(larger | (area <= 0) & positive) & ~negative],
        )
