"""What a norm costs: seconds and peak memory, as ratios to another norm's, with intervals.

Four kinds of measurement:

  layer      a convolution and its norm at given shapes: forward, backward, optimiser step (a lone
             layer gives KN and GKN nothing to predict from: their cost shows in an iteration)
  norm       norms alone, forward and backward, and the share of the memory's bandwidth that they
             reach: beside a copy, which is the first line (without a convolution there is nothing
             that CBN could compensate by: CBN(compensation='none'))
  iteration  a training iteration of a detector, from a config, on either engine
  inference  its forward pass over a test image; "deployed:NORM" with norms made plain BatchNorm
             first, "folded:NORM" with norms taken into the convolutions (cbn_det.deploy; its peak
             memory is that of the folding)

Each norm has a process of its own, which holds its model and takes turns with the others: a ratio
is the median of paired repetitions, so that a machine that speeds up or slows down does not decide
who is faster. Norms are timed past their burn-in and with full windows, where they do all their
work. The first norm is what the others are compared with. Best on an idle machine; a busy one is
told, makes intervals wide, and is better measured with --clock cpu.

examples:
  # at the four shapes by which the layers are tuned, on CPU
  python tools/benchmark.py layer --norms BN CBN "CBN(positions=None)" GN

  # a shape of your own (input N, C, H, W, output channels, kernel), on a GPU
  python tools/benchmark.py layer --norms BN CBN --shapes 2,256,200,304,256,3 --device cuda

  # a layer of your own or of another project: theirs(in_channels, out_channels, kernel_size) in
  # peers.py returns convolution and norm in one module
  python tools/benchmark.py layer --norms BN CBN peers.py:theirs

  # the share of memory bandwidth that the norms' kernels reach on a GPU
  python tools/benchmark.py norm --norms BN "CBN(compensation='none')" MBN BGN GN --device cuda \\
      --shapes 2,256,200,304

  # one training iteration of the quick start, norm everywhere; MBN with and without its second pass
  python tools/benchmark.py iteration --norms BN CBN GN MBN "MBN(double_forward=False)"

  # the papers' setting: frozen norms in the backbone, norm in FPN and heads
  python tools/benchmark.py iteration --recipe finetune --norms BN CBN MBN

  # Mask R-CNN R50-FPN at 320 px; KEY VALUE pairs go to every norm's config
  python tools/benchmark.py iteration --norms BN CBN MBN --opts MODEL.MASK_ON True \\
      MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.RES2_OUT_CHANNELS 256 \\
      INPUT.MIN_SIZE_TRAIN "(320,)" INPUT.MAX_SIZE_TRAIN 320

  # your own config and data, the norm in the FPN only, on a GPU
  python tools/benchmark.py iteration --norms BN CBN --config-file my.yaml \\
      --norm-keys MODEL.FPN.NORM --device cuda \\
      --coco-dataset cells_train train.json images/ --opts DATASETS.TRAIN "('cells_train',)"

  # what a norm costs a model in use, against frozen BatchNorm
  python tools/benchmark.py inference --norms FrozenBN CBN deployed:CBN folded:CBN GN
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cbn_det.config_files import find_config  # noqa: E402
from cbn_det.engines import ENGINES  # noqa: E402
from cbn_det.run.arguments import add_datasets  # noqa: E402
from cbn_det.study.benchmark import (  # noqa: E402
    MAPS,
    SHAPES,
    Detector,
    Settings,
    Shape,
    benchmark_inference,
    benchmark_iterations,
    benchmark_layers,
    benchmark_norms,
)
from cbn_det.study.compare import guarded  # noqa: E402
from cbn_det.study.recipes import RECIPES  # noqa: E402


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--norms", nargs="+", required=True, metavar="NORM", help="the first is the reference")
    add("--repetitions", type=int, default=30, metavar="N", help="turns of each norm (default 30)")
    add(
        "--seconds",
        type=float,
        default=600.0,
        help="end a shape or config earlier when its turns have taken this long (default 600)",
    )
    add("--warm-up", type=int, default=10, metavar="N", help="steps before (default 10)")
    add(
        "--turn-seconds",
        type=float,
        default=0.2,
        metavar="S",
        help="steps in a turn: as many as take this long with the first norm (default 0.2)",
    )
    add("--threads", type=int, metavar="N", help="of each process (default: torch's)")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the processor time of the process, which other work on the machine disturbs "
        "less; on a GPU only wall makes sense (default wall)",
    )
    add("--output", type=Path, default=Path("output/benchmark"), help="default output/benchmark")
    kinds = parser.add_subparsers(dest="kind", required=True)

    layer = kinds.add_parser("layer", parents=[common], help="a convolution and its norm")
    layer.add_argument(
        "--shapes",
        nargs="+",
        default=SHAPES,
        metavar="N,C,H,W,OUT,KERNEL",
        help="default: " + " ".join(SHAPES),
    )
    norm = kinds.add_parser("norm", parents=[common], help="a norm alone, beside a copy")
    norm.add_argument(
        "--shapes", nargs="+", default=MAPS, metavar="N,C,H,W", help="default: " + " ".join(MAPS)
    )
    for kind in (layer, norm):
        kind.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")

    detector = argparse.ArgumentParser(add_help=False)
    add = detector.add_argument
    add("--recipe", choices=sorted(RECIPES), default="scratch", help="default scratch")
    add("--config-file", type=Path, help="in place of the recipe's")
    add(
        "--norm-keys",
        nargs="+",
        metavar="KEY",
        help="config keys that the norms are written to (default: the recipe's)",
    )
    add("--engine", choices=ENGINES, default="auto", help="default auto")
    add("--device", help="cpu or cuda (default: the config's)")
    add_datasets(detector)
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config overrides")

    both = [common, detector]
    iteration = kinds.add_parser("iteration", parents=both, help="a detector's training iteration")
    iteration.add_argument(
        "--images", type=int, default=2, metavar="N", help="in an iteration (default 2)"
    )
    kinds.add_parser("inference", parents=both, help="a detector's forward pass over a test image")
    return parser


def run(args: argparse.Namespace) -> int:
    settings = Settings(
        norms=args.norms,
        output=args.output,
        repetitions=args.repetitions,
        seconds=args.seconds,
        warm_up=args.warm_up,
        turn_seconds=args.turn_seconds,
        threads=args.threads,
        clock=args.clock,
    )
    if args.kind == "layer":
        return benchmark_layers(settings, [Shape.parse(s) for s in args.shapes], args.device)
    if args.kind == "norm":
        return benchmark_norms(settings, args.shapes, args.device)
    detector = Detector(
        recipe=args.recipe,
        config=args.config_file and Path(find_config(str(args.config_file))),
        norm_keys=args.norm_keys,
        engine=args.engine,
        device=args.device,
        datasets=args.coco_dataset,
        overrides=args.opts,
    )
    if args.kind == "inference":
        return benchmark_inference(settings, detector)
    return benchmark_iterations(settings, detector, args.images)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    return guarded("benchmark", lambda: run(args), "\nStopped; nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
