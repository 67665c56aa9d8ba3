"""Check data before days are spent on training: your own sets, or COCO 2017, disk and weights.

Your own sets are checked as training would check them, and whether images are in both.

COCO 2017: layout, annotations, images and their number, free disk space and pretrained weights.

ROOT is the folder that the environment variable DETECTRON2_DATASETS names, or coco/ in it:

  ROOT/coco/annotations/instances_train2017.json   ROOT/coco/train2017/*.jpg   (118287)
  ROOT/coco/annotations/instances_val2017.json     ROOT/coco/val2017/*.jpg     (5000)

Every annotation and the existence of every image are checked, a sample of the images is decoded
completely. That takes a few minutes and, for train2017, some GB of memory. Each line says ok, note
(nothing has to be done) or PROBLEM (and what to do).

examples:
  python tools/check_coco.py --train train.json images/ --test val.json images/ --masks
  python tools/check_coco.py /data
  python tools/check_coco.py /data --sample 118287       # decode every image
  python tools/check_coco.py /data --output /runs --runs 20   # is there room for 20 runs?
  python tools/check_coco.py /data --offline             # weights must be there already
  python tools/check_coco.py /data/few --subset          # COCO's layout, any number of images

exit codes: 0 ready   1 problems, each on a line   2 wrong arguments   130 stopped by Ctrl-C
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..config_files import CONFIGS
from ..data import default_root
from ..data.coco_folder import COCO_2017, check_disk, check_folder
from ..data.findings import Finding
from ..data.pretrained import pretrained_files
from ..data.sets import check_own_sets
from .check import tell

_TABLES = CONFIGS / "coco"


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
    add("--sample", type=int, default=1000, metavar="N", help="images of each set to decode")
    add("--subset", action="store_true", help="take any number of images")
    add(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="DIR",
        help="where runs will go, for the disk space (default output)",
    )
    add("--runs", type=int, default=1, metavar="N", help="how many runs must fit there (default 1)")
    add(
        "--configs",
        type=Path,
        default=_TABLES,
        metavar="DIR",
        help="configs whose pretrained weights are looked for (default configs/coco)",
    )
    add("--offline", action="store_true", help="a missing weights file is a problem")
    return parser


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    if args.train or args.test:
        train, test = ([tuple(files) for files in sets] for sets in (args.train, args.test))
        yield from check_own_sets(train, test, masks=args.masks, decode=args.sample)
        return
    expected = None if args.subset else COCO_2017
    yield from check_folder(args.root, expected=expected, sample=args.sample)
    yield check_disk(args.output, args.runs)
    configs = [p for p in args.configs.rglob("*.yaml") if p.parent != args.configs / "base"]
    needed = args.configs != _TABLES  # of all the tables not every config is to be run
    for file in pretrained_files(sorted(configs)):
        yield file.check(offline=args.offline, needed=needed)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.sample < 0 or args.runs < 1:
        parser.error("--sample must be 0 or more, --runs 1 or more")
    return tell("check_coco", findings(args))
