"""Turns a trained checkpoint into one that stock detectron2 loads, without this package.

  python tools/deploy.py --config-file output/run/config.yaml \\
      --weights output/run/model_final.pth --output deployed

writes deployed/config.yaml, in which norms of ours are "BN", and deployed/model.pth. In evaluation
CBN, KN, MBN, BGN and BRN are BatchNorm, so outputs stay the same; both models are built and
compared on an image before anything is written. Then, with detectron2 alone:

  cfg = get_cfg(); cfg.merge_from_file("deployed/config.yaml"); DefaultPredictor(cfg)

Also FrozenBN loads these weights (except in RetinaNet and FCOS, which keep statistics of each
level): NORM: "FrozenBN" in place of "BN". To fold norms into convolutions, which detectron2's
configs cannot express, call cbn_det.deploy.fold(model) in Python before exporting a model.

Exit codes: 0 written, 1 the two models differ, 2 refused (one line says why).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--config-file", required=True, metavar="YAML", help="the config.yaml of the run")
    add("--weights", required=True, metavar="PTH", help="its checkpoint")
    add("--output", required=True, type=Path, help="a new or empty folder")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides, such as MODEL.DEVICE cpu")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    try:
        from cbn_det.plugin.deploy import deploy_checkpoint

        report = deploy_checkpoint(args.config_file, args.weights, args.output, args.opts)
    except (ValueError, ImportError) as error:  # ConfigError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    print(f"Files: {args.output / 'config.yaml'}, {args.output / 'model.pth'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
