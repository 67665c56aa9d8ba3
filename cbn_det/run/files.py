"""Files that are either whole or not there, and what a run left in result.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

RESULT = "result.json"


def replace_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file under a temporary name and moves it into place, so that a killed process never
    leaves half a file."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """:func:`replace_file` with a text; returns ``path``."""
    replace_file(path, lambda file: file.write(text.encode("utf-8")))
    return path


def read_result(folder: Path) -> dict[str, Any] | None:
    """The content of a run's ``result.json``, or None where it is missing or cut short."""
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def remove_parts(folder: Path) -> None:
    """Removes what processes that were killed inside :func:`replace_file` left in a folder."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.(pth|json|yaml)\.\d+|\.last_checkpoint\.\d+", path.name):
            path.unlink(missing_ok=True)
