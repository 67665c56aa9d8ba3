"""Data: the built-in digits detection set, and checks of COCO-format sets before training."""

from cbn_det.data.coco_check import CocoReport, check_coco
from cbn_det.data.digits import DIGITS_NAMES, default_root, digits_paths, write_digits
from cbn_det.data.errors import DataError
from cbn_det.data.sets import check_classes, check_set, log_reports, names_in_use

__all__ = [
    "CocoReport",
    "DIGITS_NAMES",
    "DataError",
    "check_classes",
    "check_coco",
    "check_set",
    "default_root",
    "digits_paths",
    "log_reports",
    "names_in_use",
    "write_digits",
]
