"""Compares norms at several ranks of one or two images, emulated in one process.

Processes with one image each leave most of a CPU's time to their overhead. Here the batch of all
ranks is one, and each rank's images have norms of their own (emulated.py). What is trained, and
on which images, is what tools/compare_norms.py trains with as many processes.

Norms that are BatchNorm up to some iteration (``burn_in``, ``freeze``, ``SyncBN(start=...)``) share
that part of training: BatchNorm is trained once a split and seed, and each norm continues a copy of
it. Runs are kept in ``--runs``; the same command after an interruption does what is left. Needs
detectron2.

"AP" is with the ranks' own running statistics, pooled; "AP, PreciseBN" with statistics that are
computed anew over 200 images after training.

examples:
  # BatchNorm, and its statistics fixed at three times
  python benchmarks/emulated_ranks.py --split 8x1 --seeds 1 2 --runs runs --out freeze.csv \\
      --norms BN "BN(freeze=0.5)" "BN(freeze=0.67)" "BN(freeze=0.8)"

  # BatchNorm over all images, which is SyncBN, throughout and for the last third
  python benchmarks/emulated_ranks.py --split 4x2 --norms SyncBN "SyncBN(start=0.67)"
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clone  # noqa: F401
import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from emulated import emulate_ranks, of_one_rank, pool_statistics
from publishing import Row, publish

from cbn_det.commands.flags import add_detector, positive
from cbn_det.config_files import find_config
from cbn_det.norms import build_norm
from cbn_det.norms.freeze import with_freeze
from cbn_det.plugin.config import read_config
from cbn_det.plugin.datasets import prepare_datasets
from cbn_det.plugin.registry import register
from cbn_det.plugin.trainer import Trainer
from cbn_det.run.files import write_text
from cbn_det.run.measure import machine
from cbn_det.run.precise_bn import recompute_statistics
from cbn_det.study.plan import Split
from cbn_det.study.recipes import RECIPES, norm_keys, norm_words, schedule

#: images, of all ranks, that statistics are computed over
RECOMPUTED_OVER = 200
#: of the batch-size comparison
ITERATIONS, RATE = 600, 0.04


class Reached(Exception):
    """The shared part of training is over."""


class EmulatedTrainer(Trainer):
    """Trains with emulated ranks."""

    ranks = 1
    bfloat16 = False

    @classmethod
    def build_model(cls, cfg: CfgNode) -> Any:
        model = super().build_model(cfg)
        emulate_ranks(model, cls.ranks)
        plain = model.forward

        def forward(batch: list[dict[str, Any]]) -> Any:
            with torch.autocast("cpu", torch.bfloat16, cls.bfloat16 and model.training):
                return plain(batch)

        model.forward = forward
        return model

    def before_step(self) -> None:
        super().before_step()
        if any(layer.freeze_steps == self.iter for layer in with_freeze(self.bare_model).values()):
            pool_statistics(self.bare_model)

    def evaluate(self) -> dict[str, Any]:
        pool_statistics(self.bare_model)
        return super().evaluate()


class SharedStart(EmulatedTrainer):
    """Trains BatchNorm, without evaluating, and leaves checkpoints after some iterations."""

    stops: Sequence[int]

    def after_step(self) -> None:
        done = self.iter + 1
        if done in self.stops:
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
        super().after_step()
        if done == max(self.stops):
            raise Reached

    def evaluate(self) -> dict[str, Any]:
        return {}


def batchnorm_until(norm: str, iterations: int) -> int:
    """The iteration up to which a norm is BatchNorm in training."""
    if norm == "BN":
        return iterations
    if norm.startswith("G"):
        return 0
    layer = build_norm(norm, 64)
    times = [getattr(layer, "freeze", 1.0)]
    if not norm.startswith("BN"):
        times.append(layer.start if norm.startswith("SyncBN") else getattr(layer, "burn_in", 0))
    return min(round(t * iterations) if isinstance(t, float) else t for t in times)


def build(
    kind: type[EmulatedTrainer], norm: str, split: Split, seed: int, output: Path, args: Any
) -> Any:
    own = Path(find_config(args.config_file)) if args.config_file else None
    config = str(own or RECIPES[args.recipe].config)
    words: list[Any] = norm_words(norm_keys(own, args.recipe, "detectron2"), norm)
    words += [*schedule(Path(config), args.iters), "SEED", seed, "OUTPUT_DIR", output]
    words += ["SOLVER.IMS_PER_BATCH", split.total, "SOLVER.BASE_LR", RATE]
    words += ["SOLVER.CHECKPOINT_PERIOD", 10**6]
    words += ["TEST.EVAL_PERIOD", 0, "TEST.PRECISE_BN.ENABLED", False]
    words += ["TEST.PRECISE_BN.NUM_ITER", RECOMPUTED_OVER // split.total, *args.opts]
    cfg = read_config(config, list(map(str, words)))
    cfg.freeze()
    prepare_datasets(cfg, args.coco_dataset)
    seed_all_rng(seed)
    kind.ranks, kind.bfloat16 = split.ranks, args.bfloat16
    return kind(cfg)


def train_shared(stops: Sequence[int], split: Split, seed: int, folder: Path, args: Any) -> None:
    """Leaves a checkpoint of BatchNorm in a folder after each of ``stops`` iterations."""
    kept = {int(path.stem[-7:]) + 1: path.name for path in folder.glob("model_[0-9]*.pth")}
    missing = sorted(set(stops) - kept.keys())
    if not missing:
        return
    latest, before = folder / "last_checkpoint", [done for done in kept if done < missing[0]]
    latest.unlink(missing_ok=True)  # it may be behind what is missing
    if before:
        latest.write_text(kept[max(before)])
    trainer = build(SharedStart, "BN", split, seed, folder, args)
    trainer.stops = missing
    trainer.resume_or_load(resume=True)
    try:
        trainer.train()
    except Reached:
        pass


def train(norm: str, start: int, split: Split, seed: int, shared: Path, args: Any) -> Row:
    """Trains a norm from iteration ``start`` on, where BatchNorm's run in ``shared`` leaves off."""
    synced = norm.startswith("SyncBN")
    as_trained = ("BN", Split(1, split.total)) if synced else (norm, split)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(EmulatedTrainer, *as_trained, seed, Path(folder), args)
        if start:
            name = f"model_{start - 1:07d}.pth"
            state = torch.load(shared / name, weights_only=True)
            if synced:
                state["model"] = of_one_rank(state["model"])
            torch.save(state, Path(folder, name))
            Path(folder, "last_checkpoint").write_text(name)
        trainer.resume_or_load(resume=True)
        found = trainer.train()["bbox"]
        row = {"norm": norm, "split": str(split), "seed": seed, "start": start}
        row |= {"AP": found["AP"], "AP50": found["AP50"], "precise": None}
        with EventStorage():
            count = trainer.cfg.TEST.PRECISE_BN.NUM_ITER
            if recompute_statistics(trainer.bare_model, trainer.batches(), count):
                row["precise"] = trainer.evaluate()["bbox"]["AP"]
    return row


def shown(row: Row) -> Row:
    precise = row["precise"]
    return {
        "norm": row["norm"],
        "ranks x images": row["split"].replace("x", " x "),
        "seed": row["seed"],
        "AP": f"{row['AP']:.1f}",
        "AP50": f"{row['AP50']:.1f}",
        "AP, PreciseBN": "" if precise is None else f"{precise:.1f}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--split", nargs="+", type=Split.parse, required=True, metavar="RANKSxIMAGES")
    add(
        "--norms",
        nargs="+",
        default=["BN", "BN(freeze=0.5)"],
        metavar="NORM",
        help="any but KN and GKN; SyncBN is BatchNorm over the images of all ranks, from a "
        "fraction of the schedule on with SyncBN(start=0.67)",
    )
    add("--seeds", nargs="+", type=int, default=[1], metavar="S", help="default 1")
    add("--iters", type=positive, default=ITERATIONS, metavar="N", help=f"default {ITERATIONS}")
    add("--bfloat16", action="store_true", help="train with autocast, in half the time")
    add("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default runs")
    add("--out", type=Path, metavar="FILE.csv", help="also write the table there")
    add_detector(parser)
    args = parser.parse_args(arguments)
    chained = [norm for norm in args.norms if norm.startswith(("KN", "GKN"))]
    if chained:
        parser.error(f"--norms {chained[0]}: what precedes a norm is not known of emulated ranks")
    register()
    rows = []
    for seed in args.seeds:
        for split in args.split:
            base = args.runs / f"{split}-s{seed}"
            shared = Path(f"{base}-prefix")
            left = [norm for norm in args.norms if not Path(f"{base}-{norm}.json").exists()]
            starts = {norm: batchnorm_until(norm, args.iters) for norm in left}
            stops = sorted({start for start in starts.values() if start})
            if stops:
                train_shared(stops, split, seed, shared, args)
            for norm in left:
                row = train(norm, starts[norm], split, seed, shared, args)
                write_text(Path(f"{base}-{norm}.json"), json.dumps(row))
            kept = [Path(f"{base}-{norm}.json").read_text() for norm in args.norms]
            rows += [shown(json.loads(text)) for text in kept]
    where = machine(on_gpu=False)
    facts = {"machine": f"{where['cpu']}, {where['threads']} threads", "torch": torch.__version__}
    command = shlex.join(["python", "benchmarks/emulated_ranks.py", *(arguments or sys.argv[1:])])
    publish(rows, {**facts, "command": command}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
