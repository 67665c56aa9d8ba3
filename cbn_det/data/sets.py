"""Checks of the data sets that a run's config names, the same for every engine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from cbn_det.data.coco_check import CocoReport, check_coco, naming
from cbn_det.data.errors import DataError
from cbn_det.data.progress import StatusLine

__all__ = [
    "check_classes",
    "check_same_classes",
    "check_set",
    "log_reports",
    "names_in_use",
    "without_training_object",
]

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 3.0  # a check that takes no longer says what it found, and nothing else


def names_in_use(
    train: Collection[str], test: Collection[str], known: Collection[str], *, eval_only: bool
) -> list[str]:
    """
    The names that a run reads, each once.

    Args:
        train, test: ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        known: the names that stand for files.
        eval_only: no training follows: ``train`` does not count.

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
    name: str,
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    *,
    masks: bool,
    mask_format: str,
    for_training: bool,
    for_evaluation: bool,
    reader: str | None = None,
) -> CocoReport:
    """
    :func:`check_coco` of a named set, and whether its masks fit ``INPUT.MASK_FORMAT``. Shows on
    stderr how far it is when that takes long.

    Args:
        masks: ``MODEL.MASK_ON``.
        mask_format: ``INPUT.MASK_FORMAT``.

    Raises:
        DataError: the message names the set.
    """
    status = StatusLine(sys.stderr, after=_QUIET_SECONDS)
    status.show(f"checking the annotations of data set '{name}'")
    try:
        report = check_coco(
            annotations,
            images,
            masks=masks,
            for_training=for_training,
            for_evaluation=for_evaluation,
            reader=reader,
            progress=partial(status.show, f"checking the images of data set '{name}'"),
        )
    except DataError as e:
        raise DataError(f"data set '{name}': {e}") from e
    finally:
        status.clear()
    if for_training and masks and report.has_rle_masks and mask_format == "polygon":
        raise DataError(
            f"data set '{name}': its masks are run-length encoded, but INPUT.MASK_FORMAT is "
            "'polygon': add `INPUT.MASK_FORMAT bitmask` to the command line or the config"
        )
    return report


def check_classes(key: str, num_classes: int, classes: Mapping[str, list[str]]) -> None:
    """
    Compares the detector's number of classes with that of each data set.

    Args:
        key: the config key that ``num_classes`` is the value of.
        classes: the class names of each data set.

    Raises:
        DataError: they differ, or the data sets have different classes.
    """
    if not classes:
        return
    check_same_classes(classes)
    first, expected = next(iter(classes.items()))
    if len(expected) != num_classes:
        raise DataError(
            f"{key} is {num_classes}, but data set '{first}' has {len(expected)} classes: add "
            f"`{key} {len(expected)}` to the command line or the config"
        )


def check_same_classes(classes: Mapping[str, list[str]]) -> None:
    """
    Compares the class names of data sets, given by name.

    Raises:
        DataError: two sets have different classes.
    """
    (first, expected), *others = classes.items()
    for name, names in others:
        _check_same(first, expected, name, names)


def _check_same(first: str, expected: list[str], name: str, names: list[str]) -> None:
    if len(names) != len(expected):
        # One of them would then fit NUM_CLASSES, so that is not what has to change.
        fewer, more = sorted(((first, expected), (name, names)), key=lambda one: len(one[1]))
        lacking = [text for text in more[1] if text not in fewer[1]]
        raise DataError(
            f"data set '{fewer[0]}' has {len(fewer[1])} classes, data set '{more[0]}' "
            f"{len(more[1])}; '{fewer[0]}' lacks {', '.join(map(repr, lacking))}: make the "
            "'categories' of their annotation files equal, also where a class has no object"
        )
    if names != expected:
        index = next(i for i, (a, b) in enumerate(zip(expected, names, strict=True)) if a != b)
        raise DataError(
            f"data sets '{first}' and '{name}' must have the same classes in the same order "
            f"of ids, but class {index} is '{expected[index]}' in one and '{names[index]}' "
            "in the other: make the 'categories' of their annotation files equal"
        )


def log_reports(reports: Mapping[str, CocoReport], train: Collection[str]) -> None:
    """Logs what was found in each set by name, its warnings, and which classes none of the sets
    ``train`` has an object of."""
    for report in reports.values():
        logger.info(str(report))
    for warning in dict.fromkeys(w for report in reports.values() for w in report.warnings):
        logger.warning(warning)  # once for a file that is trained on and evaluated under two names
    if all(name in reports for name in train):
        unused = without_training_object([reports[name] for name in train])
        if unused:
            logger.warning(unused)


def without_training_object(train: Sequence[CocoReport]) -> str | None:
    """A line about the classes that none of the training sets has an object of; None if there are
    none. The sets have the same classes."""
    if not train:
        return None
    unused = [n for n in train[0].class_names if not any(r.num_objects.get(n) for r in train)]
    return (
        f"classes without a training object, whose AP will be 0 or nan: {naming(unused)}"
        if unused
        else None
    )
