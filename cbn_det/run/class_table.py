"""AP of each class as a table, worst first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

_PREFIX = "AP-"
_NAMES = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}
_COLUMNS = 3  # of classes side by side


def class_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Args:
        results: of one data set, by task: ``{"bbox": {"AP": ..., "AP-person": ...}}``.

    Returns:
        all classes with their AP of each task, sorted by the first task's, in columns to be read
        downwards; classes without an AP (no object in the set) come last. "" where no result is of
        a class.
    """
    tasks = [task for task, values in results.items() if any(map(_is_class, values))]
    if not tasks:
        return ""
    names = list(dict.fromkeys(key for task in tasks for key in results[task] if _is_class(key)))
    lines = [(name, *(_value(results[task].get(name)) for task in tasks)) for name in names]
    lines.sort(key=lambda line: (math.isnan(line[1]), line[1]))
    texts = [[line[0].removeprefix(_PREFIX), *map(_text, line[1:])] for line in lines]
    columns = min(_COLUMNS, len(texts))
    length = -(-len(texts) // columns)
    blank = [""] * len(texts[0])
    texts += [blank] * (length * columns - len(texts))
    rows = [
        [cell for column in range(columns) for cell in texts[column * length + i]]
        for i in range(length)
    ]
    headers = ["class", *(_NAMES.get(task, f"{task} AP") for task in tasks)] * columns
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def _is_class(key: str) -> bool:
    return key.startswith(_PREFIX)


def _value(value: Any) -> float:
    return math.nan if value is None else float(value)


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
