"""The launcher's command line, the same for every engine."""

from __future__ import annotations

import argparse

from ..engines import ENGINES

_EXAMPLES = """
A config is a file, or the name of one that this package has, such as coco/... and quickstart/...
CONFIG alone in front stands for --config-file CONFIG in "cbn-det train"; tools/train_net.py is the
same command in a clone that is not installed.

examples

  The built-in digits set, on the CPU, a few minutes; with another norm in the box head:
    cbn-det train quickstart/faster_rcnn_R_18_FPN_digits_cbn OUTPUT_DIR out/cbn \\
        MODEL.FPN.NORM "CBN(window=8)" MODEL.ROI_BOX_HEAD.NORM GN

  BatchNorm, and fixed statistics of many images from 80 % of the schedule on (one or two images
  a GPU; any norm that folds takes freeze):
    cbn-det train quickstart/faster_rcnn_R_18_FPN_digits_cbn OUTPUT_DIR out/frozen \\
        MODEL.RESNETS.NORM "BN(freeze=0.8)" MODEL.FPN.NORM "BN(freeze=0.8)" \\
        MODEL.ROI_BOX_HEAD.NORM "BN(freeze=0.8)"

  Your own images, with annotations in COCO format (also wants MODEL.ROI_HEADS.NUM_CLASSES):
    cbn-det train my.yaml \\
        --coco-dataset shapes_train shapes/train.json shapes/images \\
        --coco-dataset shapes_val shapes/val.json shapes/images \\
        DATASETS.TRAIN "('shapes_train',)" DATASETS.TEST "('shapes_val',)"

  COCO 2017 on 8 GPUs with one image each; learning rate and schedule follow the number of GPUs:
    cbn-det train coco/mask_rcnn_R_50_FPN_1x/cbn_1img --num-gpus 8

  Go on after Ctrl-C or a crash; evaluate a checkpoint:
    cbn-det train my.yaml --resume OUTPUT_DIR out/cbn
    cbn-det train my.yaml --eval-only OUTPUT_DIR out/cbn MODEL.WEIGHTS out/cbn/model_final.pth

exit codes
  0 finished   1 crashed, or TEST.EXPECTED_RESULTS missed   2 refused: command line, config or data
  3 diverged (a loss, weight or statistic is not finite)    130 stopped by Ctrl-C or SIGTERM
  The run folder's result.json says the same in words. torchrun itself returns 1 for all but 0.
"""


def add_datasets(parser: argparse.ArgumentParser, help: str | None = None) -> None:
    """Gives a parser ``--coco-dataset NAME ANNOTATIONS IMAGES``, which may be repeated."""
    parser.add_argument(
        "--coco-dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS", "IMAGES"),
        help=help,
    )


def share_of_images(text: str) -> float | str:
    """Parses ``--image-share``: "auto", or a number in [0, 1]."""
    if text == "auto":
        return text
    share = float(text)
    if not 0.0 <= share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: expected auto or a number in [0, 1]")
    return share


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's launcher arguments and a few more."""
    parser = argparse.ArgumentParser(
        description="Trains and evaluates a detector whose norms may be those of cbn_det.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a YAML config, or a LazyConfig (.py)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="detectron2; or standalone: torchvision's Faster and Mask R-CNN from the same config,"
        " one process. auto (the default) is detectron2 where it is installed",
    )
    add_datasets(
        parser,
        help="make a COCO-format data set (annotation file, image folder) known as NAME to"
        " DATASETS.TRAIN and DATASETS.TEST, one of which must name it; may be repeated",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR; starts anew if there is none",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate MODEL.WEIGHTS instead of training; writes to the folder evaluation"
        " in OUTPUT_DIR, logs the AP of each class, worst first, and leaves worst_images.png",
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
        "--image-share",
        type=share_of_images,
        metavar="auto|S",
        help="after the final evaluation, evaluate once more with each test image mixed into the"
        " BatchNorm statistics that normalise it: with weight S in [0, 1], or (auto) with the share"
        " that an image had in training, such as 1/2 for BN at 2 images per GPU. Needs no"
        " training anew; such a model cannot be folded (EvalNorm, arXiv 1904.06031)",
    )
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="gradient accumulation: N mini-batches of SOLVER.IMS_PER_BATCH images for each"
        " optimiser step, which takes the average of their losses. The total batch of SGD is N *"
        " IMS_PER_BATCH, and SOLVER.BASE_LR should fit that (with SOLVER.REFERENCE_WORLD_SIZE it is"
        " scaled as for N times the processes); MAX_ITER and all other periods count optimiser"
        " steps. Norms take their statistics over single mini-batches, and one step is"
        " one iteration of their memory (default: 1)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a config key that names a norm of which the model then has no layer, which"
        " else is a warning (the standalone engine always refuses it)",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, each with SOLVER.IMS_PER_BATCH / N images; where a config"
        " sets SOLVER.REFERENCE_WORLD_SIZE, with IMS_PER_BATCH / REFERENCE_WORLD_SIZE and the"
        " schedule scaled. On CPU, or with fewer GPUs than N, they communicate over gloo (default:"
        " 1)",
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
