"""The launcher's command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from . import job, run_folder
from .config import ConfigError, build_config, one_line
from .processes import Layout, run_processes, torchrun_layout, under_torchrun

_EXAMPLES = """
examples

  The built-in digits set with Cross-Iteration Batch Normalization, on the CPU, a few minutes:
    python tools/train_net.py \\
        --config-file configs/quickstart/faster_rcnn_R_18_FPN_digits_cbn.yaml OUTPUT_DIR out/cbn

  The same with other options of the norm, and another norm in the box head:
    python tools/train_net.py \\
        --config-file configs/quickstart/faster_rcnn_R_18_FPN_digits_cbn.yaml OUTPUT_DIR out/cbn8 \\
        MODEL.FPN.NORM "CBN(window=8)" MODEL.ROI_BOX_HEAD.NORM GN

  Your own images, with annotations in COCO format (also wants MODEL.ROI_HEADS.NUM_CLASSES):
    python tools/train_net.py --config-file my.yaml \\
        --coco-dataset shapes_train shapes/train.json shapes/images \\
        --coco-dataset shapes_val shapes/val.json shapes/images \\
        DATASETS.TRAIN "('shapes_train',)" DATASETS.TEST "('shapes_val',)"

  Eight images a step as 4 processes of 2 images; without so many GPUs they share one, or the CPU:
    python tools/train_net.py --num-gpus 4 --config-file my.yaml SOLVER.IMS_PER_BATCH 8
    torchrun --nproc-per-node 4 tools/train_net.py --config-file my.yaml SOLVER.IMS_PER_BATCH 8

  Go on after Ctrl-C or a crash; evaluate a checkpoint, also with PreciseBN statistics:
    python tools/train_net.py --config-file my.yaml --resume OUTPUT_DIR out/cbn
    python tools/train_net.py --config-file my.yaml --eval-only --precise-bn-iters 200 \\
        OUTPUT_DIR out/cbn MODEL.WEIGHTS out/cbn/model_final.pth

exit codes
  0 finished   1 crashed, or TEST.EXPECTED_RESULTS missed   2 refused: command line, config or data
  3 diverged (a loss, weight or statistic is not finite)    130 stopped by Ctrl-C or SIGTERM
  The run folder's result.json says the same in words. torchrun itself returns 1 for all but 0.
"""


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's launcher arguments and two more."""
    parser = argparse.ArgumentParser(
        prog="train_net.py",
        description="Trains and evaluates a detectron2 model whose norms may be those of cbn_det.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a YAML config")
    parser.add_argument(
        "--coco-dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS", "IMAGES"),
        help="make a COCO-format data set (annotation file, image folder) known as NAME to"
        " DATASETS.TRAIN and DATASETS.TEST; may be repeated",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR; starts anew if there is none",
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS instead of training"
    )
    parser.add_argument(
        "--precise-bn-iters",
        type=int,
        default=0,
        metavar="N",
        help="after the final evaluation, evaluate once more with BatchNorm statistics recomputed"
        " over N iterations (default: 0, not at all)",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, each with SOLVER.IMS_PER_BATCH / N images; on CPU, or with"
        " fewer GPUs than N, they communicate over gloo (default: 1)",
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="I", help="of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        metavar="URL",
        help="where machines meet, such as tcp://HOST:PORT; needed for several machines only",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config options, after everything else",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the launcher and returns its exit code (see ``--help``); bad arguments exit with 2."""
    args = argument_parser().parse_args(argv)
    words = sys.argv if argv is None else ["train_net.py", *argv]
    args.command = shlex.join(["python", *words])
    try:
        layout = _layout(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return job.USAGE
    try:
        cfg, notes = build_config(args, layout.world_size)
    except ValueError as error:
        if layout.is_first:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return job.USAGE
    try:
        code, death = run_processes(layout, cfg.MODEL.DEVICE, job.run, (cfg, notes, args))
    except KeyboardInterrupt:
        return job.STOPPED
    if death:
        print(f"error: {death}", file=sys.stderr)
        folder = Path(cfg.OUTPUT_DIR)
        if not args.eval_only and run_folder.read_result(folder) is None:
            result = run_folder.describe(cfg, args.command, layout.world_size)
            run_folder.write_result(folder, {**result, "message": death})
    return code


def _layout(args: argparse.Namespace) -> Layout:
    if under_torchrun():
        if args.num_gpus != 1 or args.num_machines != 1 or args.dist_url:
            raise ConfigError(
                "under torchrun, its own options set the processes: leave out --num-gpus,"
                " --num-machines and --dist-url"
            )
        return torchrun_layout()
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines must be 1 or more")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(f"--machine-rank must be 0 to {args.num_machines - 1}")
    if args.num_machines > 1 and not args.dist_url:
        raise ConfigError("--num-machines needs --dist-url tcp://HOST:PORT of machine 0")
    return Layout(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
