"""Checks a COCO 2017 folder, laid out as detectron2 expects it, before days are spent on it: half
an archive unpacked, train and val exchanged, images in both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .findings import NOTE, PROBLEM, Finding
from .sets import check_own_sets

#: images of each split, https://cocodataset.org/#download
COCO_2017 = {"train2017": 118287, "val2017": 5000}
NUM_CATEGORIES = 80


def check_folder(root: Path) -> Iterator[Finding]:
    """
    Checks layout, annotations, images and their number; findings as they come.

    Args:
        root: what ``DETECTRON2_DATASETS`` names, or ``coco`` in it.
    """
    coco = (root if (root / "annotations").is_dir() else root / "coco").absolute()
    now = os.environ.get("DETECTRON2_DATASETS")
    if coco.name != "coco":
        yield Finding(
            PROBLEM,
            f"training looks for a folder of the name coco: ln -s {coco} PLACE/coco and "
            "export DETECTRON2_DATASETS=PLACE",
        )
    elif now is None or Path(now).absolute() != coco.parent:
        yield Finding(
            NOTE, f"training finds this set with: export DETECTRON2_DATASETS={coco.parent}"
        )
    train, test = (
        (coco / "annotations" / f"instances_{split}.json", coco / split) for split in COCO_2017
    )
    reports = yield from check_own_sets([train], [test], masks=True)
    for report in reports:
        expected = COCO_2017[report.images.name]
        if report.num_images != expected:
            yield Finding(
                PROBLEM,
                f"'{report.annotations}' lists {report.num_images} images, COCO's own {expected}: "
                "unpack annotations_trainval2017.zip again, or check a subset with --train and "
                "--test",
            )
        if len(report.class_names) != NUM_CATEGORIES:
            yield Finding(
                PROBLEM,
                f"'{report.annotations}' has {len(report.class_names)} categories, COCO "
                f"{NUM_CATEGORIES}: the configs' NUM_CLASSES would not fit",
            )
    if len(reports) < len(COCO_2017):
        archives = ", ".join(f"{split}.zip" for split in COCO_2017)
        yield Finding(
            NOTE,
            f"what is missing in '{coco}' is in annotations_trainval2017.zip, {archives}: unpack "
            "them there",
        )
