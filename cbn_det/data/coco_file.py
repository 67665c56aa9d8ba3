"""Reads an annotation file in COCO's format and checks its lists, keys, ids and names."""

from __future__ import annotations

import codecs
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbn_det.data.errors import DataError
from cbn_det.data.findings import Findings

__all__ = ["CocoFile", "is_id", "read_coco"]

_NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
# What Windows' editors and tools put in front of text; pycocotools takes UTF-8 without it.
_MARKS = {
    codecs.BOM_UTF8: "UTF-8 with a byte-order mark",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class CocoFile:
    """What of a file can be looked at further.

    Attributes:
        images: entries with a usable id, file name and size, by id.
        annotations: entries with all keys.
        categories: names by id, sorted by id.
        image_ids: of all entries of ``images``, the unusable ones too.
        num_annotations: of all entries, those that lack a key too.
        has_annotations: COCO's own test sets have no such list.
    """

    images: dict[Any, dict]
    annotations: list[dict]
    categories: dict[int, str]
    image_ids: frozenset
    num_annotations: int
    has_annotations: bool


def read_coco(path: Path, findings: Findings, *, for_training: bool) -> CocoFile:
    """
    Raises:
        DataError: it is no JSON, or lacks one of the lists (a test set may lack annotations).
    """
    data = _read_json(path)
    if not isinstance(data, dict):
        raise DataError(
            f"{path}: not in COCO format, its top level must be an object with the lists 'images', "
            "'annotations' and 'categories'"
        )
    has_annotations = "annotations" in data
    if not has_annotations and not for_training:
        findings.warn("it has no 'annotations': predictions are written, but no AP is computed")
        data = {**data, "annotations": []}
    for key in _NEEDED:
        if not isinstance(data.get(key), list) or not all(isinstance(r, dict) for r in data[key]):
            raise DataError(
                f"{path}: not in COCO format, '{key}' must be a list of objects; it is "
                + ("missing" if key not in data else "something else")
            )
    for key in ("images", "categories"):
        if not data[key]:
            raise DataError(f"{path}: its list '{key}' is empty")
    whole = {key: _with_keys(key, data[key], findings) for key in _NEEDED}
    images = _check_images(whole["images"], findings)
    ids = [a["id"] for a in whole["annotations"]]
    findings.refuse("ids repeated in 'annotations': number them anew", map(repr, _repeated(ids)))
    _refuse_other_ids("annotations", ids, findings)
    return CocoFile(
        images=images,
        annotations=whole["annotations"],
        categories=_check_categories(whole["categories"], findings),
        image_ids=frozenset(filter(is_id, (r.get("id") for r in data["images"]))),
        num_annotations=len(data["annotations"]),
        has_annotations=has_annotations,
    )


def is_id(value: object) -> bool:
    """Whether it can be looked up: a list or an object cannot, nor is null an id."""
    return isinstance(value, (int, float, str))


def _read_json(path: Path) -> object:
    try:
        with open(path, "rb") as file:
            start = file.read(3)
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
        if encoding is None:
            with open(path, encoding="utf-8") as file:
                return json.load(file)
    except FileNotFoundError:
        raise DataError(f"annotation file '{path}' does not exist: check the path") from None
    except OSError as e:
        raise DataError(f"annotation file '{path}' cannot be read: {e}") from e
    except UnicodeDecodeError as e:
        raise DataError(
            f"annotation file '{path}' is not valid JSON: it is not UTF-8 ({e}): save it as UTF-8"
        ) from e
    except ValueError as e:  # JSONDecodeError, or an integer of thousands of digits
        raise DataError(
            f"annotation file '{path}' is not valid JSON ({e}): it may be cut off, copy or "
            "export it again"
        ) from e
    raise DataError(
        f"annotation file '{path}' is {encoding}, which pycocotools does not read: save it as "
        "UTF-8 without a byte-order mark"
    )


def _with_keys(table: str, entries: list[dict], findings: Findings) -> list[dict]:
    """The entries that have all the keys of their table."""
    lacking: dict[tuple[str, ...], list[str]] = defaultdict(list)
    good = []
    for i, entry in enumerate(entries):
        missing = tuple(key for key in _NEEDED[table] if key not in entry)
        if missing:
            lacking[missing].append(f"entry {i} (id {entry.get('id')!r})")
        else:
            good.append(entry)
    for missing, which in lacking.items():
        findings.refuse(
            f"entries of '{table}' without {' and without '.join(map(repr, missing))}, which "
            "COCO's format requires: add it",
            which,
        )
    return good


def _check_images(entries: list[dict], findings: Findings) -> dict[Any, dict]:
    """The usable entries by id."""
    ids = [r["id"] for r in entries]
    findings.refuse("ids repeated in 'images': give each image an id of its own", _repeated(ids))
    findings.refuse(
        "ids in 'images' that are neither numbers nor text: number them",
        (repr(i) for i in ids if not is_id(i)),
    )
    kinds = {isinstance(i, str): i for i in reversed(ids) if is_id(i)}  # the first of each kind
    if len(kinds) > 1:
        findings.refuse(
            f"ids in 'images' mix text and numbers ({kinds[True]!r} and {kinds[False]!r}), which "
            "cannot be sorted: number all of them, and 'image_id' likewise"
        )
    named = [r for r in entries if isinstance(r["file_name"], str)]
    findings.refuse(
        "images whose 'file_name' is not text: give the file's name below the image folder; ids",
        (repr(r["id"]) for r in entries if not isinstance(r["file_name"], str)),
    )
    findings.refuse(
        "images whose 'width' or 'height' is not a positive integer: give the size in pixels",
        (
            f"image {r['id']!r}: width {r['width']!r}, height {r['height']!r}"
            for r in entries
            if not _has_size(r)
        ),
    )
    return {r["id"]: r for r in named if is_id(r["id"]) and _has_size(r)}


def _has_size(record: dict) -> bool:
    return all(type(record[side]) is int and record[side] > 0 for side in ("width", "height"))


def _check_categories(entries: list[dict], findings: Findings) -> dict[int, str]:
    """Names by id, sorted by id."""
    _refuse_other_ids("categories", [c["id"] for c in entries], findings)
    names: dict[int, list] = defaultdict(list)
    for c in entries:
        if is_id(c["id"]):
            names[c["id"]].append(c["name"])
    findings.refuse(
        "categories listed several times: keep one entry of each",
        (
            f"{len(found)} times id {i!r}, {found[0]!r}"
            for i, found in names.items()
            if 1 < len(found) == found.count(found[0])
        ),
    )
    findings.refuse(
        "ids repeated in 'categories': give each category an id of its own",
        (
            f"id {i!r} is {' and '.join(map(repr, found[:2]))}"
            for i, found in names.items()
            if found.count(found[0]) < len(found)
        ),
    )
    findings.refuse(
        "category names that are not text: write each name as text",
        (f"id {c['id']!r}: {c['name']!r}" for c in entries if not isinstance(c["name"], str)),
    )
    ids: dict[str, list] = defaultdict(list)
    for i, found in names.items():
        if isinstance(found[0], str):
            ids[found[0]].append(i)
    findings.refuse(
        "category names repeated: give each class a name of its own, or make them one category "
        "with one id",
        (f"{name!r} is ids {', '.join(map(repr, i))}" for name, i in ids.items() if len(i) > 1),
    )
    return {i: names[i][0] for i in sorted(i for i in names if type(i) is int)}


def _refuse_other_ids(table: str, ids: list, findings: Findings) -> None:
    findings.refuse(
        f"ids in '{table}' that are not integers: number them",
        (repr(i) for i in ids if type(i) is not int),
    )


def _repeated(ids: list) -> list:
    return [i for i, n in Counter(filter(is_id, ids)).items() if n > 1]
