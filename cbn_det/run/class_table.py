"""AP of each class as a table, worst first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import zip_longest
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
    tasks = [t for t, values in results.items() if any(k.startswith(_PREFIX) for k in values)]
    names = dict.fromkeys(k for task in tasks for k in results[task] if k.startswith(_PREFIX))
    if not names:
        return ""
    table = [(name, *(results[task].get(name) for task in tasks)) for name in names]
    lines = [(name, *(math.nan if ap is None else ap for ap in aps)) for name, *aps in table]
    lines.sort(key=lambda line: (math.isnan(line[1]), line[1]))
    cells = [
        [name.removeprefix(_PREFIX), *("-" if math.isnan(ap) else f"{ap:.1f}" for ap in aps)]
        for name, *aps in lines
    ]
    length = -(-len(cells) // _COLUMNS)
    columns = [cells[start : start + length] for start in range(0, len(cells), length)]
    rows = [sum(row, []) for row in zip_longest(*columns, fillvalue=[""] * len(cells[0]))]
    headers = ["class", *(_NAMES.get(task, f"{task} AP") for task in tasks)] * len(columns)
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
