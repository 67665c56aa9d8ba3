"""Reproduce published tables on COCO 2017, row by row.

A table is a folder of configs/coco, a row a config in it. Without --run a table is printed: what is
published and where, what has been measured so far, and the differences, between norms as well.
First of all it says whether the rows come out that others have trained in the very same setting.
With --run the rows are trained; started again, finished ones are kept and interrupted ones resume.

examples:
  cbn-det reproduce --list                       # the tables
  cbn-det reproduce TABLE                        # one of them, as far as it is
  cbn-det reproduce TABLE --dry-run              # the command of each row
  python tools/check_coco.py                          # before days are spent

  # two rows on the GPUs of this machine; "cbn" is every CBN row, "cbn_2img" the one at 2 images
  cbn-det reproduce TABLE --rows cbn_2img gn_2img --run

  # on one GPU: gradients are accumulated, so that the total batch and the mini-batches stay
  cbn-det reproduce TABLE --rows cbn_2img --num-gpus 1 --run

  # three seeds, 16 GPUs as 2 nodes of a SLURM cluster
  cbn-det reproduce TABLE --rows cbn_1img --seeds 1 2 3 --run \\
      --submit slurm --num-machines 2 --sbatch time=1440 partition=gpu

  # all tables as one Markdown file
  cbn-det reproduce all --markdown docs/model_zoo.md

  # to see that a row runs here: 20 iterations of small images on CPU, in a folder of its own and
  # marked as changed
  cbn-det reproduce TABLE --rows cbn_2img --num-gpus 1 --iters 20 --run \\
      --opts MODEL.DEVICE cpu INPUT.MIN_SIZE_TRAIN "(128,)" INPUT.MIN_SIZE_TEST 128
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ..cli import join, typed_words
from ..run.arguments import add_datasets
from ..run.files import write_text
from ..study.compare import exit_code, guarded
from ..study.processes import HOME, interruptible, locked
from ..study.published import TABLES
from ..study.reproduce import Reproduction
from ..study.reproduce_report import LEGEND, checks_text, document, overview, table_text
from ..study.runner import run_all
from .flags import add_opts, add_places, places, positive


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    tables = [*TABLES, "all"]
    add("table", nargs="?", choices=tables, metavar="TABLE", help="a name of --list, or all")
    add("--list", action="store_true", help="the tables, and how much of each has been measured")
    add("--rows", nargs="+", default=[], metavar="ROW", help="rows or norms (default: all rows)")
    add("--run", action="store_true", help="train the rows that are not finished")
    add("--dry-run", action="store_true", help="print the command of each row")
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    add("--seeds", nargs="+", type=int, default=[1], metavar="S", help="default 1")
    add(
        "--num-gpus",
        type=positive,
        metavar="N",
        help="GPUs of a run on each machine (default: all that its config is for)",
    )
    add_places(parser)
    add(
        "--output",
        type=Path,
        default=Path("output/reproduce"),
        metavar="DIR",
        help="where runs are, and are looked for (default output/reproduce)",
    )
    add(
        "--precise-bn-iters",
        type=int,
        default=200,
        metavar="N",
        help="iterations of PreciseBN for a second evaluation (default 200; 0: none)",
    )
    add("--iters", type=positive, metavar="N", help="another length of training, to try a row out")
    add_datasets(parser, help="a data set to try a row out on")
    add_opts(parser)
    return parser


def reproduce(args: argparse.Namespace) -> int:
    reproduction = Reproduction(
        output=args.output,
        gpus=args.num_gpus,
        machines=args.num_machines,
        iterations=args.iters,
        precise_bn=args.precise_bn_iters,
        datasets=args.coco_dataset,
        overrides=args.opts,
    )
    everything = args.list or args.table == "all"
    tables = list(TABLES.values()) if everything else [TABLES[args.table]]
    rows = {table.name: reproduction.rows(table, args.rows) for table in tables}
    chosen = [row for group in rows.values() for row in group]
    if args.list:
        print(checks_text(reproduction), overview(reproduction, tables), sep="\n", end="")
        return 0
    if args.dry_run or args.run:
        runs = reproduction.runs(chosen, args.seeds)
        for text in (text for row in chosen for text in reproduction.departures(row)):
            print(f"note: {text}: not the same row", file=sys.stderr)
    if args.dry_run:
        for run in runs:
            print(as_typed(["python", *run.command[1:]]))
        return 0
    print(checks_text(reproduction))
    code = 0
    if args.run:
        where = places(args, reproduction.on_gpu(chosen), runs)
        with ExitStack() as held:
            for name in dict.fromkeys(row.table.name for row in chosen):
                held.enter_context(locked(args.output / name))
            held.enter_context(interruptible())
            code = exit_code(run_all(runs, **where))
        print(f"\n{checks_text(reproduction)}")
    for table in tables:
        print(table_text(reproduction, table, rows[table.name]))
    print(LEGEND)
    if args.markdown:
        text = document(reproduction, tables, as_typed(typed_words()))
        print(f"Written: {write_text(args.markdown, text)}")
    return code


def as_typed(words: Sequence[str]) -> str:
    """A command line as one would type it in the present folder."""
    home = f"{HOME}{os.sep}" if Path.cwd() == HOME else ""
    return join(word.removeprefix(home) for word in words)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not args.table and not args.list:
        parser.error("TABLE is missing: --list shows the tables")
    if args.precise_bn_iters < 0:
        parser.error("--precise-bn-iters is 0 or more")
    return guarded("reproduce", lambda: reproduce(args), watching=args.submit == "slurm")
