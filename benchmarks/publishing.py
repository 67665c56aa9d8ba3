"""Tables as text and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]


def publish(
    rows: Sequence[Row],
    facts: Mapping[str, Any],
    out: Path | None = None,
    digits: str = ".4g",
) -> None:
    """Prints rows as a table, and below it facts that are the same for all; with ``out`` also
    writes both as CSV, with the columns of all rows: a cell stays empty where a row has none.

    Raises:
        OSError: the file cannot be written.
    """
    print(tabulate(rows, headers="keys", floatfmt=digits))
    if facts:
        print("; ".join(f"{name}: {value}" for name, value in facts.items()))
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(name for row in rows for name in (*row, *facts))
    with open(out, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
