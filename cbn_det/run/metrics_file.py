"""``metrics.json``: a line of JSON for every so many iterations, in their order."""

from __future__ import annotations

import json
import os
from pathlib import Path


def cut(path: Path, start: int) -> int:
    """Takes back the lines of iteration ``start`` and later ones, which are written again, and what
    a killed process left of a line. The file stays the same one, as a writer may have it open.

    Returns:
        the iteration of the last line that is left; -1: there is none.
    """
    size, last = 0, -1
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            iteration = json.loads(line)["iteration"]
        except (ValueError, KeyError):
            break
        if iteration >= start or not line.endswith(b"\n"):
            break
        size, last = size + len(line), iteration
    if path.exists():
        os.truncate(path, size)
    return last
