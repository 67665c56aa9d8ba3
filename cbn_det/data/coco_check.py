"""Checks a COCO-format detection set before hours of training are spent on it.

What COCO's own tools and detectron2 handle is counted or warned about: gaps in the category ids,
images without an object, crowd regions, boxes partly outside the image or without area. What would
stop or silently spoil a run is refused, with the file, the id and the fix.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .annotation_check import check_annotations
from .coco_file import read_coco
from .findings import DataError, Findings
from .image_check import check_images
from .mask_check import check_masks

_NAMED = 10


@dataclass(frozen=True)
class CocoReport:
    """What a set contains.

    Attributes:
        num_objects: of each class by name, in the order of the contiguous class indices that a
            model predicts; crowd regions do not count.
        file_names: of the images, below ``images``.
    """

    annotations: Path
    images: Path
    num_images: int
    num_images_without_objects: int
    num_images_decoded: int
    num_annotations: int
    num_crowd: int
    num_objects: dict[str, int]
    has_rle_masks: bool
    warnings: tuple[str, ...]
    file_names: tuple[str, ...] = field(default=(), repr=False)

    @property
    def paths(self) -> list[Path]:
        """Of the images."""
        return [self.images / name for name in self.file_names]

    @property
    def class_names(self) -> list[str]:
        return list(self.num_objects)

    @property
    def unused_classes(self) -> list[str]:
        return [name for name, number in self.num_objects.items() if not number]

    def __str__(self) -> str:
        return (
            f"{self.annotations}: {self.num_images} images "
            f"({self.num_images_without_objects} without an object), "
            f"{self.num_annotations} annotations ({self.num_crowd} crowd), "
            f"{len(self.num_objects)} classes"
            + (f"; without an object: {naming(self.unused_classes)}" if self.unused_classes else "")
        )


def naming(names: list[str]) -> str:
    """The first of them, and how many there are."""
    more = ", ..." if len(names) > _NAMED else ""
    return f"{', '.join(map(repr, names[:_NAMED]))}{more} ({len(names)} in all)"


def check_coco(
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    *,
    masks: bool = False,
    for_training: bool = True,
    for_evaluation: bool = True,
    reader: str | None = None,
) -> CocoReport:
    """
    Checks an annotation file and the images it names.

    Args:
        annotations: JSON file in COCO's instance format.
        images: folder that the ``file_name`` of each image is relative to.
        masks: whether masks are trained (``MODEL.MASK_ON``): each object must then have one.
        for_training: a set without any object is refused.
        for_evaluation: ``area`` and ``iscrowd``, which pycocotools reads, must be there, and a set
            in which nothing counts is refused.
        reader: who reads the images in training: "detectron2", "pillow" (the standalone engine), or
            None where that is not known: what only detectron2 reads wrongly is a warning then.

    Returns:
        the counts, and warnings about what is handled but worth knowing.

    Raises:
        DataError: all the problems found, one a line.
    """
    annotations, images = Path(annotations), Path(images)
    findings = Findings()
    file = read_coco(annotations, findings, for_training=for_training)
    anns = check_annotations(
        file, findings, for_training=for_training, for_evaluation=for_evaluation
    )
    has_rle_masks = check_masks(
        anns, file.images, findings, masks=masks, for_evaluation=for_evaluation
    )
    num_decoded = check_images(images, file.images, findings, reader)
    if findings.refused:
        raise DataError("\n".join(f"{annotations}: {line}" for line in findings.refused))
    objects = [a for a in anns if not a.get("iscrowd")]
    of_class = Counter(a["category_id"] for a in objects)
    return CocoReport(
        annotations=annotations,
        images=images,
        num_images=len(file.images),
        num_images_without_objects=len(file.images) - len({a["image_id"] for a in objects}),
        num_images_decoded=num_decoded,
        num_annotations=len(anns),
        num_crowd=len(anns) - len(objects),
        num_objects={name: of_class[i] for i, name in file.categories.items()},
        has_rle_masks=has_rle_masks,
        warnings=tuple(f"{annotations}: {line}" for line in findings.warned),
        file_names=tuple(record["file_name"] for record in file.images.values()),
    )
