"""How far is each norm's estimate of mean and variance from the truth, while a detector trains?

For each number of images per GPU one detector is trained; beside each of its BatchNorms stand
layers of all the norms, which see the same inputs and weights and change nothing. At a few moments
of training their estimates are compared with mean and variance over 200 images with the same
weights, layer by layer. The result is a table, a CSV of it and a figure; all numbers are in the run
folders, in statistics_error.jsonl. Started again with the same arguments, finished runs are kept,
and interrupted ones resume. shadow_errors.py says what is measured, and why one training serves
all norms. Needs detectron2.

examples:
  # all norms at 1, 2 and 4 images per GPU, from scratch, on the built-in digits
  python benchmarks/statistics_error.py --iters 600

  # the papers' setting: a trained backbone with frozen BN, the norms in FPN and heads
  python benchmarks/statistics_error.py --recipe finetune --iters 600 \\
      --output output/statistics_finetune

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
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import clone  # noqa: F401
from matplotlib.figure import Figure
from publishing import Row, publish

from cbn_det.commands.flags import add_detector, positive
from cbn_det.config_files import find_config
from cbn_det.study.compare import exit_code, guarded, train
from cbn_det.study.figures import colours, save_png
from cbn_det.study.plan import Plan, Split
from cbn_det.study.recipes import RECIPES, setting
from cbn_det.study.results import read_lines
from cbn_det.study.runner import visible_gpus

LAUNCHER = (sys.executable, str(Path(__file__).with_name("statistics_run.py")))
FILE = "statistics_error.jsonl"
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
        type=positive,
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
        type=positive,
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
    add_detector(parser)
    add(
        "--iters",
        type=positive,
        help="length of a run (default: the config's SOLVER.MAX_ITER)",
    )
    add(
        "--jobs",
        type=positive,
        metavar="N",
        help="runs side by side (default: as many as GPUs, on CPU as cores)",
    )
    add("--output", type=Path, default=Path("output/statistics"), help="default output/statistics")
    add("--dry-run", action="store_true", help="print the commands and stop")
    return parser


def read_points(folder: Path) -> list[Point]:
    """What a run has measured, in the order of iterations."""
    return read_lines(folder / FILE)


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


def row_of(points: list[Point], norm: str, reference: str | None) -> Row:
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


def table(runs: dict[int, list[Point]], length: int, reference: str | None) -> list[Row]:
    """A row for each batch size, half of training and norm.

    Args:
        runs: points of finished runs, by images per GPU.
        length: of the training, in iterations.
    """
    rows = []
    for images, points in sorted(runs.items()):
        for half in ("first", "second"):
            late = [p for p in points if (2 * p["iteration"] >= length) == (half == "second")]
            names = dict.fromkeys(
                n for point in late for layer in point["layers"].values() for n in layer["norms"]
            )
            rows += [
                {"images": images, "half": half, **row_of(late, norm, reference)} for norm in names
            ]
    return rows


def draw(runs: dict[int, list[Point]], norms: Sequence[str]) -> Figure:
    """Errors over the training, divided by BN's: a column a batch size, a line a norm."""
    figure = Figure(figsize=(1.5 + 4.7 * len(runs), 7), layout="constrained")
    grid = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for column, (images, points) in enumerate(sorted(runs.items())):
        for axes, key in zip(grid[:, column], ("mean", "var"), strict=True):
            for norm, colour in colours(norms).items():
                at = sorted({point["iteration"] for point in points})
                groups = [[p for p in points if p["iteration"] == iteration] for iteration in at]
                ratios = [ratio_of(pairs(group, norm, "BN", key)) or math.nan for group in groups]
                axes.plot(at, ratios, color=colour, marker=".", label=norm)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.set_ylabel(f"error of the {key}, divided by BN's" if column == 0 else "")
        grid[0][column].set_title(f"{images} images per GPU")
        grid[1][column].set_xlabel("iteration")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    return figure


def plan_of(args: argparse.Namespace, launcher: tuple[str, ...] = LAUNCHER) -> Plan:
    """The runs, which are not evaluated, with their length in iterations.

    Raises:
        ValueError: the config does not say how long to train, or the overrides do.
    """
    config = args.config_file and Path(find_config(args.config_file))
    length = args.iters or setting(config or RECIPES[args.recipe].config, "SOLVER.MAX_ITER")
    if "SOLVER.MAX_ITER" in args.opts[::2]:
        raise ValueError("SOLVER.MAX_ITER is set by --iters, not by --opts")
    if length is None:
        raise ValueError(f"{config} does not set SOLVER.MAX_ITER: --iters says how long to train")
    moments = sorted({max(1, round(part * length)) - 1 for part in MOMENTS} - {0})
    request = {"norms": norms_of(args), "at": moments, "images": args.truth_images}
    request |= {"reference": args.reference} if args.reference else {}
    return Plan(
        args.output,
        [args.trained_with],
        [Split(1, images) for images in args.images],
        args.seeds,
        "detectron2",
        recipe=args.recipe,
        config=config,
        iterations=length,  # a config that scales its own would move it away from the moments
        precise_bn=0,
        datasets=args.coco_dataset,
        overrides=["DATASETS.TEST", "()", *args.opts],
        flags=["--statistics-error", json.dumps(request)],
        launcher=launcher,
    )


def norms_of(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(["BN", *filter(None, [args.reference]), *args.norms]))


def run(args: argparse.Namespace, launcher: tuple[str, ...] = LAUNCHER) -> int:
    plan = plan_of(args, launcher)
    if args.dry_run:
        plan.print_commands()
        return 0
    gpus = visible_gpus() if plan.on_gpu else []
    jobs = args.jobs or len(gpus) or os.cpu_count() or 1
    outcomes = train(plan, jobs, gpus)
    runs: dict[int, list[Point]] = {}
    for outcome in outcomes:
        if outcome.result.get("status") == "finished":  # others have fewer moments
            found = runs.setdefault(outcome.run.split.images, [])
            found += read_points(outcome.run.folder)
    rows = table(runs, plan.iterations, args.reference)
    path = plan.output / "statistics_error.csv"
    publish(rows, {}, path if rows else None, digits=".3g")
    print(NOTES)
    if rows:
        print(path, save_png(draw(runs, norms_of(args)), path.with_suffix(".png")))
    return exit_code(outcomes)


def main(arguments: list[str] | None = None, launcher: tuple[str, ...] = LAUNCHER) -> int:
    args = make_parser().parse_args(arguments)
    return guarded("statistics_error", lambda: run(args, launcher))


if __name__ == "__main__":
    sys.exit(main())
