"""Checks what annotations refer to, and what decides which of them count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

from cbn_det.data.coco_file import CocoFile, is_id
from cbn_det.data.findings import Findings
from cbn_det.data.numbers import are_finite

__all__ = ["check_annotations", "objects_by_class"]

_CROWD_SHARE = 0.5  # COCO has 1 %, sets with many ignored regions a fifth
_LONGEST_ID = 20  # digits
_LARGEST_AREA = 1e10  # pycocotools leaves out what is larger


def check_annotations(
    file: CocoFile, findings: Findings, *, for_training: bool, for_evaluation: bool
) -> list[dict]:
    """Returns the annotations whose image and category are usable."""
    _check_links(file, findings)
    anns = file.annotations
    findings.refuse(
        "annotations with 'ignore' set, which detectron2 does not support: use 'iscrowd' or remove "
        "them",
        (a["id"] for a in anns if a.get("ignore")),
    )
    findings.refuse(
        "annotations whose 'iscrowd' is neither 0 nor 1: write 0 for a single object, 1 for a "
        "crowd region",
        (
            f"annotation {a['id']}: {a['iscrowd']!r}"
            for a in anns
            if "iscrowd" in a and a["iscrowd"] not in (0, 1)
        ),
    )
    if for_evaluation:
        findings.refuse(
            "annotations without a number for 'area', which evaluation needs: add the object's "
            "pixel count",
            (a["id"] for a in anns if not are_finite([a.get("area")])),
        )
        findings.refuse(
            "annotations without 'iscrowd', which evaluation needs: add it, 0 for a single object",
            (a["id"] for a in anns if "iscrowd" not in a),
        )
    known = [
        a
        for a in anns
        if _is_listed(a["image_id"], file.images) and _is_listed(a["category_id"], file.categories)
    ]
    _check_repeated(known, findings)
    objects = [a for a in known if not a.get("iscrowd")]
    if len(known) < file.num_annotations:
        return known  # what is wrong with the others comes first
    if for_training and not objects:
        findings.refuse(
            "no image has an object (crowd regions do not count): nothing to train on"
            + ("" if not anns else f"; {_why(anns, objects)}")
        )
    elif for_evaluation and file.has_annotations and not any(map(_counts, objects)):
        findings.refuse("nothing counts in its evaluation, AP would be nan: " + _why(anns, objects))
    elif objects:
        _check_crowd(known, objects, file.categories, findings)
    return known


def objects_by_class(anns: Iterable[dict], categories: dict[int, str]) -> dict[str, int]:
    """The number of objects, not crowd regions, of each class."""
    found = Counter(a["category_id"] for a in anns if not a.get("iscrowd"))
    return {name: found[i] for i, name in categories.items()}


def _check_links(file: CocoFile, findings: Findings) -> None:
    for key, article, ids, table in (
        ("image_id", "an", file.image_ids, "images"),
        ("category_id", "a", file.categories, "categories"),
    ):
        what = key.removesuffix("_id")
        unknown = [a for a in file.annotations if not _is_listed(a[key], ids)]
        of_type = {True: [], False: []}  # whether it is listed in the other type
        for a in unknown:
            of_type[_is_listed(_as_other_type(a[key]), ids)].append(a)
        findings.refuse(
            f"annotations whose '{key}' is text where '{table}' has a number, or a number where it "
            "has text: write both alike",
            (
                f"annotation {a['id']!r} has {a[key]!r}, listed is {_as_other_type(a[key])!r}"
                for a in of_type[True]
            ),
        )
        findings.refuse(
            f"annotations of {article} {what} that is not in '{table}': remove them, or add the "
            f"{what}",
            (f"annotation {a['id']!r} of {what} {a[key]!r}" for a in of_type[False]),
        )


def _is_listed(value: object, ids: Container) -> bool:
    return is_id(value) and value in ids


def _as_other_type(value: object) -> int | str | None:
    """A number as text, text as a number."""
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) <= _LONGEST_ID else None
    return str(value) if type(value) is int else None


def _check_repeated(anns: list[dict], findings: Findings) -> None:
    first: dict[tuple, Any] = {}
    again = []
    for a in anns:
        box = a["bbox"]
        if isinstance(box, list) and are_finite(box):
            what = a["image_id"], a["category_id"], bool(a.get("iscrowd")), *box
            if first.setdefault(what, a["id"]) != a["id"]:
                again.append(f"{first[what]} = {a['id']}")
    findings.warn(
        "annotations repeated (same image, category and box), which evaluation counts as missed: "
        "remove them",
        again,
    )


def _counts(annotation: dict) -> bool:
    """Whether pycocotools counts it; one without a usable area is refused for that."""
    area = annotation.get("area")
    return not are_finite([area]) or 0 <= area <= _LARGEST_AREA


def _why(anns: list[dict], objects: list[dict]) -> str:
    """Why none of the annotations counts."""
    if not anns:
        return "there are no annotations"
    if objects:
        return (
            "no object has an 'area' from 0 to 1e10: write the object's pixel count as its 'area'"
        )
    num_crowd = sum(1 for a in anns if a.get("iscrowd"))
    return (
        f"{num_crowd} of {len(anns)} annotations have iscrowd 1: set iscrowd 0 for single objects"
    )


def _check_crowd(
    known: list[dict], objects: list[dict], categories: dict[int, str], findings: Findings
) -> None:
    """Tools for brush masks write them as RLE, and some set iscrowd for every RLE."""
    what = (
        "crowd regions are left out of training and of AP: set iscrowd 0 where they are single "
        "objects"
    )
    num_crowd = len(known) - len(objects)
    if num_crowd > _CROWD_SHARE * len(known):
        first = [a["id"] for a in known if a.get("iscrowd")]
        findings.warn(
            f"most annotations ({num_crowd} of {len(known)}) have iscrowd 1; {what}", first
        )
        return
    crowd = Counter(a["category_id"] for a in known if a.get("iscrowd"))
    with_objects = {a["category_id"] for a in objects}
    findings.warn(
        f"categories all of whose annotations have iscrowd 1; {what}",
        (f"{categories[i]!r}" for i in crowd if i not in with_objects),
    )
