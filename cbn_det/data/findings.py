"""What a check of data finds, a line each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

OK, NOTE, PROBLEM = "ok", "note", "problem"
_SHOWN = 3


class DataError(ValueError):
    """The data cannot be trained on. The message names the file, the id and the fix."""


@dataclass(frozen=True)
class Finding:
    """One line about one thing that was checked. ``level`` is "ok", "note" (nothing has to be done)
    or "problem" (the text says what to do)."""

    level: str
    text: str


@dataclass
class Findings:
    """Lines about one annotation file: what a run is refused for, and what it is warned about.
    A line with ``ids`` is about each of them; it is left out if there are none."""

    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    def refuse(self, line: str, ids: Iterable | None = None, name: Callable = str) -> None:
        self.refused += _with_ids(line, ids, name)

    def warn(self, line: str, ids: Iterable | None = None) -> None:
        self.warned += _with_ids(line, ids)

    def keep(
        self,
        entries: list[dict],
        good: Callable[[dict], bool],
        line: str,
        name: Callable[[dict], Any] = lambda entry: entry["id"],
    ) -> list[dict]:
        """The good entries; the others are refused, each called by its ``name``."""
        bad = [entry for entry in entries if not good(entry)]
        self.refuse(line, bad, name)
        return list(filter(good, entries)) if bad else entries


def _with_ids(line: str, ids: Iterable | None, name: Callable = str) -> list[str]:
    if ids is None:
        return [line]
    ids = list(ids)
    first = ", ".join(str(name(one)) for one in ids[:_SHOWN])
    return [f"{line} ({len(ids)} in all, first: {first})"] if ids else []


def are_finite(values: Collection[object]) -> bool:
    """Whether all are numbers (true and false are none), none of them infinite or NaN."""
    try:
        return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))
    except OverflowError:  # an integer that no float holds
        return False
