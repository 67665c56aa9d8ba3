"""Command lines as a reader can copy them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

# what a shell looks for inside double quotes; an interactive one also looks for !
_SPECIAL = set('"$`\\!')


def join(words: Iterable[str]) -> str:
    """A command line that a POSIX shell takes apart into the words again: as ``shlex.join``, but a
    word with single quotes stands in double ones, not in ``'"'"'``."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    return f'"{word}"' if "'" in word and not _SPECIAL & set(word) else shlex.quote(word)
