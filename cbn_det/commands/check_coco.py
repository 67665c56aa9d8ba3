"""Check data before days are spent on training: your own sets, or COCO 2017.

Your own sets are checked as training would check them, and whether images are in both.

COCO 2017: layout, annotations, images and their number. ROOT is the folder that the environment
variable DETECTRON2_DATASETS names, or coco/ in it:

  ROOT/coco/annotations/instances_train2017.json   ROOT/coco/train2017/*.jpg   (118287)
  ROOT/coco/annotations/instances_val2017.json     ROOT/coco/val2017/*.jpg     (5000)

Every annotation and the existence of every image are checked, 5000 images of each set are decoded
completely. That takes a few minutes and, for train2017, some GB of memory. Each line says ok, note
(nothing has to be done) or PROBLEM (and what to do). "cbn-det check" says the rest: weights,
memory, disk.

examples:
  python tools/check_coco.py --train train.json images/ --test val.json images/ --masks
  python tools/check_coco.py /data

exit codes: 0 ready   1 problems, each on a line   2 wrong arguments   130 stopped by Ctrl-C
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..data import default_root
from ..data.coco_folder import check_folder
from ..data.findings import Finding
from ..data.sets import check_own_sets
from .check import tell


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    root = default_root()
    add("root", nargs="?", type=Path, default=root, metavar="ROOT", help=f"default: {root}")
    for split in ("train", "test"):
        add(
            f"--{split}",
            nargs=2,
            type=Path,
            action="append",
            default=[],
            metavar=("ANNOTATIONS", "IMAGES"),
            help=f"check this set for DATASETS.{split.upper()} instead of ROOT; may be repeated",
        )
    add("--masks", action="store_true", help="of --train and --test, for MODEL.MASK_ON")
    return parser


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    if not (args.train or args.test):
        return check_folder(args.root)
    train, test = ([tuple(files) for files in sets] for sets in (args.train, args.test))
    return check_own_sets(train, test, masks=args.masks)


def main(arguments: list[str] | None = None) -> int:
    return tell("check_coco", findings(make_parser().parse_args(arguments)))
