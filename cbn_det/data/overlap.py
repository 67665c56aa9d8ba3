"""Finds the same image files in two sets."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["same_files"]

_PART = 4096  # bytes from the middle, where pictures of equal headers and borders differ


def same_files(
    first: Sequence[Path],
    second: Sequence[Path],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Path, Path]]:
    """
    Pairs of files with the same content, one of each set, in the order of ``second``.

    Files are compared by size; of those of equal size a part is read, and all of those in which
    that part is equal. Of two large sets of JPEG files that is a few in a hundred.

    Args:
        progress: called with the number of files looked at so far and in all.
    """
    total = len(first) + len(second)
    sizes: dict[int, list[Path]] = defaultdict(list)
    for done, path in enumerate(first):
        progress(done, total)
        sizes[path.stat().st_size].append(path)
    parts: dict[tuple[int, bytes], list[Path]] = {}
    parts_known: set[int] = set()
    whole: dict[Path, bytes] = {}

    def hash_of(path: Path) -> bytes:
        if path not in whole:
            whole[path] = hashlib.sha256(path.read_bytes()).digest()
        return whole[path]

    found = []
    for done, path in enumerate(second, start=len(first)):
        progress(done, total)
        size = path.stat().st_size
        if size not in sizes:
            continue
        if size not in parts_known:
            parts_known.add(size)
            for other in sizes[size]:
                parts.setdefault((size, _part(other, size)), []).append(other)
        candidates = parts.get((size, _part(path, size)), ())
        same = next((other for other in candidates if hash_of(other) == hash_of(path)), None)
        if same is not None:
            found.append((same, path))
    return found


def _part(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, (size - _PART) // 2))
        return hashlib.sha256(file.read(_PART)).digest()
