"""Compare normalisation layers on one detector, one data set and one recipe.

Every combination of norm, split and seed is trained as a process of its own and evaluated; a table
shows mean and spread over seeds, and report.html beside it curves and pictures as well. A run that
crashes or diverges is counted in its row and stops nothing. Started again with the same arguments,
finished runs are kept and broken-off ones go on at their last checkpoint.

examples:
  # what the quick start does: GN, BN and CBN at 2 images per GPU, from scratch, on CPU
  python tools/compare_norms.py --norms GN BN CBN --iters 600 --jobs 2

  # options of a norm are part of its name (quote it for the shell)
  python tools/compare_norms.py --norms BN "CBN(window=4)" "CBN(window=8)" --seeds 1 2 3

  # the papers' setting: a backbone trained once with BN at 8 images, then frozen BN in it and the
  # compared norm in FPN and heads
  python tools/compare_norms.py --recipe finetune --norms GN BN CBN

  # a claim about batch size: the total SGD batch stays 8, only ranks x images per rank varies (gloo
  # processes on CPU). The table then says what share of the small-batch loss a norm recovers.
  python tools/compare_norms.py --split 8x1 4x2 --bn-reference --norms BN CBN GN --iters 600 \\
      --opts SOLVER.BASE_LR 0.04

  # your own COCO-format data and config
  python tools/compare_norms.py --config-file my.yaml --norms GN CBN \\
      --coco-dataset cells_train train.json images/ --coco-dataset cells_val val.json images/

  # your own data with the quick start's small detector, evaluated every 200 iterations on the way
  python tools/compare_norms.py --norms GN CBN \\
      --coco-dataset cells_train train.json images/ --coco-dataset cells_val val.json images/ \\
      --opts DATASETS.TRAIN "('cells_train',)" DATASETS.TEST "('cells_val',)" \\
      MODEL.ROI_HEADS.NUM_CLASSES 3 TEST.EVAL_PERIOD 200
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cbn_det.engines import ENGINES  # noqa: E402
from cbn_det.study.compare import compare, guarded  # noqa: E402
from cbn_det.study.engine import resolve_engine  # noqa: E402
from cbn_det.study.plan import Plan, Split  # noqa: E402
from cbn_det.study.recipes import RECIPES  # noqa: E402


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--norms",
        nargs="+",
        default=["GN", "BN", "CBN"],
        metavar="NORM",
        help="as in a config's NORM",
    )
    splits = parser.add_mutually_exclusive_group()
    splits.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=[2],
        metavar="N",
        help="images per GPU on one rank (default 2). The learning rate stays the config's: rows "
        "of different total batch are put in tables of their own",
    )
    splits.add_argument(
        "--split",
        nargs="+",
        type=Split.parse,
        metavar="RxI",
        help="ranks x images per rank, e.g. 1x8 4x2 8x1: one total batch, split differently",
    )
    add(
        "--bn-reference",
        action="store_true",
        help="one more row: BN with the same total batch on one rank (1x8 for a split of 8x1), "
        "whose statistics are SyncBN's and which stands in for it in the share recovered",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[1],
        metavar="S",
        help="one run per seed (default 1)",
    )
    add("--recipe", choices=sorted(RECIPES), default="scratch", help="default scratch")
    add(
        "--config-file",
        type=Path,
        help="base config in place of the recipe's; its NORM keys are overridden",
    )
    add(
        "--iters",
        type=int,
        help="length of a run; steps and warm-up are scaled (default: the config's)",
    )
    add(
        "--precise-bn-iters",
        type=int,
        default=50,
        help="iterations of PreciseBN after training (0: none)",
    )
    add(
        "--coco-dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS", "IMAGES"),
    )
    add(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what trains: detectron2, or torchvision's parts where there is none (default auto)",
    )
    cores = os.cpu_count() or 1
    add(
        "--jobs", type=int, default=cores, help=f"ranks side by side (default: cores, here {cores})"
    )
    add("--output", type=Path, default=Path("output/compare"), help="default output/compare")
    add("--dry-run", action="store_true", help="print the commands and stop")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config overrides for every run")
    return parser


def run(args: argparse.Namespace) -> int:
    plan = Plan(
        output=args.output,
        norms=args.norms,
        splits=args.split or [Split(1, images) for images in args.images],
        seeds=args.seeds,
        reference=args.bn_reference,
        engine=resolve_engine(args.engine),
        recipe=args.recipe,
        config=args.config_file,
        iterations=args.iters,
        precise_bn=args.precise_bn_iters,
        datasets=args.coco_dataset,
        overrides=args.opts,
    )
    return compare(plan, jobs=args.jobs, dry_run=args.dry_run)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if len(args.opts) % 2:
        parser.error(f"--opts takes KEY VALUE pairs, got {len(args.opts)} words")
    return guarded("compare_norms", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
