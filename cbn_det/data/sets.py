"""Checks of all the data sets of a run, the same for every engine, and without starting one."""

from __future__ import annotations

import filecmp
import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from ..progress import shown
from .coco_check import CocoReport, check_coco, naming
from .findings import NOTE, OK, PROBLEM, DataError, Finding

logger = logging.getLogger(__name__)

Files = tuple[Path, Path]  # annotation file and image folder

_PART = 4096  # bytes from the middle, where pictures of equal headers and borders differ


def names_in_use(
    train: Collection[str], test: Collection[str], known: Collection[str], *, eval_only: bool
) -> list[str]:
    """The names of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` that a run reads, each once; ``known``
    ones stand for files.

    Raises:
        DataError: a name is unknown, or there is nothing to train on.
    """
    names = list(dict.fromkeys((*(() if eval_only else train), *test)))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"unknown data set '{unknown[0]}' in DATASETS. For a set in COCO format add "
            f"`--coco-dataset {unknown[0]} ANNOTATIONS.json IMAGE_FOLDER`. Known are: "
            + ", ".join(sorted(known))
        )
    if not (train or eval_only):
        raise DataError("DATASETS.TRAIN is empty: name a data set to train on")
    return names


def check_set(
    cfg: CfgNode,
    name: str,
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    *,
    eval_only: bool,
    reader: str | None,
) -> CocoReport:
    """:func:`check_coco` of a named set as a run uses it, and whether its masks fit
    ``INPUT.MASK_FORMAT``.

    Raises:
        DataError: the message names the set.
    """
    for_training = not eval_only and name in cfg.DATASETS.TRAIN
    masks = cfg.MODEL.MASK_ON
    try:
        report = check_coco(
            annotations,
            images,
            masks=masks,
            for_training=for_training,
            for_evaluation=name in cfg.DATASETS.TEST,
            reader=reader,
        )
    except DataError as e:
        raise DataError(f"data set '{name}': {e}") from e
    if for_training and masks and report.has_rle_masks and cfg.INPUT.MASK_FORMAT == "polygon":
        raise DataError(
            f"data set '{name}': its masks are run-length encoded, but INPUT.MASK_FORMAT is "
            "'polygon': add `INPUT.MASK_FORMAT bitmask` to the command line or the config"
        )
    return report


def check_classes(key: str, num_classes: int, classes: Mapping[str, list[str]]) -> None:
    """Compares the detector's number of classes, the value of ``key``, with the class names of each
    data set.

    Raises:
        DataError: they differ, or the data sets have different classes.
    """
    check_same_classes(classes)
    for name, names in classes.items():
        if len(names) != num_classes:
            raise DataError(
                f"{key} is {num_classes}, but data set '{name}' has {len(names)} classes: add "
                f"`{key} {len(names)}` to the command line or the config"
            )


def check_same_classes(classes: Mapping[str, list[str]]) -> None:
    """
    Raises:
        DataError: two sets have different classes.
    """
    sets = list(classes.items())
    for pair in zip(sets, sets[1:], strict=False):
        # One of two numbers would fit NUM_CLASSES, so that is not what has to change.
        (fewer, some), (more, all_names) = sorted(pair, key=lambda one: len(one[1]))
        lacking = [name for name in all_names if name not in some]
        if len(some) < len(all_names):
            raise DataError(
                f"data set '{fewer}' has {len(some)} classes, data set '{more}' {len(all_names)}; "
                f"'{fewer}' lacks {', '.join(map(repr, lacking))}: make the 'categories' of their "
                "annotation files equal, also where a class has no object"
            )
        for index, (a, b) in enumerate(zip(some, all_names, strict=True)):
            if a != b:
                raise DataError(
                    f"data sets '{fewer}' and '{more}' must have the same classes in the same "
                    f"order of ids, but class {index} is '{a}' in one and '{b}' in the other: make "
                    "the 'categories' of their annotation files equal"
                )


def log_reports(reports: Mapping[str, CocoReport], train: Collection[str]) -> None:
    """Logs what was found in each set by name, its warnings, and which classes none of the sets
    ``train`` has an object of."""
    for report in reports.values():
        logger.info(str(report))
    for warning in dict.fromkeys(w for report in reports.values() for w in report.warnings):
        logger.warning(warning)  # once for a file that is trained on and evaluated under two names
    if all(name in reports for name in train):
        if unused := without_training_object([reports[name] for name in train]):
            logger.warning(unused)


def without_training_object(train: Sequence[CocoReport]) -> str | None:
    """A line about the classes that none of the training sets, which have the same classes, has an
    object of; None if there are none."""
    names = train[0].class_names if train else []
    unused = [n for n in names if not any(r.num_objects.get(n) for r in train)]
    if not unused:
        return None
    return f"classes without a training object, whose AP will be 0 or nan: {naming(unused)}"


def check_own_sets(
    train: Sequence[Files], test: Sequence[Files], *, masks: bool
) -> Iterator[Finding]:
    """Checks each set of ``DATASETS.TRAIN`` and ``DATASETS.TEST``, whether their classes are the
    same, and whether images are in both."""
    reports: dict[Files, CocoReport] = {}
    sets = list(dict.fromkeys((*train, *test)))
    for files in sets:
        try:
            report = reports[files] = check_coco(
                *files,
                masks=masks,
                for_training=files in train,
                for_evaluation=files in test,
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
        return size, hashlib.sha256(file.read(_PART)).digest()
