"""A bar while one waits."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def shown(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on stderr while they are looked at: nothing in the first seconds,
    a line now and then where stderr is no terminal."""
    every = 0.2 if sys.stderr.isatty() else 15
    return tqdm(items, what, total, delay=3, mininterval=every, leave=False)
