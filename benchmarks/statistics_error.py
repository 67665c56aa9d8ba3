"""How far is each norm's estimate of mean and variance from the truth, while a detector trains?

For each number of images per GPU one detector is trained; beside each of its BatchNorms stand
layers of all the norms, which see the same inputs and weights and change nothing. At a few moments
of training their estimates are compared with mean and variance over 200 images with the same
weights, layer by layer. The result is a table, a CSV of it, and all numbers in
statistics_error.jsonl. shadow_errors.py says what is measured, and why one training serves all
norms. Needs detectron2.

examples:
  # all norms at 1, 2 and 4 images per GPU, from scratch, on the built-in digits
  python benchmarks/statistics_error.py --iters 600

  # the papers' setting: a trained backbone with frozen BN, the norms in FPN and heads
  python benchmarks/statistics_error.py --iters 600 --output output/statistics_finetune \\
      --config-file quickstart/Finetune-RCNN-R18-FPN-digits --opts MODEL.WEIGHTS backbone.pth

  # what CBN's window and burn-in do (options are part of a norm's name; quote it for the shell)
  python benchmarks/statistics_error.py --iters 600 --images 2 --seeds 1 2 3 \\
      --norms "CBN(burn_in=0, window=2)" "CBN(burn_in=0, window=4)" "CBN(burn_in=0, window=8)"

  # on the way of a network that is trained with CBN itself
  python benchmarks/statistics_error.py --iters 600 --trained-with "CBN(burn_in=0)" \\
      --norms "CBN(burn_in=0)" "MBN(burn_in=0)"

  # what CBN's averaged derivative costs: distance from the paper's rule
  python benchmarks/statistics_error.py --iters 600 --images 2 \\
      --reference "CBN(burn_in=0, positions=None)" --norms "CBN(burn_in=0, positions=16)" \\
      "CBN(burn_in=0, positions=64)" "CBN(burn_in=0, positions=256)"
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import clone  # noqa: F401
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from publishing import Row, publish
from shadow_errors import StatisticsError

from cbn_det.commands.flags import add_opts, positive
from cbn_det.config_files import find_config
from cbn_det.plugin.config import build_config
from cbn_det.plugin.datasets import prepare_datasets
from cbn_det.plugin.loading import place
from cbn_det.plugin.trainer import Trainer
from cbn_det.run.arguments import add_datasets, argument_parser
from cbn_det.run.nonfinite import Diverged
from cbn_det.study.plan import LAUNCHER, Plan, Split

#: Without burn-in where a norm has one that is a matter of choice: nothing depends on these layers,
#: and where their curves cross BN's is what a burn-in should be. BRN's is part of the method.
NORMS = [
    "BN",
    "CBN(burn_in=0)",
    "CBN(burn_in=0, compensation='none')",
    "MBN(burn_in=0)",
    "MBN(burn_in=0, double_forward=False)",
    "KN",
    "BRN",
    "BGN",
    "CBN(burn_in=0, window=8, compensation='none')",
    "KN(gain=0.5)",
]
#: when to measure, as parts of the training; the recipes' learning rate drops at 0.8
MOMENTS = (0.1, 0.3, 0.5, 0.78, 1.0)
NOTES = """\
One network was trained for each batch size; all norms were asked about the same weights and images.
mean: distance from the mean over many images, in standard deviations, RMS over mini-batches and
channels. var: log of the ratio to the variance over many images, likewise. running: the same of the
running statistics. Median over layers, averaged over points. / BN: divided by BN's error in the
same layer, geometric mean over layers and points. better: % of layers and points where it is
smaller. apart: distance of the variance from the reference's, in % of the sampling error of a
mini-batch's variance; its error added: by how much the distance from the truth is larger, in %."""

Point = dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    what = f"whose statistics to measure, BN in any case (default {' '.join(NORMS)})"
    add("--norms", nargs="+", default=NORMS, metavar="NORM", help=what)
    what = "images per GPU, one run each (default 1 2 4)"
    add("--images", nargs="+", type=positive, default=[1, 2, 4], metavar="N", help=what)
    add("--seeds", nargs="+", type=int, default=[1], metavar="S", help="default 1")
    what = "the norm that the detectors are trained with (default BN)"
    add("--trained-with", default="BN", metavar="NORM", help=what)
    what = "training images that the truth is taken from (default 200)"
    add("--truth-images", type=positive, default=200, metavar="N", help=what)
    what = "also compare the norms with this one, mini-batch by mini-batch"
    add("--reference", default="", metavar="NORM", help=what)
    add("--config-file", help="base config (default: from scratch on the built-in digits)")
    add_datasets(parser)
    add_opts(parser)
    add("--iters", type=positive, help="length of a run (default: the config's)")
    add("--output", type=Path, default=Path("output/statistics"), help="default output/statistics")
    return parser


class Measuring(HookBase):
    """Measures before the forward of the iterations at `MOMENTS`; not of the first one, where
    nothing is known to the methods but their initial state.

    Args:
        trainer: whose hook this becomes.
        images: that the truth is taken from.
        reference: see :class:`.StatisticsError`.

    Attributes:
        points: what was measured.
    """

    def __init__(self, trainer: Trainer, norms: Sequence[str], images: int, reference: str) -> None:
        self.points: list[Point] = []
        model, length = trainer.bare_model, trainer.max_iter
        self._errors = StatisticsError(model, trainer.double_forward, norms, length, reference)
        self._at = moments(length)
        self._count = math.ceil(images / trainer.cfg.SOLVER.IMS_PER_BATCH)
        self._loader = trainer.build_train_loader(trainer.cfg)

    def before_step(self) -> None:
        trainer = self.trainer
        if trainer.iter not in self._at:
            return
        place(self._loader, trainer.seed, trainer.max_iter)  # images behind the end of training
        model, amp = trainer.bare_model, trainer.cfg.SOLVER.AMP.ENABLED
        device = next(model.parameters()).device.type
        with EventStorage(), torch.autocast(device, enabled=amp):  # what heads log is dropped
            layers = self._errors.measure(iter(self._loader), self._count, model)
        half = "second" if 2 * trainer.iter >= trainer.max_iter else "first"
        self.points.append({"iteration": trainer.iter, "half": half, "layers": layers})


def moments(length: int) -> list[int]:
    """The iterations, counted from 0, before which a training of this length is measured."""
    return sorted({max(1, round(part * length)) - 1 for part in MOMENTS} - {0})


def train(words: Sequence[str], request: Sequence[Any]) -> list[Point]:
    """Trains a detector and measures.

    Args:
        words: of the launcher's command line, without OUTPUT_DIR.
        request: arguments of :class:`Measuring`, behind the trainer.

    Raises:
        Diverged: a loss, weight or statistic is not finite.
        ValueError: the config, the data or a norm cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:  # for checkpoints, which nobody needs
        args = argument_parser().parse_args([*words, "OUTPUT_DIR", folder])
        cfg, _ = build_config(args, world_size=1)
        prepare_datasets(cfg, args.coco_dataset)
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        measuring = Measuring(trainer, *request)
        trainer.register_hooks([measuring])
        trainer.resume_or_load(resume=False)
        trainer.train()
    return measuring.points


def pairs(points: Iterable[Point], norm: str, other: str, key: str) -> list[tuple[float, float]]:
    """The errors of two norms, of all points and layers that have both."""
    layers = [layer["norms"] for point in points for layer in point["layers"].values()]
    found = [(n.get(norm, {}).get(key), n.get(other, {}).get(key)) for n in layers]
    return [(own, base) for own, base in found if own and base]


def ratio_of(found: list[tuple[float, float]]) -> float | None:
    """The geometric mean of ratios."""
    return statistics.geometric_mean(own / base for own, base in found) if found else None


def typical(points: Iterable[Point], norm: str, key: str) -> float | None:
    """The median over layers, averaged over points."""
    medians = []
    for point in points:
        found = [layer["norms"].get(norm, {}).get(key) for layer in point["layers"].values()]
        if known := [value for value in found if value is not None]:
            medians.append(statistics.median(known))
    return statistics.fmean(medians) if medians else None


def row_of(points: list[Point], norm: str, reference: str) -> Row:
    """What `NOTES` explains, of one norm."""
    row: Row = {"norm": norm}
    for key in ("mean", "var"):
        row[key] = typical(points, norm, key)
        if norm != "BN":
            found = pairs(points, norm, "BN", key)
            row[f"{key} / BN"] = ratio_of(found)
            better = [own < base for own, base in found]
            row[f"{key} better"] = 100 * statistics.fmean(better) if found else None
    for key in ("mean", "var"):
        row[f"running {key}"] = typical(points, norm, f"running_{key}")
    if reference and norm not in ("BN", reference):
        shares = [
            100 * layer["norms"][norm]["apart_var"] / sampling
            for point in points
            for layer in point["layers"].values()
            if norm in layer["norms"] and (sampling := sampling_error(layer))
        ]
        if shares:
            row["apart: median"] = statistics.median(shares)
            row["apart: below 1 %"] = 100 * statistics.fmean(share < 1 for share in shares)
            row["apart: worst"] = max(shares)
        if ratio := ratio_of(pairs(points, norm, reference, "var")):
            row["apart: error added"] = 100 * (ratio - 1)
    return row


def sampling_error(layer: dict[str, Any]) -> float:
    """What BN's variance varies by from mini-batch to mini-batch, in one layer."""
    bn = layer["norms"].get("BN", {})
    return math.sqrt(max((bn.get("var") or 0) ** 2 - (bn.get("var_fixed") or 0) ** 2, 0.0))


def table(runs: dict[int, list[Point]], reference: str) -> list[Row]:
    """A row for each batch size, half of training and norm.

    Args:
        runs: points of finished runs, by images per GPU.
    """
    rows = []
    for images, points in sorted(runs.items()):
        for half in ("first", "second"):
            some = [point for point in points if point["half"] == half]
            layers = [layer["norms"] for point in some for layer in point["layers"].values()]
            norms = dict.fromkeys(norm for layer in layers for norm in layer)
            head = {"images": images, "half": half}
            rows += [{**head, **row_of(some, norm, reference)} for norm in norms]
    return rows


def plan_of(args: argparse.Namespace) -> Plan:
    """The runs, which are not evaluated.

    Raises:
        ValueError: a setting that cannot be followed.
    """
    return Plan(
        args.output,
        [args.trained_with],
        [Split(1, images) for images in args.images],
        args.seeds,
        "detectron2",
        config=args.config_file and Path(find_config(args.config_file)),
        iterations=args.iters,
        precise_bn=0,
        datasets=args.coco_dataset,
        overrides=["DATASETS.TEST", "()", *args.opts],
    )


def run(args: argparse.Namespace) -> int:
    """Trains, measures, prints and writes; the number of runs that diverged.

    Raises:
        ValueError: a setting that cannot be followed.
    """
    plan, norms = plan_of(args), list(dict.fromkeys(["BN", args.reference or "BN", *args.norms]))
    request = norms, args.truth_images, args.reference
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "statistics_error.csv"
    setup_logger(str(args.output))
    runs: dict[int, list[Point]] = {}
    diverged = 0
    with open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
        for planned in plan.runs():
            print(planned.label, flush=True)
            try:
                points = train(planned.command[len(LAUNCHER) :], request)
            except Diverged as error:  # it has fewer moments than the others: it is in no table
                print(f"{planned.label}: diverged: {error}", file=sys.stderr)
                diverged += 1
                continue
            runs.setdefault(planned.split.images, []).extend(points)
            for point in points:
                line = {"images": planned.split.images, "seed": planned.seed, **point}
                file.write(json.dumps(line, allow_nan=False) + "\n")
    rows = table(runs, args.reference)
    if rows:
        publish(rows, {}, path, digits=".3g")
        print(NOTES)
    return diverged


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        return 1 if run(args) else 0
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
