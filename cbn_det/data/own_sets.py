"""Checks data sets in COCO format as a training would, without starting one."""

from __future__ import annotations

import filecmp
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

from .coco_check import CocoReport, check_coco
from .findings import NOTE, OK, PROBLEM, DataError, Finding
from .progress import shown
from .sets import check_same_classes, without_training_object

Files = tuple[Path, Path]  # annotation file and image folder

_PART = 4096  # bytes from the middle, where pictures of equal headers and borders differ


def check_own_sets(
    train: Sequence[Files], test: Sequence[Files], *, masks: bool, decode: int
) -> Generator[Finding, None, list[CocoReport]]:
    """
    Checks each set, whether their classes are the same, and whether images are in both.

    Args:
        train, test: the sets of ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        masks, decode: of :func:`~cbn_det.data.check_coco`.

    Returns:
        the report of each set that can be used.
    """
    reports: dict[Files, CocoReport] = {}
    sets = list(dict.fromkeys((*train, *test)))
    for files in sets:
        try:
            report = reports[files] = check_coco(
                *files,
                masks=masks,
                for_training=files in train,
                for_evaluation=files in test,
                decode=decode,
            )
        except DataError as error:
            for line in str(error).splitlines():
                yield Finding(PROBLEM, line)
            continue
        for warning in report.warnings:
            yield Finding(NOTE, warning)
        yield Finding(OK, f"{report}, {report.num_images_decoded} images decoded")
    if len(reports) < len(sets):
        return list(reports.values())  # what follows compares all of them
    if unused := without_training_object([reports[files] for files in train]):
        yield Finding(NOTE, unused)
    yield _check_classes(reports.values(), masks)
    if train and test:
        yield check_overlap(
            {
                name: [path for files in group for path in reports[files].paths]
                for name, group in (("train", train), ("test", test))
            }
        )
    return list(reports.values())


def _check_classes(reports: Iterable[CocoReport], masks: bool) -> Finding:
    classes = {str(report.annotations): report.class_names for report in reports}
    try:
        check_same_classes(classes)
    except DataError as error:
        return Finding(PROBLEM, str(error))
    needed = f"MODEL.ROI_HEADS.NUM_CLASSES {len(next(iter(classes.values())))}"
    if masks:
        rle = any(report.has_rle_masks for report in reports)
        needed += f" MODEL.MASK_ON True INPUT.MASK_FORMAT {'bitmask' if rle else 'polygon'}"
    return Finding(OK, f"the config needs: {needed}")


def check_overlap(files: dict[str, list[Path]]) -> Finding:
    """Whether two sets, given by name, hold the same images; told by their content, since sets that
    were split or numbered by hand share ids or names and not images, or the other way round."""
    (first, some), (second, others) = files.items()
    both = same_files(some, others)
    if not both:
        return Finding(OK, f"no image is in both {first} and {second}")
    pairs = [a.name if a.name == b.name else f"{a.name} = {b.name}" for a, b in both]
    return Finding(
        PROBLEM,
        f"{len(both)} images are in both {first} and {second} ({', '.join(pairs[:3])}"
        f"{', ...' if len(pairs) > 3 else ''}): AP would be measured on training images; remove "
        "them from one of the two annotation files",
    )


def same_files(first: Sequence[Path], second: Sequence[Path]) -> list[tuple[Path, Path]]:
    """
    Pairs of files with the same content, one of each set, in the order of ``second``.

    Of files of equal size a part is read, and all of those in which that part is equal. Of two
    large sets of JPEG files that is a few in a hundred.
    """
    sizes = {path.stat().st_size for path in second}
    candidates: dict[tuple[int, bytes], list[Path]] = defaultdict(list)
    for path in shown(first, "comparing images"):
        if path.stat().st_size in sizes:
            candidates[_size_and_middle(path)].append(path)
    found = []
    for path in shown(second, "comparing images"):
        for other in candidates.get(_size_and_middle(path), ()):
            if filecmp.cmp(other, path, shallow=False):
                found.append((other, path))
                break
    return found


def _size_and_middle(path: Path) -> tuple[int, bytes]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, (size - _PART) // 2))
        return size, file.read(_PART)
