"""Published AP on COCO val2017: ``published.yaml`` as objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_DATA = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))

#: {"bbox": {"AP": 36.8, "AP50": 57.9, ...}, "segm": {...}}
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Source:
    """Where numbers were read: an address that does not change."""

    name: str
    url: str


@dataclass(frozen=True)
class Published:
    """The numbers of one row. ``place`` is the line or table of the source."""

    values: Values
    source: Source
    place: str


@dataclass(frozen=True)
class Elsewhere:
    """Published numbers that no row of a table repeats, and why they are worth knowing."""

    what: str
    published: Published
    remark: str


@dataclass(frozen=True)
class Table:
    """A table: a folder of ``configs/coco``, each config in it a row.

    Args:
        name: of the folder.
        title: detector, schedule, and where the norm is.
        published: numbers by row, "cbn_2img" for ``cbn_2img.yaml``.
        elsewhere: numbers for orientation.
        remarks: what a reader of the differences has to know.
    """

    name: str
    title: str
    published: dict[str, Published]
    elsewhere: tuple[Elsewhere, ...] = ()
    remarks: tuple[str, ...] = ()


SOURCES = {key: Source(**source) for key, source in _DATA["sources"].items()}


def _published(entry: dict[str, Any]) -> Published:
    values = {
        kind: dict(zip(("AP", "AP50", "AP75"), entry[kind], strict=False))
        for kind in ("bbox", "segm")
        if kind in entry
    }
    return Published(values, SOURCES[entry["source"]], entry["place"])


def _table(name: str, entry: dict[str, Any]) -> Table:
    return Table(
        name,
        entry["title"],
        {row: _published(numbers) for row, numbers in entry.get("published", {}).items()},
        tuple(
            Elsewhere(e["what"], _published(e["published"]), e["remark"])
            for e in entry.get("elsewhere", ())
        ),
        tuple(entry.get("remarks", ())),
    )


TABLES = {name: _table(name, entry) for name, entry in _DATA["tables"].items()}
