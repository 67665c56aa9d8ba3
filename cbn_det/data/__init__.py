"""Data: the built-in digits detection set, and checks of COCO-format sets before training."""

from .coco_check import CocoReport, check_coco
from .digits import DIGITS_NAMES, default_root, digits_paths, write_digits
from .findings import DataError
from .sets import check_classes, check_set, log_reports, names_in_use

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
