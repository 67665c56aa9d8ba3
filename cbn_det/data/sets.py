"""Checks of the data sets that a run's config names, the same for every engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping

from cbn_det.data.coco_check import CocoReport, check_coco
from cbn_det.data.errors import DataError

__all__ = ["check_classes", "check_set", "log_reports", "names_in_use"]

logger = logging.getLogger(__name__)


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
) -> CocoReport:
    """
    :func:`check_coco` of a named set, and whether its masks fit ``INPUT.MASK_FORMAT``.

    Args:
        masks: ``MODEL.MASK_ON``.
        mask_format: ``INPUT.MASK_FORMAT``.

    Raises:
        DataError: the message names the set.
    """
    try:
        report = check_coco(
            annotations,
            images,
            masks=masks,
            for_training=for_training,
            for_evaluation=for_evaluation,
        )
    except DataError as e:
        raise DataError(f"data set '{name}': {e}") from e
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
    first: tuple[str, list[str]] | None = None
    for name, names in classes.items():
        if len(names) != num_classes:
            raise DataError(
                f"{key} is {num_classes}, but data set '{name}' has {len(names)} classes: add "
                f"`{key} {len(names)}` to the command line or the config"
            )
        if first is None:
            first = name, names
        elif names != first[1]:
            index = next(i for i, (a, b) in enumerate(zip(first[1], names, strict=True)) if a != b)
            raise DataError(
                f"data sets '{first[0]}' and '{name}' must have the same classes in the same order "
                f"of ids, but class {index} is '{first[1][index]}' in one and '{names[index]}' "
                "in the other: make the 'categories' of their annotation files equal"
            )


def log_reports(reports: Iterable[CocoReport]) -> None:
    """Logs what was found in each set, and its warnings."""
    for report in reports:
        logger.info(str(report))
        for warning in report.warnings:
            logger.warning(warning)
