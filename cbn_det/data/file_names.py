"""Finds image files that are called a little otherwise than an annotation file says."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from urllib.parse import unquote

__all__ = ["FolderNames"]


_MOST_FOLDERS = 20  # that are looked into for a file which is not where it should be


class FolderNames:
    """The files below a folder. Each of its folders is listed once: a request for each file takes
    minutes on a network disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[str, frozenset[str]] = {}
        self._plain: dict[str, dict[str, str]] = {}
        self._below: list[str] | None = None

    def holds(self, name: str) -> bool:
        parent, file = os.path.split(os.path.join(self.folder, name))
        return file in self._names(parent)

    def find(self, name: str) -> str | None:
        """The name, relative to the folder, of the file that a tool on another system, a browser or
        an export with folders of its own would call ``name``; None if there is no such file."""
        for variant in _variants(name):
            parts = [part for part in variant.split("/") if part not in ("", ".")]
            for first in range(len(parts)):  # with one leading folder less each time
                found = self._find_parts(parts[first:])
                if found is not None:
                    return found
        return None

    def _find_parts(self, parts: list[str]) -> str | None:
        *folders, file = parts
        if self._below is None:
            below = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir())
            self._below = ["", *below[:_MOST_FOLDERS]]
        for below in self._below:
            parent = os.path.join(self.folder, below, *folders)
            if parent not in self._plain:
                self._plain[parent] = {_plain(name): name for name in self._names(parent)}
            there = self._plain[parent].get(_plain(file))
            if there is not None:
                return os.path.join(below, *folders, there)
        return None

    def _names(self, folder: str) -> frozenset[str]:
        if folder not in self._listed:
            names = os.listdir(folder) if os.path.isdir(folder) else ()
            self._listed[folder] = frozenset(names)
        return self._listed[folder]


def _plain(name: str) -> str:
    """What is the same in all ways of writing a name."""
    return unicodedata.normalize("NFC", name).casefold()


def _variants(name: str) -> list[str]:
    found = []
    for text in (name, name.replace("\\", "/")):
        path = text.partition("://")[2].partition("?")[0] if "://" in text else text
        found += [text, path, unquote(path)]
    return list(dict.fromkeys(found))
