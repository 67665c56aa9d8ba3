"""What a check found, in lines that name ids."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Findings"]

_SHOWN = 3


class Findings:
    """Lines about one annotation file: what a run is refused for, and what it is warned about."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.warned: list[str] = []

    def refuse(self, line: str, ids: Iterable | None = None) -> None:
        """With ``ids``, ``line`` is about each of them and is left out if there are none."""
        _add(self.refused, line, ids)

    def warn(self, line: str, ids: Iterable | None = None) -> None:
        """Likewise."""
        _add(self.warned, line, ids)


def _add(lines: list[str], line: str, ids: Iterable | None) -> None:
    if ids is None:
        lines.append(line)
        return
    ids = list(ids)
    if ids:
        lines.append(f"{line} ({len(ids)} in all, first: {', '.join(map(str, ids[:_SHOWN]))})")
