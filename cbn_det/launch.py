"""The launcher: reads the command line and hands it to an engine."""

from __future__ import annotations

import sys

from .engines import resolve_engine
from .run.arguments import argument_parser
from .shell import join


def main(argv: list[str] | None = None) -> int:
    """Runs the launcher and returns its exit code (see ``--help``); bad arguments exit with 2."""
    args = argument_parser().parse_args(argv)
    words = sys.argv if argv is None else ["train_net.py", *argv]
    args.command = join(["python", *words])
    try:
        args.engine = resolve_engine(args.engine)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.engine == "detectron2":
        from .plugin.launch import launch
    else:
        from .standalone.launch import launch
    return launch(args)
