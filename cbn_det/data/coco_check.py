"""Checks a COCO-format detection set before hours of training are spent on it.

What COCO's own tools and detectron2 handle is counted or warned about: gaps in the category ids,
images without an object, crowd regions, boxes partly outside the image or without area. What would
stop or silently spoil a run is refused, with the file, the id and the fix.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import ExifTags, Image

from cbn_det.data.errors import DataError

__all__ = ["BROKEN_IMAGE", "CocoReport", "check_coco"]

# What Pillow raises for a file that it cannot read or decode.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# Annotation tools round: a box that leaves the image by less than this is not worth a warning.
OUTSIDE_TOLERANCE = 1.0


@dataclass(frozen=True)
class CocoReport:
    """What a set contains. ``categories`` maps COCO's ids, sorted, to names."""

    annotations: Path
    images: Path
    num_images: int
    num_images_without_objects: int
    num_images_decoded: int
    num_annotations: int
    num_crowd: int
    categories: dict[int, str]
    has_rle_masks: bool
    warnings: tuple[str, ...]
    image_ids: frozenset = field(default=frozenset(), repr=False)

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the contiguous class indices that a model predicts."""
        return list(self.categories.values())

    def __str__(self) -> str:
        return (
            f"{self.annotations}: {self.num_images} images "
            f"({self.num_images_without_objects} without an object), "
            f"{self.num_annotations} annotations ({self.num_crowd} crowd), "
            f"{len(self.categories)} classes"
        )


def check_coco(
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    *,
    masks: bool = False,
    for_training: bool = True,
    for_evaluation: bool = True,
    decode: int = 5000,
    progress: Callable[[int, int], None] | None = None,
) -> CocoReport:
    """
    Checks an annotation file and the images it names.

    Args:
        annotations: JSON file in COCO's instance format.
        images: folder that the ``file_name`` of each image is relative to.
        masks: whether masks are trained (``MODEL.MASK_ON``): each object must then have one.
        for_training: a set without any object is refused.
        for_evaluation: ``area`` and ``iscrowd``, which pycocotools reads, must be there.
        decode: at most this many images are read and decoded completely (evenly spaced over the
            set where it has more). That each file exists is checked for all.
        progress: called with the number of images decoded so far and to decode.

    Returns:
        the counts, and warnings about what is handled but worth knowing.

    Raises:
        DataError: all the problems found, one a line.
    """
    annotations, images = Path(annotations), Path(images)
    findings = _Findings()
    data = _read_json(annotations)
    records, anns, categories = _check_structure(annotations, data, findings, for_training)
    if not images.is_dir():
        raise DataError(f"image folder '{images}' does not exist; {annotations} needs it")
    known = _check_annotations(anns, records, categories, findings, for_evaluation)
    _check_boxes(known, records, findings)
    has_rle_masks = _check_masks(known, records, findings, masks, for_evaluation)
    usable = Counter(a["image_id"] for a in known if not a.get("iscrowd"))
    if for_training and not usable:
        findings.refuse("no image has an object (crowd regions do not count): nothing to train on")
    num_decoded = _check_images(images, records, findings, decode, progress)
    if findings.refused:
        raise DataError("\n".join(f"{annotations}: {line}" for line in findings.refused))
    return CocoReport(
        annotations=annotations,
        images=images,
        num_images=len(records),
        num_images_without_objects=len(records) - len(usable),
        num_images_decoded=num_decoded,
        num_annotations=len(anns),
        num_crowd=sum(1 for a in known if a.get("iscrowd")),
        categories=categories,
        has_rle_masks=has_rle_masks,
        warnings=tuple(f"{annotations}: {line}" for line in findings.warned),
        image_ids=frozenset(records),
    )


class _Findings:
    def __init__(self) -> None:
        self.refused: list[str] = []
        self.warned: list[str] = []

    def refuse(self, line: str, ids: Iterable | None = None) -> None:
        self._add(self.refused, line, ids)

    def warn(self, line: str, ids: Iterable | None = None) -> None:
        self._add(self.warned, line, ids)

    @staticmethod
    def _add(lines: list[str], line: str, ids: Iterable | None) -> None:
        """With ``ids``, ``line`` is about each of them and is left out if there are none."""
        if ids is None:
            lines.append(line)
            return
        ids = list(ids)
        if ids:
            lines.append(f"{line} ({len(ids)} in all, first: {', '.join(map(str, ids[:3]))})")


def _read_json(path: Path) -> object:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise DataError(f"annotation file '{path}' does not exist: check the path") from None
    except OSError as e:
        raise DataError(f"annotation file '{path}' cannot be read: {e}") from e
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(
            f"annotation file '{path}' is not valid JSON ({e}): it may be cut off, copy or "
            "export it again"
        ) from e


def _check_structure(
    path: Path, data: object, findings: _Findings, for_training: bool
) -> tuple[dict, list[dict], dict[int, str]]:
    """Returns image records by id, the annotations, and category names by id, sorted."""
    if not isinstance(data, dict):
        raise DataError(
            f"{path}: not in COCO format, its top level must be an object with the lists 'images', "
            "'annotations' and 'categories'"
        )
    if "annotations" not in data and not for_training:
        # COCO's own test sets have no annotations; detectron2 then only writes predictions.
        findings.warn("it has no 'annotations': predictions are written, but no AP is computed")
        data = {**data, "annotations": []}
    for key, needed in (
        ("images", ("id", "file_name", "height", "width")),
        ("annotations", ("id", "image_id", "category_id", "bbox")),
        ("categories", ("id", "name")),
    ):
        if not isinstance(data.get(key), list) or not all(isinstance(r, dict) for r in data[key]):
            raise DataError(
                f"{path}: not in COCO format, '{key}' must be a list of objects; it is "
                + ("missing" if key not in data else "something else")
            )
        for i, record in enumerate(data[key]):
            missing = [k for k in needed if k not in record]
            if missing:
                raise DataError(
                    f"{path}: entry {i} of '{key}' (id {record.get('id')}) has no "
                    f"{' and no '.join(map(repr, missing))}, which COCO's format requires"
                )
        ids = [r["id"] for r in data[key]]
        repeated = [i for i, n in Counter(filter(_is_id, ids)).items() if n > 1]
        findings.refuse(f"ids repeated in '{key}': give each entry an id of its own", repeated)
        if key == "images":
            findings.refuse(
                "ids in 'images' that are neither numbers nor text: number them",
                [i for i in ids if not _is_id(i)],
            )
        else:
            findings.refuse(
                f"ids in '{key}' that are not integers: number them",
                [i for i in ids if type(i) is not int],
            )
    for key in ("images", "categories"):
        if not data[key]:
            raise DataError(f"{path}: its list '{key}' is empty")
    findings.refuse(
        "images whose 'file_name' is not text: give the file's name below the image folder; ids",
        (r["id"] for r in data["images"] if not isinstance(r["file_name"], str)),
    )
    findings.refuse(
        "images whose 'width' or 'height' is not a positive integer: give the size in pixels",
        (
            f"image {r['id']}: width {r['width']!r}, height {r['height']!r}"
            for r in data["images"]
            if not all(type(r[side]) is int and r[side] > 0 for side in ("width", "height"))
        ),
    )
    if findings.refused:  # what follows looks things up by id
        raise DataError("\n".join(f"{path}: {line}" for line in findings.refused))
    records = {r["id"]: r for r in data["images"]}
    categories = dict(sorted((c["id"], c["name"]) for c in data["categories"]))
    return records, data["annotations"], categories


def _check_annotations(
    anns: list[dict],
    records: dict,
    categories: dict[int, str],
    findings: _Findings,
    for_evaluation: bool,
) -> list[dict]:
    """Returns the annotations whose image and category are known."""
    findings.refuse(
        "annotations of an image that is not in 'images': remove them, or add the image",
        (
            f"annotation {a['id']} of image {a['image_id']}"
            for a in anns
            if not _is_listed(a["image_id"], records)
        ),
    )
    findings.refuse(
        "annotations of a category that is not in 'categories': remove them, or add the category",
        (
            f"annotation {a['id']} of category {a['category_id']}"
            for a in anns
            if not _is_listed(a["category_id"], categories)
        ),
    )
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
            (a["id"] for a in anns if not _is_finite(a.get("area"))),
        )
        findings.refuse(
            "annotations without 'iscrowd', which evaluation needs: add it, 0 for a single object",
            (a["id"] for a in anns if "iscrowd" not in a),
        )
        findings.warn(
            "pycocotools counts a detection matched to annotation id 0 as wrong: number from 1",
            (a["id"] for a in anns if a["id"] == 0),
        )
    return [
        a
        for a in anns
        if _is_listed(a["image_id"], records) and _is_listed(a["category_id"], categories)
    ]


def _is_id(value: object) -> bool:
    """Whether it can be looked up: a list or an object cannot, nor is null an id."""
    return isinstance(value, (int, float, str))


def _is_listed(value: object, ids: Container) -> bool:
    return _is_id(value) and value in ids


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)


def _check_boxes(anns: list[dict], records: dict, findings: _Findings) -> None:
    def malformed(box: object) -> bool:
        return not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)))

    bad = [a["id"] for a in anns if malformed(a["bbox"])]
    findings.refuse("boxes that are not four numbers [x, y, width, height]: annotations", bad)
    if bad or not anns:
        return
    ids = np.array([a["id"] for a in anns])
    box = np.array([a["bbox"] for a in anns], dtype=np.float64)
    size = np.array(
        [(records[a["image_id"]]["width"], records[a["image_id"]]["height"]) for a in anns]
    )
    finite = np.isfinite(box).all(axis=1)
    findings.refuse("boxes that are not finite: remove these annotations", ids[~finite])
    ids, box, size = ids[finite], box[finite], size[finite]
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
    if len(box) and (low + extent).max() <= 1:
        findings.refuse(
            "all boxes lie within the first pixel: their coordinates seem to be fractions of the "
            "image, COCO's format has pixels"
        )


def _check_masks(
    anns: list[dict], records: dict, findings: _Findings, masks: bool, for_evaluation: bool
) -> bool:
    """Returns whether the mask of an object (not of a crowd region) is run-length encoded."""
    missing, no_polygon, few_points, wrong_type, bad_rle, wrong_size = ([] for _ in range(6))
    has_rle = False
    for a in anns:
        segm, crowd = a.get("segmentation"), a.get("iscrowd", 0)
        if not segm:
            if not crowd or for_evaluation:  # COCOeval looks at the mask of each annotation
                missing.append(a["id"])
        elif isinstance(segm, list):
            if not all(isinstance(p, list) and all(map(_is_finite, p)) for p in segm):
                wrong_type.append(a["id"])
                continue
            valid = [p for p in segm if len(p) >= 6 and len(p) % 2 == 0]
            # pycocotools takes a first polygon of 4 numbers for a box and fails in evaluation.
            if not valid or (masks and for_evaluation and len(segm[0]) == 4):
                no_polygon.append(a["id"])
            elif len(valid) < len(segm):
                few_points.append(a["id"])
        elif isinstance(segm, dict) and "counts" in segm and "size" in segm:
            has_rle |= not crowd
            record = records[a["image_id"]]
            if not _is_size(segm["size"], [record["height"], record["width"]]):
                wrong_size.append(a["id"])
            elif not _is_valid_rle(segm):
                bad_rle.append(a["id"])
        else:
            wrong_type.append(a["id"])
    findings.refuse(
        "'segmentation' must be a list of polygons [x1, y1, x2, y2, ...] of finite numbers, or an "
        "RLE with 'size' and 'counts'; annotations",
        wrong_type,
    )
    findings.refuse(
        "masks (RLE) of another size than their image: 'size' must be [height, width]; annotations",
        wrong_size,
    )
    findings.refuse("masks (RLE) whose runs do not fill their image: annotations", bad_rle)
    findings.warn(
        "polygons with fewer than 3 points or an odd number of coordinates, left out beside valid "
        "ones; annotations",
        few_points,
    )
    if masks:
        findings.refuse(
            "annotations without 'segmentation' while MODEL.MASK_ON is True: add their masks, or "
            "train boxes only with MODEL.MASK_ON False; ids",
            missing,
        )
    findings.refuse(
        "polygons with fewer than 3 points (6 coordinates) or an odd number of coordinates: "
        "correct or remove them; annotations",
        no_polygon,
    )
    return has_rle


def _is_size(value: object, size: list[int]) -> bool:
    """Whether it is the size, in integers: 48.0 is not, for pycocotools."""
    return value == size and all(type(side) is int for side in value)


def _is_valid_rle(segm: dict) -> bool:
    height, width = segm["size"]
    counts = segm["counts"]
    if isinstance(counts, list):
        return all(type(c) is int and c >= 0 for c in counts) and sum(counts) == height * width
    if not isinstance(counts, str):
        return False
    # pycocotools guards its decoder neither against text that ends in the middle of a number nor
    # against runs longer than the image: only ask for figures that it computes from the runs alone.
    digits = [ord(character) - 48 for character in counts]  # of 5 bits, and one for "goes on"
    if not all(0 <= digit < 64 for digit in digits) or (digits and digits[-1] >= 32):
        return False
    x, y, w, h = mask_util.toBbox(segm)
    return mask_util.area(segm) <= height * width and x + w <= width and y + h <= height


def _check_images(
    folder: Path,
    records: dict,
    findings: _Findings,
    decode: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Returns the number of images that were decoded."""
    listed: dict[str, set[str]] = {}
    present, missing = [], []
    for record in records.values():
        parent, name = os.path.split(os.path.join(folder, record["file_name"]))
        if parent not in listed:
            # One listing a folder: a request a file takes minutes on a network disk.
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        (present if name in listed[parent] else missing).append(record)
    findings.refuse(
        f"image files missing below '{folder}': copy them there, or give the folder that "
        "'file_name' is relative to",
        (f"image {r['id']} '{r['file_name']}'" for r in missing),
    )
    if len(present) > decode:
        present = [present[i] for i in np.linspace(0, len(present) - 1, decode).astype(int)]
    broken, wrong_size = [], []
    for done, record in enumerate(present):
        if progress:
            progress(done, len(present))
        label = f"image {record['id']} '{record['file_name']}'"
        try:
            size = _decode(folder / record["file_name"])
        except BROKEN_IMAGE as e:
            broken.append(f"{label}: {e}")
            continue
        if size != (record["width"], record["height"]):
            listed_size = f"{record['width']} x {record['height']}"
            wrong_size.append(f"{label} is {size[0]} x {size[1]}, listed as {listed_size}")
    findings.refuse(
        f"image files below '{folder}' that are cut off or cannot be decoded: copy them again",
        broken,
    )
    findings.refuse(
        "images of another size than listed: correct 'width' and 'height', and the boxes if the "
        "images were resized or rotated",
        wrong_size,
    )
    return len(present)


def _decode(path: Path) -> tuple[int, int]:
    """Decodes all of an image file; returns width and height as shown (EXIF rotation applied)."""
    with Image.open(path) as image:
        width, height = image.size
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        # JPEG: reads the whole stream but computes an eighth of the pixels only.
        image.draft("L", (max(width // 8, 1), max(height // 8, 1)))
        image.load()
    return (height, width) if rotated else (width, height)
