"""Reads an annotation file in COCO's format and checks its lists, keys, ids and names."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .findings import DataError, Findings

_NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class CocoFile:
    """What of a file can be looked at further.

    Attributes:
        images: entries with a usable id, file name and size, by id.
        annotations: entries with all keys, of these images and categories.
        categories: names by id, sorted by id.
        has_annotations: COCO's own test sets have no such list.
    """

    images: dict[Any, dict]
    annotations: list[dict]
    categories: dict[int, str]
    has_annotations: bool


def read_coco(path: Path, findings: Findings, *, for_training: bool) -> CocoFile:
    """
    Raises:
        DataError: it is no JSON, or lacks one of the lists (a test set may lack annotations).
    """
    data = _read_json(path)
    data = data if isinstance(data, dict) else {}
    has_annotations = "annotations" in data
    if not has_annotations and not for_training:
        findings.warn("it has no 'annotations': predictions are written, but no AP is computed")
        data = {**data, "annotations": []}
    for key in _NEEDED:
        if not isinstance(data.get(key), list) or not all(isinstance(e, dict) for e in data[key]):
            raise DataError(
                f"{path}: not in COCO format, '{key}' must be a list of objects; it is "
                + ("missing" if key not in data else "something else")
            )
    for key in ("images", "categories"):
        if not data[key]:
            raise DataError(f"{path}: its list '{key}' is empty")
    tables = {key: _with_keys_and_ids(key, data[key], findings) for key in _NEEDED}
    images = _usable_images(tables["images"], findings)
    categories = _usable_categories(tables["categories"], findings)
    annotations = tables["annotations"]
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        annotations = _of_listed(annotations, key, table, data[table], findings)
    return CocoFile(
        images=images,
        annotations=[
            a for a in annotations if a["image_id"] in images and a["category_id"] in categories
        ],
        categories=categories,
        has_annotations=has_annotations,
    )


def _read_json(path: Path) -> object:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise DataError(f"annotation file '{path}' does not exist: check the path") from None
    except OSError as e:
        raise DataError(f"annotation file '{path}' cannot be read: {e}") from e
    except ValueError as e:  # also of UTF-16, and of an integer of thousands of digits
        encoded = isinstance(e, UnicodeDecodeError) or "BOM" in str(e)
        remedy = (
            "save it as UTF-8 without a byte-order mark"
            if encoded
            else "it may be cut off, copy or export it again"
        )
        raise DataError(f"annotation file '{path}' is not valid JSON ({e}): {remedy}") from e


def _is_id(value: object) -> bool:
    """Whether it can be looked up: a list or an object cannot, nor is null an id."""
    return isinstance(value, (int, float, str))


def _with_keys_and_ids(table: str, entries: list[dict], findings: Findings) -> list[dict]:
    """The entries that have all the keys of their table and an id of the right kind."""
    whole = entries
    for key in _NEEDED[table]:
        whole = findings.keep(
            whole,
            lambda e, key=key: key in e,
            f"entries of '{table}' without '{key}', which COCO's format requires: add it",
            lambda e: f"entry {entries.index(e)} (id {e.get('id')!r})",
        )
    of_images = table == "images"
    whole = findings.keep(
        whole,
        lambda e: _is_id(e["id"]) if of_images else type(e["id"]) is int,
        f"ids in '{table}' that are not {'numbers or text' if of_images else 'integers'}: number "
        "them",
        lambda e: repr(e["id"]),
    )
    numbers = Counter(e["id"] for e in whole)
    findings.refuse(
        f"ids repeated in '{table}': keep one of equal entries, and number different ones anew",
        (repr(i) for i, number in numbers.items() if number > 1),
    )
    return whole


def _usable_images(entries: list[dict], findings: Findings) -> dict[Any, dict]:
    """By id."""
    kinds = {isinstance(e["id"], str): e["id"] for e in reversed(entries)}  # the first of each
    if len(kinds) > 1:
        findings.refuse(
            f"ids in 'images' mix text and numbers ({kinds[True]!r} and {kinds[False]!r}), which "
            "cannot be sorted: number all of them, and 'image_id' likewise"
        )
    entries = findings.keep(
        entries,
        lambda e: isinstance(e["file_name"], str),
        "images whose 'file_name' is not text: give the file's name below the image folder; ids",
    )
    entries = findings.keep(
        entries,
        lambda e: all(type(e[side]) is int and 0 < e[side] < 2**31 for side in ("width", "height")),
        "images whose 'width' or 'height' is not a positive integer: give the size in pixels",
        lambda e: f"image {e['id']!r}: width {e['width']!r}, height {e['height']!r}",
    )
    return {e["id"]: e for e in entries}


def _usable_categories(entries: list[dict], findings: Findings) -> dict[int, str]:
    """Names by id, sorted by id."""
    named = findings.keep(
        entries,
        lambda e: isinstance(e["name"], str),
        "category names that are not text: write each name as text",
        lambda e: f"id {e['id']!r}: {e['name']!r}",
    )
    names = {e["id"]: e["name"] for e in sorted(named, key=lambda e: e["id"])}
    ids: dict[str, list[int]] = defaultdict(list)
    for i, name in names.items():
        ids[name].append(i)
    findings.refuse(
        "category names repeated: give each class a name of its own, or make them one category "
        "with one id",
        (f"{name!r} is ids {', '.join(map(repr, i))}" for name, i in ids.items() if len(i) > 1),
    )
    return names


def _of_listed(
    annotations: list[dict], key: str, table: str, entries: list[dict], findings: Findings
) -> list[dict]:
    """Those whose ``key`` is an id of an entry of ``table``, be it a usable one or not."""
    listed = {e["id"] for e in entries if _is_id(e.get("id"))}
    by_text = {str(i): i for i in listed}

    def described(annotation: dict) -> str:
        value = annotation[key]
        other = by_text.get(str(value))  # a number as text, or text as a number
        hint = "" if other is None else f", listed is {other!r}: write both alike"
        return f"annotation {annotation['id']!r} has {value!r}{hint}"

    return findings.keep(
        annotations,
        lambda a: _is_id(a[key]) and a[key] in listed,
        f"annotations whose '{key}' is not in '{table}': remove them, or add it there",
        described,
    )
