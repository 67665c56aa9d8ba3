"""How far is each norm's estimate of mean and variance from the truth, while a detector trains?

For each number of images per GPU one detector is trained; beside each of its BatchNorms stand
layers of all the norms, which see the same inputs and weights and change nothing. At a few moments
of training their estimates are compared with mean and variance over 200 images with the same
weights, layer by layer. The result is a table, a plot and a file of all numbers. Started again with
the same arguments, finished runs are kept and broken-off ones go on at their last checkpoint.

examples:
  # all norms at 1, 2 and 4 images per GPU, from scratch, on the built-in digits
  python tools/statistics_error.py --iters 600

  # the papers' setting: a trained backbone with frozen BN, the norms in FPN and heads
  python tools/statistics_error.py --recipe finetune --iters 600 --output output/statistics_finetune

  # what CBN's window and burn-in do (options are part of a norm's name; quote it for the shell)
  python tools/statistics_error.py --iters 600 --images 2 --seeds 1 2 3 \\
      --norms "CBN(burn_in=0, window=2)" "CBN(burn_in=0, window=4)" "CBN(burn_in=0, window=8)"

  # on the way of a network that is trained with CBN itself
  python tools/statistics_error.py --iters 600 --trained-with "CBN(burn_in=0)" \\
      --norms "CBN(burn_in=0)" "MBN(burn_in=0)"

  # what CBN's averaged derivative costs: distance from the paper's rule
  python tools/statistics_error.py --iters 600 --images 2 \\
      --reference "CBN(burn_in=0, positions=None)" --norms "CBN(burn_in=0, positions=16)" \\
      "CBN(burn_in=0, positions=64)" "CBN(burn_in=0, positions=256)"
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cbn_det.config_files import find_config  # noqa: E402
from cbn_det.engines import ENGINES  # noqa: E402
from cbn_det.run.arguments import add_datasets  # noqa: E402
from cbn_det.study.compare import guarded  # noqa: E402
from cbn_det.study.engine import resolve_engine  # noqa: E402
from cbn_det.study.gpus import visible_gpus  # noqa: E402
from cbn_det.study.recipes import RECIPES  # noqa: E402
from cbn_det.study.statistics_error import NORMS, Experiment, measure  # noqa: E402


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--norms",
        nargs="+",
        default=NORMS,
        metavar="NORM",
        help=f"whose statistics to measure, BN in any case (default {' '.join(NORMS)})",
    )
    add(
        "--images",
        nargs="+",
        type=int,
        default=[1, 2, 4],
        metavar="N",
        help="images per GPU, one run each (default 1 2 4)",
    )
    add("--seeds", nargs="+", type=int, default=[1], metavar="S", help="default 1")
    add(
        "--trained-with",
        default="BN",
        metavar="NORM",
        help="the norm that the detectors are trained with (default BN)",
    )
    add(
        "--truth-images",
        type=int,
        default=200,
        metavar="N",
        help="training images that the truth is taken from (default 200)",
    )
    add(
        "--reference",
        metavar="NORM",
        help="also compare the norms with this one, mini-batch by mini-batch: for options that"
        " approximate it",
    )
    add("--recipe", choices=sorted(RECIPES), default="scratch", help="default scratch")
    add("--config-file", type=Path, help="base config in place of the recipe's")
    add("--iters", type=int, help="length of a run (default: the config's SOLVER.MAX_ITER)")
    add_datasets(parser)
    add("--engine", choices=ENGINES, default="auto", help="default auto")
    cores = os.cpu_count() or 1
    add(
        "--jobs",
        type=int,
        metavar="N",
        help=f"runs side by side (default: as many as GPUs, on CPU as cores: {cores})",
    )
    add("--output", type=Path, default=Path("output/statistics"), help="default output/statistics")
    add("--dry-run", action="store_true", help="print the commands and stop")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config overrides for every run")
    return parser


def run(args: argparse.Namespace) -> int:
    experiment = Experiment(
        output=args.output,
        norms=args.norms,
        images=args.images,
        seeds=args.seeds,
        engine=resolve_engine(args.engine),
        trained_with=args.trained_with,
        truth_images=args.truth_images,
        reference=args.reference,
        iterations=args.iters,
        recipe=args.recipe,
        config=args.config_file and Path(find_config(str(args.config_file))),
        datasets=args.coco_dataset,
        overrides=args.opts,
    )
    gpus = visible_gpus() if experiment.plan().on_gpu else []
    jobs = args.jobs or len(gpus) or os.cpu_count() or 1
    return measure(experiment, jobs, args.dry_run, gpus)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if len(args.opts) % 2:
        parser.error(f"--opts takes KEY VALUE pairs, got {len(args.opts)} words")
    return guarded("statistics_error", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
