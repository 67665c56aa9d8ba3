"""Trains BatchNorm, with or without freeze, as several ranks would, in one process.

Ranks of one or two images leave most of a CPU's time to their processes. Here the batch of all of
them is one, and each BatchNorm layer takes the statistics of each rank's images apart. The images
of an iteration are those that as many processes would take, and the gradient is the mean of
theirs, as DistributedDataParallel makes it. Running statistics are not gathered: evaluation is with
those that ``freeze`` fixed or, without it, with those of PreciseBN. Needs detectron2.

examples:
  # docs/results/freeze.csv
  python benchmarks/emulated_ranks.py --split 8x1 4x2 --seeds 1 2 --bfloat16 --out freeze.csv

  # another time to freeze, and BatchNorm to the end
  python benchmarks/emulated_ranks.py --split 8x1 --norms "BN(freeze=0.67)" BN
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clone  # noqa: F401
import torch
import torch.nn.functional as F
from detectron2.utils.env import seed_all_rng
from publishing import Row, publish
from torch import Tensor, nn

from cbn_det.commands.flags import add_opts, positive
from cbn_det.config_files import find_config
from cbn_det.norm_keys import NORM_KEYS
from cbn_det.plugin.config import read_config
from cbn_det.plugin.datasets import prepare_datasets
from cbn_det.plugin.registry import register
from cbn_det.plugin.trainer import Trainer
from cbn_det.run.measure import machine
from cbn_det.study.plan import Split

CONFIG = "quickstart/Base-RCNN-R18-FPN-digits"
#: images, of all ranks, that statistics are computed over
RECOMPUTED_OVER = 200
#: of the 600 iterations of the batch-size comparison
ITERATIONS, RATE, WARMUP = 600, 0.04, 1 / 12


class OfRanks:
    """Gives the BatchNorms of a detector, in training mode, the statistics of each rank's images.

    Args:
        model: detectron2's Faster R-CNN.
        ranks: that the images of a batch are of, in order, as many of each.
    """

    def __init__(self, model: nn.Module, ranks: int) -> None:
        self._ranks = ranks
        self._rois: list[int] = []  # of each image
        sample = model.roi_heads.label_and_sample_proposals

        def counted(*args: Any, **kwargs: Any) -> Any:
            proposals = sample(*args, **kwargs)
            self._rois = [len(of_image) for of_image in proposals]
            return proposals

        model.roi_heads.label_and_sample_proposals = counted
        for name, layer in model.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                of_rois = name.startswith("roi_heads")
                layer.forward = types.MethodType(self._forward(layer.forward, of_rois), layer)

    def _forward(self, of_one: Any, of_rois: bool) -> Any:
        def forward(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
            if not layer.training:
                return of_one(x)
            sizes = self._rois if of_rois else [1] * len(x)
            each = len(sizes) // self._ranks
            parts = [sum(sizes[i : i + each]) for i in range(0, len(sizes), each)]
            weights = layer.weight, layer.bias
            return torch.cat(
                [
                    F.batch_norm(y, None, None, *weights, True, 0.0, layer.eps)
                    for y in x.split(parts)
                ]
            )

        return forward


def train(norm: str, split: Split, seed: int, args: argparse.Namespace, output: str) -> Row:
    words: list[Any] = [word for key in NORM_KEYS for word in (key.key, norm)]
    words += ["SEED", seed, "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", split.total]
    words += ["SOLVER.MAX_ITER", args.iters, "SOLVER.STEPS", (int(args.iters * 0.8),)]
    words += ["SOLVER.BASE_LR", RATE, "SOLVER.WARMUP_ITERS", round(WARMUP * args.iters)]
    words += ["TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 10**6]
    words += ["TEST.PRECISE_BN.ENABLED", "freeze" not in norm]
    words += ["TEST.PRECISE_BN.NUM_ITER", RECOMPUTED_OVER // split.total, *args.opts]
    cfg = read_config(find_config(CONFIG), list(map(str, words)))
    cfg.freeze()
    prepare_datasets(cfg)
    seed_all_rng(seed)
    trainer = Trainer(cfg)
    model = trainer.bare_model
    OfRanks(model, split.ranks)
    if args.bfloat16:
        plain = model.forward

        def forward(batch: list[dict[str, Any]]) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
                return plain(batch)

        model.forward = forward
    trainer.train()
    found = trainer.results["bbox"]
    numbers = {name: f"{found[name]:.1f}" for name in ("AP", "AP50")}
    return {
        "norm": norm,
        "ranks x images": f"{split.ranks} x {split.images}",
        "seed": seed,
        **numbers,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--split", nargs="+", type=Split.parse, required=True, metavar="RANKSxIMAGES")
    add("--norms", nargs="+", default=["BN(freeze=0.5)"], metavar="NORM", help="BN, or with freeze")
    add("--seeds", nargs="+", type=int, default=[1], metavar="S", help="default 1")
    add("--iters", type=positive, default=ITERATIONS, metavar="N", help=f"default {ITERATIONS}")
    add("--bfloat16", action="store_true", help="train with autocast, in half the time")
    add("--out", type=Path, metavar="FILE.csv", help="also write the table there")
    add_opts(parser)
    args = parser.parse_args(arguments)
    other = [norm for norm in args.norms if norm.partition("(")[0] != "BN"]
    if other:
        parser.error(f"--norms {other[0]}: what other norms remember is of one rank's images")
    register()
    rows = []
    with tempfile.TemporaryDirectory() as output:
        for seed in args.seeds:
            for split in args.split:
                for norm in args.norms:
                    rows.append(train(norm, split, seed, args, output))
                    print(rows[-1], flush=True)
    where = machine(on_gpu=False)
    facts = {"machine": f"{where['cpu']}, {where['threads']} threads", "torch": torch.__version__}
    command = shlex.join(["python", "benchmarks/emulated_ranks.py", *(arguments or sys.argv[1:])])
    publish(rows, {**facts, "command": command}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
