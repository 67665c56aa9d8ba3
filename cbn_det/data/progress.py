"""One line that says what is being done."""

from __future__ import annotations

import time
from typing import TextIO

_SECONDS = 0.2  # between two counts on a terminal
_PLAIN_SECONDS = 15.0  # and in a file


class StatusLine:
    """A line on a terminal that is overwritten, lines of their own elsewhere.

    What is being done is shown at once when it changes, how far it is now and then.

    Args:
        after: nothing is shown in the first so many seconds.
    """

    def __init__(self, stream: TextIO, after: float = 0.0) -> None:
        self._stream = stream
        self._begin = time.monotonic() + after
        self._terminal = stream.isatty()
        self._what = ""
        self._width = 0
        self._shown = 0.0

    def show(self, what: str, done: int | None = None, total: int | None = None) -> None:
        now = time.monotonic()
        if now < self._begin:
            return
        every = _SECONDS if self._terminal else _PLAIN_SECONDS
        if what == self._what and now - self._shown < every:
            return
        self._what, self._shown = what, now
        text = what if done is None else f"{what}: {done} of {total}"
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def clear(self) -> None:
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0
