"""Published AP on COCO val2017: ``published.yaml`` as objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

#: {"bbox": {"AP": 36.8, "AP50": 57.9, ...}, "segm": {...}}
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Source:
    """Where numbers were read: an address that does not change."""

    name: str
    url: str


@dataclass(frozen=True)
class Published:
    """Numbers of a source.

    Args:
        place: the lines or the table that they stand in.
        precise_bn: they are with PreciseBN, which is not a run's first evaluation.
        what, remark: of those that no row of a table repeats: what they are, how to take them.
    """

    values: Values
    source: Source
    place: str
    precise_bn: bool = False
    what: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """A table: the folder ``name`` of ``configs/coco``, each config in it a row.

    Args:
        published: numbers by row, "cbn_2img" for ``cbn_2img.yaml``.
        elsewhere: numbers for orientation.
        remarks: what a reader of the differences has to know.
    """

    name: str
    title: str
    published: dict[str, Published] = field(default_factory=dict)
    elsewhere: tuple[Published, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """A published row that a reproduction must reach before any other is believed: by task, AP
    with PreciseBN and how far from it a run may be."""

    table: str
    row: str
    expected: dict[str, tuple[float, float]]


def _published(entry: dict[str, Any]) -> Published:
    tasks = [task for task in ("bbox", "segm") if task in entry]
    values = {task: dict(zip(("AP", "AP50", "AP75"), entry[task], strict=False)) for task in tasks}
    others = {key: value for key, value in entry.items() if key not in (*tasks, "source")}
    return Published(values, SOURCES[entry["source"]], **others)


_DATA = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
SOURCES = {key: Source(**source) for key, source in _DATA["sources"].items()}
TABLES = {
    name: Table(
        name,
        entry["title"],
        {row: _published(numbers) for row, numbers in entry.get("published", {}).items()},
        tuple(_published(numbers) for numbers in entry.get("elsewhere", ())),
        tuple(entry.get("remarks", ())),
    )
    for name, entry in _DATA["tables"].items()
}
CHECKS = [
    Check(entry.pop("table"), entry.pop("row"), {task: tuple(ap) for task, ap in entry.items()})
    for entry in _DATA["checks"]
]
