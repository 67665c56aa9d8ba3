"""Checks data sets in COCO format as a training would, without starting one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from cbn_det.data.coco_check import CocoReport, check_coco
from cbn_det.data.coco_folder import NOTE, OK, PROBLEM, Finding, Progress, check_overlap
from cbn_det.data.errors import DataError
from cbn_det.data.sets import check_same_classes, without_training_object

__all__ = ["check_own_sets"]

Files = tuple[Path, Path]  # annotation file and image folder


def check_own_sets(
    train: Sequence[Files],
    test: Sequence[Files],
    *,
    masks: bool,
    decode: int,
    progress: Progress,
) -> Iterator[Finding]:
    """
    Checks each set, whether their classes are the same, and whether images are in both.

    Args:
        train, test: the sets of ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        masks: of :func:`~cbn_det.data.check_coco`, like ``decode``.
        progress: called with what is being done, and with how many images of how many.
    """
    reports: dict[Files, CocoReport] = {}
    sets = list(dict.fromkeys((*train, *test)))
    for files in sets:
        annotations, images = files
        progress(f"checking {annotations}")
        try:
            report = reports[files] = check_coco(
                annotations,
                images,
                masks=masks,
                for_training=files in train,
                for_evaluation=files in test,
                decode=decode,
                progress=partial(progress, f"checking the images of {annotations}"),
            )
        except DataError as error:
            for line in str(error).splitlines():
                yield Finding(PROBLEM, line)
            continue
        for warning in report.warnings:
            yield Finding(NOTE, warning)
        yield Finding(OK, f"{report}, {report.num_images_decoded} images decoded")
    if len(reports) < len(sets):
        return  # what follows compares all of them
    unused = without_training_object([reports[files] for files in train])
    if unused:
        yield Finding(NOTE, unused)
    yield from _check_classes(reports, masks)
    if train and test:
        groups = {"train": train, "test": test}
        yield check_overlap(
            {
                name: [files[1] / f for files in group for f in reports[files].file_names]
                for name, group in groups.items()
            },
            progress,
        )


def _check_classes(reports: dict[Files, CocoReport], masks: bool) -> Iterator[Finding]:
    classes = {str(annotations): r.class_names for (annotations, _), r in reports.items()}
    try:
        check_same_classes(classes)
    except DataError as error:
        yield Finding(PROBLEM, str(error))
        return
    needed = f"MODEL.ROI_HEADS.NUM_CLASSES {len(next(iter(classes.values())))}"
    if masks:
        rle = any(report.has_rle_masks for report in reports.values())
        needed += f" MODEL.MASK_ON True INPUT.MASK_FORMAT {'bitmask' if rle else 'polygon'}"
    yield Finding(OK, f"the config needs: {needed}")
