"""Checks a COCO 2017 folder, laid out as detectron2 expects it, before days are spent on it.

Everything here costs minutes and would otherwise be noticed after hours, or never: half an archive
unpacked, train and val exchanged, images in both, a disk that the checkpoints will fill.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from .findings import NOTE, OK, PROBLEM, Finding
from .sets import check_own_sets

#: images of each split, https://cocodataset.org/#download
COCO_2017 = {"train2017": 118287, "val2017": 5000}
NUM_CATEGORIES = 80
# A Mask R-CNN R50-FPN with 4conv1fc head has 47 M parameters: 190 MB of weights, as much momentum,
# and up to 100 MB that CBN in FPN and heads remembers; 18 checkpoints in a 1x schedule.
GB_PER_RUN = 10


def check_folder(
    root: Path, *, expected: Mapping[str, int] | None = COCO_2017, sample: int = 1000
) -> Iterator[Finding]:
    """
    Checks layout, annotations, images and a sample of their pixels; findings as they come.

    Args:
        root: what ``DETECTRON2_DATASETS`` names, or ``coco`` in it.
        expected: images of each split; None takes any number, for a subset in COCO's layout.
        sample: images of each split that are decoded completely, evenly spaced.
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
    reports = yield from check_own_sets([train], [test], masks=True, decode=sample)
    for report in reports:
        wanted = expected[report.images.name] if expected else report.num_images
        if report.num_images != wanted:
            yield Finding(
                PROBLEM,
                f"'{report.annotations}' lists {report.num_images} images, COCO's own {wanted}: "
                "unpack annotations_trainval2017.zip again (--subset takes any number)",
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


def check_disk(output: Path, runs: int = 1) -> Finding:
    """Whether the checkpoints of ``runs`` runs with a 1x schedule fit on the disk of ``output``."""
    free = disk_of(output)[1] / 1e9
    needed = GB_PER_RUN * runs
    text = (
        f"{free:.1f} GB free for '{output}'; a 1x run leaves up to {GB_PER_RUN} GB of checkpoints"
    )
    if free >= needed:
        return Finding(OK, text)
    return Finding(
        PROBLEM,
        f"{text}, {runs} of them {needed} GB: free some space, choose another --output, "
        "or raise SOLVER.CHECKPOINT_PERIOD",
    )


def disk_of(output: Path) -> tuple[Path, int]:
    """The nearest folder to a future one that is there already, and the bytes free for both."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    return place, shutil.disk_usage(place).free
