"""The launcher: reads the command line and hands it to an engine."""

from __future__ import annotations

import sys

from .cli import join, typed_words
from .config_files import find_config
from .engines import resolve_engine
from .run.arguments import argument_parser
from .run.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Runs the launcher and returns its exit code (see ``--help``); bad arguments exit with 2."""
    args = argument_parser().parse_args(argv)
    args.command = join(typed_words() if argv is None else ["cbn-det", "train", *argv])
    try:
        args.config_file = find_config(args.config_file)
        if args.config_file.endswith(".py"):  # has fewer options, and says so
            resolve_engine("detectron2")
            from .plugin.lazy import main as launch_lazy

            return launch_lazy(argv)
        args.engine = resolve_engine(args.engine)
    except (ConfigError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.engine == "detectron2":
        from .plugin.launch import launch
    else:
        from .standalone.launch import launch
    return launch(args)
