"""Check data before days are spent on training: your own sets, or COCO 2017.

Sets are checked as training would check them, and whether images are in both. ROOT is the folder
that the environment variable DETECTRON2_DATASETS names, or coco/ in it:

  ROOT/coco/annotations/instances_train2017.json   ROOT/coco/train2017/*.jpg
  ROOT/coco/annotations/instances_val2017.json     ROOT/coco/val2017/*.jpg

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
from pathlib import Path

from ..data import default_root
from ..data.sets import Files, check_own_sets
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


def coco_2017(root: Path) -> tuple[list[Files], list[Files]]:
    """The sets to train on and to test on below a folder."""
    coco = root if (root / "annotations").is_dir() else root / "coco"
    train, test = (
        [(coco / "annotations" / f"instances_{split}.json", coco / split)]
        for split in ("train2017", "val2017")
    )
    return train, test


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    if args.train or args.test:
        train, test = ([tuple(files) for files in sets] for sets in (args.train, args.test))
        return tell("check_coco", check_own_sets(train, test, masks=args.masks))
    return tell("check_coco", check_own_sets(*coco_2017(args.root), masks=True))
