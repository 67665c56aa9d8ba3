"""Compare normalisation layers on one detector, one data set and one recipe.

A matrix of norms x images per GPU x seeds: every combination is trained as a process of its own (or
as a SLURM job) and evaluated. Tables show mean and spread over seeds and the distance to SyncBN and
GN, report.html beside them curves and pictures as well. A run that crashes or diverges is counted
in its row and stops nothing. Started again with the same arguments, finished runs are kept and
interrupted ones resume. Rows of different world size or total batch never
share a table.

examples:
  # what the quick start does: GN, BN and CBN at 2 images per GPU, from scratch, on CPU
  cbn-det compare --norms GN BN CBN --iters 600 --jobs 2

  # COCO: ten norms at 1 and 2 images on each of 8 GPUs, three seeds, norm in FPN and heads;
  # learning rate and schedule follow the images per GPU and the number of GPUs
  cbn-det compare --num-gpus 8 --images-per-gpu 1 2 --seeds 1 2 3 \\
      --config-file "coco/mask_rcnn_R_50_FPN_1x/{norm}_2img.yaml" \\
      --norms none BN SyncBN GN BRN CBN KN GKN MBN BGN

  # the same on a SLURM cluster: a job a run, queued again and continued whenever its time is over
  cbn-det compare --num-gpus 8 --images-per-gpu 1 2 --seeds 1 2 3 \\
      --config-file "coco/mask_rcnn_R_50_FPN_1x/{norm}_2img.yaml" \\
      --norms none BN SyncBN GN BRN CBN KN GKN MBN BGN \\
      --submit slurm --sbatch partition=gpu time=1440 account=vision cpus-per-task=40

  # options of a norm are part of its name (quote it for the shell); a base config of your own, the
  # norm in FPN and box head whatever the config says, two runs side by side on four GPUs
  cbn-det compare --config-file my.yaml --sites fpn box_head \\
      --norms BN "CBN(window=4)" "CBN(window=8)" --num-gpus 2 --gpus 0 1 2 3

  # the papers' setting: a backbone trained once with BN at 8 images, then frozen BN in it and the
  # compared norm in FPN and heads
  cbn-det compare --recipe finetune --norms GN BN CBN

  # a claim about batch size: the total SGD batch stays 8, only ranks x images per rank varies (gloo
  # processes on CPU). The table then says what share of the small-batch loss a norm recovers.
  cbn-det compare --split 8x1 4x2 --bn-reference --norms BN CBN GN --iters 600 \\
      --opts SOLVER.BASE_LR 0.04

  # your own data with the quick start's small detector, evaluated every 200 iterations on the way
  cbn-det compare --norms GN CBN \\
      --coco-dataset cells_train train.json images/ --coco-dataset cells_val val.json images/ \\
      --opts DATASETS.TRAIN "('cells_train',)" DATASETS.TEST "('cells_val',)" \\
      MODEL.ROI_HEADS.NUM_CLASSES 3 TEST.EVAL_PERIOD 200

exit codes
  0 every run finished or diverged   1 a run failed   2 refused: command line or config   130 Ctrl-C
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config_files import find_config
from ..engines import ENGINES, resolve_engine
from ..run.arguments import share_of_images
from ..study.compare import compare, guarded
from ..study.plan import Plan, Split
from ..study.recipes import SITES
from .flags import add_detector, add_places, places, positive


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
        "--images-per-gpu",
        nargs="+",
        type=positive,
        default=[2],
        metavar="N",
        help="images per GPU (default 2). With SOLVER.REFERENCE_WORLD_SIZE in the config, learning "
        "rate and schedule follow; without, they stay the config's",
    )
    splits.add_argument(
        "--split",
        nargs="+",
        type=Split.parse,
        metavar="RxI",
        help="ranks x images per rank, e.g. 1x8 4x2 8x1: one total batch, split differently; in "
        "place of --images-per-gpu, --num-gpus and --num-machines",
    )
    add(
        "--num-gpus",
        type=positive,
        default=1,
        metavar="N",
        help="GPUs of a run, on each of its machines; on CPU: processes (default 1)",
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
    add_detector(
        parser,
        "{norm} in its path stands for the norm's name in small letters: each norm has a config, "
        "which says where the norm goes",
    )
    add(
        "--sites",
        nargs="+",
        choices=list(SITES),
        metavar="SITE",
        help=f"where the norm goes: {', '.join(SITES)} (default: where the config names a norm "
        "that is not frozen; if it names none, the recipe's sites)",
    )
    add(
        "--iters",
        type=positive,
        help="length of a run; steps and warm-up are scaled (default: the config's)",
    )
    add(
        "--precise-bn-iters",
        type=int,
        default=50,
        help="iterations of PreciseBN after training (0: none)",
    )
    add(
        "--image-share",
        type=share_of_images,
        metavar="auto|S",
        help="evaluate each run once more with test images in the statistics that normalise them; "
        "see cbn-det train --help",
    )
    add(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what trains: detectron2, or torchvision's parts where there is none (default auto)",
    )
    add_places(parser)
    add("--output", type=Path, default=Path("output/compare"), help="default output/compare")
    add("--dry-run", action="store_true", help="print the commands and stop")
    return parser


def run(args: argparse.Namespace) -> int:
    ranks = args.num_gpus * args.num_machines
    config = args.config_file and Path(find_config(args.config_file))
    plan = Plan(
        output=args.output,
        norms=args.norms,
        splits=args.split or [Split(ranks, images) for images in args.images_per_gpu],
        seeds=args.seeds,
        reference=args.bn_reference,
        engine=resolve_engine() if args.engine == "auto" else args.engine,
        recipe=args.recipe,
        config=config,
        sites=args.sites,
        iterations=args.iters,
        precise_bn=args.precise_bn_iters,
        datasets=args.coco_dataset,
        overrides=args.opts,
        flags=[] if args.image_share is None else ["--image-share", str(args.image_share)],
        machines=args.num_machines,
    )
    where = places(args, plan.on_gpu, plan.runs())
    if args.dry_run:
        plan.print_commands()
        return 0
    return compare(plan, **where)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.split and args.num_gpus > 1:
        parser.error("--split says how many processes a run has: leave out --num-gpus")
    return guarded("compare", lambda: run(args), watching=args.submit == "slurm")
