"""Registers data sets with detectron2 and checks them before training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from ..data import (
    DIGITS_NAMES,
    CocoReport,
    DataError,
    check_classes,
    check_set,
    default_root,
    digits_paths,
    log_reports,
    names_in_use,
    write_digits,
)
from ..data.coco_api import class_names
from ..data.image_check import DETECTRON2

# The key that each of detectron2's own detectors reads its number of classes from. The others
# (ProposalNetwork, SemanticSegmentor, PanopticDeepLab, a user's own) are not checked.
NUM_CLASSES_KEY = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}


def register_coco(name: str, annotations: str | os.PathLike, images: str | os.PathLike) -> None:
    """Makes a COCO-format set known under ``name``, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Files are not read. Doing it again with the same files does nothing.

    Args:
        name: the name in the config.
        annotations: JSON file in COCO's instance format.
        images: folder that the ``file_name`` of each image is relative to.

    Raises:
        DataError: ``name`` is registered with other files.
    """
    annotations, images = os.path.abspath(annotations), os.path.abspath(images)
    if name not in DatasetCatalog:
        register_coco_instances(name, {}, annotations, images)
        return
    meta = MetadataCatalog.get(name)
    known = [meta.get("json_file"), meta.get("image_root")]
    if [path and os.path.abspath(path) for path in known] != [annotations, images]:
        raise DataError(
            f"data set '{name}' is already registered with annotations '{known[0]}' and images "
            f"'{known[1]}', not with '{annotations}' and '{images}': choose another name"
        )


def ensure_digits() -> None:
    """Registers ``digits_train`` and ``digits_val``, and writes their files where they are missing.

    Processes of one machine may call it at the same time: one writes, the others wait.

    Raises:
        DataError: the files cannot be written, or scikit-learn is missing.
    """
    _register_digits()
    write_digits()


def _register_digits() -> None:
    for name, paths in digits_paths().items():
        register_coco(name, *paths)


def prepare_datasets(
    cfg: CfgNode, coco_datasets: Iterable[Sequence[str]] = (), *, eval_only: bool = False
) -> dict[str, CocoReport]:
    """Registers the data sets of a run and checks them, before any time is spent on training.

    Every process of the run must call it, since each has a catalogue of its own; one process a
    machine writes and reads the files, and all raise the same error.

    Args:
        coco_datasets: ``(name, annotations, images)`` of each set to register.
        eval_only: no training follows: ``DATASETS.TRAIN`` is not checked.

    Returns:
        the report of each COCO-format set by name, in the process that read it; else empty.

    Raises:
        DataError: a name is unknown, files are missing or broken, or the config does not fit them.
    """
    for name, json_file, image_folder in coco_datasets:
        register_coco(name, json_file, image_folder)
    train, test = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    known = {*DatasetCatalog.list(), *DIGITS_NAMES}
    names = names_in_use(train, test, known, eval_only=eval_only)
    uses_digits = not set(names).isdisjoint(DIGITS_NAMES)
    if uses_digits:
        _register_digits()

    reports: dict[str, CocoReport] = {}
    problem = None
    if comm.get_local_rank() == 0:
        try:
            if uses_digits:
                ensure_digits()
            for name in names:
                if is_coco(name):
                    reports[name] = _check_files(cfg, name, eval_only)
        except DataError as e:
            problem = str(e)
    # Also the barrier behind which the other processes may read the files.
    for found in comm.all_gather(problem):
        if found is not None:
            raise DataError(found)
    log_reports(reports, () if eval_only else train)
    check_num_classes(cfg, eval_only=eval_only)
    return reports


def is_coco(name: str) -> bool:
    """Whether :mod:`cbn_det.data` can read a set's annotations."""
    meta = MetadataCatalog.get(name)
    return meta.get("evaluator_type") in ("coco", "coco_panoptic_seg") and bool(
        meta.get("json_file") and meta.get("image_root")
    )


def _check_files(cfg: CfgNode, name: str, eval_only: bool) -> CocoReport:
    meta = MetadataCatalog.get(name)
    try:
        return check_set(
            cfg, name, meta.json_file, meta.image_root, eval_only=eval_only, reader=DETECTRON2
        )
    except DataError as e:
        raise DataError(f"{e}{_layout_hint(name)}") from e


def _layout_hint(name: str) -> str:
    """Where the missing files of a set that detectron2 itself registers are expected."""
    meta = MetadataCatalog.get(name)
    if os.path.isfile(meta.json_file) and os.path.isdir(meta.image_root):
        return ""
    root = default_root()
    try:
        annotations, images = (Path(p).relative_to(root) for p in (meta.json_file, meta.image_root))
    except ValueError:  # registered by the user, anywhere
        return ""
    return (
        f". Expected are '{annotations}' and the images in '{images}' below the folder that the "
        f"environment variable DETECTRON2_DATASETS names (now '{root}')"
    )


def check_num_classes(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Compares the detector's number of classes with that of each data set in the config.

    Raises:
        DataError: they differ, or training and test sets have different classes.
    """
    key = NUM_CLASSES_KEY.get(cfg.MODEL.META_ARCHITECTURE)
    if key is None:
        return
    names = dict.fromkeys((*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST))
    classes = {name: _class_names(name) for name in names}
    known = {name: found for name, found in classes.items() if found is not None}
    check_classes(key, reduce(getattr, key.split("."), cfg), known)


def _class_names(name: str) -> list[str] | None:
    """The classes of a data set as detectron2 will see them; ``None`` where nothing tells."""
    meta = MetadataCatalog.get(name)
    if meta.get("thing_classes") is not None:
        return list(meta.thing_classes)
    json_file = meta.get("json_file")
    return class_names(json_file) if json_file and os.path.isfile(json_file) else None
