"""The command ``cbn-det``: finds the subcommand, whose own module reads its arguments."""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from . import __version__

#: subcommand -> the module whose ``main()`` it is, and what it does
COMMANDS = {
    "train": ("launch", "train and evaluate a detector from a config"),
    "compare": ("commands.compare", "train one detector with several norms and report"),
    "reproduce": ("commands.reproduce", "train rows of published tables on COCO 2017"),
    "check": ("commands.check", "what can be known of a training before it starts"),
    "deploy": ("deploy", "write a trained model for use without this package"),
    "predict": ("predict", "draw what a trained model finds on images"),
    "demo": ("commands.demo", "GN, BN and CBN at 2 images per GPU on the CPU, in minutes"),
}
#: those whose first word may be the config
_OF_CONFIG = ("train", "check")
#: those that need the extra "compare"
_OF_STUDY = ("compare", "reproduce", "demo")
_MODULE = "python -m cbn_det"
# what a shell looks for inside double quotes; an interactive one also looks for !
_SPECIAL = set('"$`\\!')


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code; 2 where there is none of that name."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(f"cbn-det {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(COMMANDS)}"
        print(f"error: there is no command {name!r}: {hint}", file=sys.stderr)
        return 2
    if name in _OF_CONFIG and rest and not rest[0].startswith("-"):
        rest = ["--config-file", *rest]
    as_script = Path(sys.argv[0]).stem == "cbn-det"
    sys.argv = [f"{'cbn-det' if as_script else _MODULE} {name}", *rest]
    try:
        return importlib.import_module(f".{COMMANDS[name][0]}", __package__).main()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == __package__:
            raise
        extra = "compare" if name in _OF_STUDY else "standalone"
        print(
            f"error: {name} needs the package {error.name}: pip install 'cbn-det[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        return reader_left()


def reader_left() -> int:
    """For a BrokenPipeError: ``| head`` has seen enough. Returns the exit code."""
    # the interpreter flushes once more at its end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141  # what shells give to SIGPIPE


def typed_words() -> list[str]:
    """The words of this process's command, as one would type them again."""
    program, *words = sys.argv
    if program.startswith(("cbn-det ", f"{_MODULE} ")):  # by main()
        return [*program.split(), *words]
    return ["python", program, *words]


def join(words: Iterable[str]) -> str:
    """A command line that a POSIX shell takes apart into the words again: as ``shlex.join``, but a
    word with single quotes stands in double ones, not in ``'"'"'``."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    return f'"{word}"' if "'" in word and not _SPECIAL & set(word) else shlex.quote(word)


def _usage() -> str:
    lines = [f"  {name:<11}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cbn-det COMMAND ...",
            "",
            "Normalisation layers for detectors trained at 1-2 images per GPU.",
            "",
            *lines,
            "",
            "cbn-det COMMAND --help shows the options. A config is a file, or the name of one that",
            "this package has: cbn-det train quickstart/faster_rcnn_R_18_FPN_digits_cbn",
        ]
    )
