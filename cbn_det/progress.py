"""What is shown while one waits: tqdm's bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

#: between two lines where stderr is no terminal
PLAIN_SECONDS = 15.0
_BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"

T = TypeVar("T")


def shown(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar while they are looked at; nothing in the first seconds."""
    every = 0.2 if sys.stderr.isatty() else PLAIN_SECONDS
    return tqdm(items, what, total, delay=3, mininterval=every, leave=False)


def say(text: str) -> None:
    """Prints a line, above the bars where there are any."""
    with tqdm.external_write_mode():
        print(text, flush=True)


class Bars:
    """Bars side by side, of what other processes do."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}
        self._said: dict[str, str] = {}
        self._last = 0.0

    def due(self) -> bool:
        """Whether it is time to :meth:`show` again."""
        every = 1.0 if sys.stderr.isatty() else PLAIN_SECONDS
        return time.monotonic() >= self._last + every

    def show(self, states: Mapping[str, tuple[int, int | None, str]]) -> None:
        """Shows what is done, of how much, and what is going on, by name; nothing of any other."""
        self._last = time.monotonic()
        for name in self._bars.keys() - states.keys():
            self._bars.pop(name).close()
        for name, (done, total, text) in states.items():
            if not sys.stderr.isatty():
                line = f"{name}: {done}/{total or '?'} {text}"
                if self._said.get(name) != line:
                    say(line)
                self._said[name] = line
                continue
            if name not in self._bars:
                self._bars[name] = tqdm(desc=name, bar_format=_BAR, leave=False, dynamic_ncols=True)
            self._bars[name].n, self._bars[name].total = done, total
            self._bars[name].set_postfix_str(text)
