"""What a norm costs: seconds and peak memory, as ratios to another norm's, with intervals.

Five kinds of measurement:

  layer      a convolution and its norm at given shapes: forward, backward, optimiser step (a lone
             layer gives KN and GKN nothing to predict from: their cost shows in an iteration)
  norm       norms alone, forward and backward, and the share of the memory's bandwidth that they
             reach: beside a copy, which is the first line (without a convolution there is nothing
             that CBN could compensate by: CBN(compensation='none'))
  dispatch   8 convolutions 64->64 with their norms on 1x64x4x4, where launching kernels is all
             there is to do; processor time on a CPU
  iteration  a training iteration of a detector, from a config, on either engine
  inference  its forward pass over a test image; "deployed:NORM" with norms made plain BatchNorm
             first, "folded:NORM" with norms taken into the convolutions (cbn_det.deploy; its peak
             memory is that of the folding)

Each norm has a process of its own, which holds its model and takes turns with the others: a ratio
is the median of paired repetitions, so that a machine that speeds up or slows down does not decide
who is faster. Norms are timed past their burn-in and with full windows, where they do all their
work. The first norm is what the others are compared with. A busy machine makes intervals wide. The
table is printed; --out writes it as CSV.

examples:
  # at the four shapes by which the layers are tuned, on CPU
  python benchmarks/benchmark.py layer --norms BN CBN "CBN(positions=None)" GN

  # a shape of your own (input N, C, H, W, output channels, kernel), on a GPU
  python benchmarks/benchmark.py layer --norms BN CBN --shapes 2,256,200,304,256,3 --device cuda

  # a layer of your own or of another project: theirs(in_channels, out_channels, kernel_size) in
  # peers.py returns convolution and norm in one module
  python benchmarks/benchmark.py layer --norms BN CBN peers.py:theirs

  # the share of memory bandwidth that the norms' kernels reach on a GPU
  python benchmarks/benchmark.py norm --norms BN "CBN(compensation='none')" MBN BGN GN \\
      --device cuda --shapes 2,256,200,304

  # one training iteration of the quick start, norm everywhere; MBN with and without its second pass
  python benchmarks/benchmark.py iteration --norms BN CBN GN MBN "MBN(double_forward=False)"

  # your own config and data, on a GPU
  python benchmarks/benchmark.py iteration --norms BN CBN --config-file my.yaml --device cuda \\
      --coco-dataset cells_train train.json images/ --opts DATASETS.TRAIN "('cells_train',)"

  # what a norm costs a model in use, against frozen BatchNorm
  python benchmarks/benchmark.py inference --norms FrozenBN CBN deployed:CBN folded:CBN GN
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import clone  # noqa: F401
import timing
from publishing import Row, publish
from workloads import (
    COPY,
    STAGES,
    inference_workload,
    iteration_workload,
    layer_workload,
    norm_workload,
    stack_workload,
)

from cbn_det.commands.flags import add_detector, positive
from cbn_det.config_files import find_config
from cbn_det.engines import ENGINES, resolve_engine
from cbn_det.study.plan import Plan, Split
from cbn_det.study.recipes import norm_keys

#: outputs of the convolutions below
MAPS = ["2,256,100,100", "128,256,7,7", "2,256,200,200"]
#: an FPN output and lateral convolution, a RoI head's, and the last of a bottleneck
SHAPES = ["2,256,100,100,256,3", "2,256,100,100,256,1", "128,256,7,7,256,3", "2,64,200,200,256,1"]
#: by norm, what makes its workload
Builds = dict[str, Callable[[], timing.Workload]]


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__, formatter_class=raw)
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--norms", nargs="+", required=True, metavar="NORM", help="the first is the reference")
    what = "turns of each norm (default 30)"
    add("--repetitions", type=timing.enough, default=30, metavar="N", help=what)
    add("--warm-up", type=positive, default=10, metavar="N", help="steps before (default 10)")
    what = "steps in a turn: as many as take this long with the first norm (default 0.2)"
    add("--turn-seconds", type=float, default=0.2, metavar="S", help=what)
    add("--threads", type=positive, metavar="N", help="of each process (default: torch's)")
    add("--out", type=Path, metavar="FILE.csv", help="also write the table there")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, what, shape, default in (
        ("layer", "a convolution and its norm", "N,C,H,W,OUT,KERNEL", SHAPES),
        ("norm", "a norm alone, beside a copy", "N,C,H,W", MAPS),
    ):
        add = kinds.add_parser(kind, parents=[common], help=what).add_argument
        what = f"default: {' '.join(default)}"
        add("--shapes", nargs="+", default=default, metavar=shape, help=what)
        add("--device", default="cpu", help="cpu or cuda (default cpu)")
    dispatch = kinds.add_parser("dispatch", parents=[common], help="where launching is all")
    dispatch.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    for kind, what in (
        ("iteration", "a detector's training iteration"),
        ("inference", "a detector's forward pass over a test image"),
    ):
        detector = kinds.add_parser(kind, parents=[common], help=what)
        add_detector(detector)
        detector.add_argument("--engine", choices=ENGINES, default="auto", help="default auto")
        detector.add_argument("--device", help="cpu or cuda (default: the config's)")
        if kind == "iteration":
            what = "in an iteration (default 2)"
            detector.add_argument("--images", type=positive, default=2, metavar="N", help=what)
    return parser


def numbers(text: str, names: str) -> list[int]:
    """Reads a shape. Raises ValueError where it is none."""
    words = text.split(",")
    if len(words) != len(names.split(",")) or not all(w.isdecimal() and int(w) for w in words):
        raise ValueError(f"--shapes {text}: expected {names}, numbers of 1 or more")
    return list(map(int, words))


def layer_case(norms: list[str], text: str, device: str) -> tuple[str, Builds]:
    """What to call a convolution with its norm, and what makes it with each norm."""
    n, c, h, w, out, kernel = numbers(text, "N,C,H,W,OUT,KERNEL")
    if kernel % 2 == 0:
        raise ValueError(f"--shapes {text}: the kernel must be odd")
    name = f"{kernel}x{kernel} {c}->{out}, {n}x{h}x{w}"
    shape = (n, c, h, w)
    return name, {o: partial(layer_workload, o, shape, out, kernel, device) for o in norms}


def norm_case(norms: list[str], text: str, device: str) -> tuple[str, Builds]:
    """The same of norms alone, beside a copy."""
    shape = numbers(text, "N,C,H,W")
    builds = {norm: partial(norm_workload, norm, shape, device) for norm in (COPY, *norms)}
    return "x".join(map(str, shape)), builds


def detector_case(args: argparse.Namespace) -> tuple[str, Builds]:
    """The same of a detector's training iteration or inference.

    Weights are random unless the overrides name MODEL.WEIGHTS: how long an iteration takes hardly
    depends on them. An untrained detector has a box for every class at every place; for inference
    they are below the score threshold, so that sorting them does not hide the network's time.
    """
    training, engine = args.kind == "iteration", resolve_engine(args.engine)
    stages = {norm: ("", norm) if training else norm.rpartition(":")[::2] for norm in args.norms}
    for norm, (stage, _) in stages.items():
        if stage not in ("", *STAGES):
            raise ValueError(f"--norms {norm}: before the colon stands {' or '.join(STAGES)}")
    first = ["MODEL.WEIGHTS", ""] + ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.9"] * (not training)
    config = Path(find_config(args.config_file)) if args.config_file else None
    plan = Plan(
        Path(),
        [norm for _, norm in stages.values()],
        [Split(1, args.images if training else 1)],
        [1],
        engine,
        recipe=args.recipe,
        config=config,
        precise_bn=0,
        datasets=args.coco_dataset,
        overrides=[*first, *(("MODEL.DEVICE", args.device) if args.device else ()), *args.opts],
    )
    words = {run.norm: run.command[len(plan.launcher) :] for run in plan.runs()}
    builds: Builds = {}
    for norm, (stage, name) in stages.items():
        inference = partial(inference_workload, stage or "trained")
        builds[norm] = partial(iteration_workload if training else inference, words[name])
    keys = norm_keys(config, args.recipe, engine)
    sites = ", ".join(key.removeprefix("MODEL.").removesuffix(".NORM") for key in keys)
    images = f"{plan.splits[0].images} images"
    return f"{plan.config_file.stem}, {images}, {engine}; norm in {sites}", builds


def cases(args: argparse.Namespace) -> dict[str, Builds]:
    """What is timed, by name.

    Raises:
        ValueError: a setting that cannot be followed; names the option.
    """
    if len(args.norms) < 2 or len(set(args.norms)) < len(args.norms):
        raise ValueError("--norms: name two or more, each once; the first is the reference")
    if args.kind == "layer":
        return dict(layer_case(args.norms, text, args.device) for text in args.shapes)
    if args.kind == "norm":
        if COPY in args.norms:
            raise ValueError(f"--norms {COPY}: it takes part anyway")
        return dict(norm_case(args.norms, text, args.device) for text in args.shapes)
    if args.kind == "dispatch":
        shape = (1, 64, 4, 4)
        return {
            "8 convolutions, 1x64x4x4": {
                norm: partial(stack_workload, norm, 8, shape, args.device) for norm in args.norms
            }
        }
    return dict([detector_case(args)])


def measure(args: argparse.Namespace, name: str, builds: Builds) -> tuple[list[Row], Row]:
    """All norms at one case: a row each, and what they were measured on.

    Raises:
        WorkerFailed: a norm that cannot be built or run.
    """
    timing.say(f"{name}: building {', '.join(builds)}")
    with timing.started(builds, args.threads) as workers:
        facts = [worker.facts() for worker in workers]
        for worker, fact in zip(workers, facts, strict=True):
            worker.ask(timing.run, max(args.warm_up, fact["warm_up"] + 2))
        first = workers[0].ask(timing.run, 1)["wall"]
        steps = max(1, math.ceil(args.turn_seconds / first))
        taken = timing.take_turns(workers, steps, args.repetitions)
        peaks = {worker.norm: worker.ask(timing.peak_mb) for worker in workers}
    # other work on the machine disturbs the time of the process less; a GPU's it does not hold
    clock = "cpu" if args.kind == "dispatch" and args.device == "cpu" else "wall"
    times = {norm: [answer[clock] for answer in answers] for norm, answers in taken.items()}
    machine, versions = facts[0]["machine"], facts[0]["versions"]
    made_on = {
        "machine": machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads",
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
    }
    size = 4 * math.prod(map(int, name.split("x"))) if args.kind == "norm" else None
    return rows_of(name, times, peaks, size), made_on


def rows_of(
    name: str, times: dict[str, list[float]], peaks: dict[str, float], size: int | None = None
) -> list[Row]:
    """
    Args:
        times: seconds of a step in each repetition; the first norm is the reference.
        peaks: the most memory that was in use, in MB.
        size: bytes of the tensor that norms alone normalise. A norm reads its input twice and
            writes its output, then reads input and gradient twice and writes one: 8 times the
            tensor; a copy moves 2.
    """
    reference, rows = next(iter(times)), []
    for norm, seconds in times.items():
        ratio, (low, high) = timing.paired_ratio(seconds, times[reference])
        row = {"case": name, "norm": norm, "ms": 1e3 * statistics.median(seconds)}
        head = f"ratio to {reference}"
        row |= {head: ratio, f"{head} low": low, f"{head} high": high}
        if size:
            moved = 2 if norm == COPY else 8
            row["GB/s"] = moved * size / statistics.median(seconds) / 1e9
            row[f"of {reference}'s, %"] = 100 * moved / 2 / ratio
        row["peak MB"] = peaks[norm]
        row["memory ratio"] = peaks[norm] / peaks[reference] if peaks[reference] > 0 else ""
        row["repetitions"] = len(seconds)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    rows: list[Row] = []
    try:
        for name, builds in cases(args).items():
            found, made_on = measure(args, name, builds)
            rows += found
    except KeyboardInterrupt:
        timing.say("Stopped; nothing was written.")
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    publish(rows, made_on, args.out)
    print(
        f"Medians of paired repetitions with {timing.CONFIDENCE:.0%} intervals; norms past burn-in,"
        f" windows full. Load average {load:.1f} before, {os.getloadavg()[0]:.1f} after."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
