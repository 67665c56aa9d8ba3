"""What a run writes as it goes, which a resumed run continues as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from detectron2.engine import hooks
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter

_WINDOW = 20  # iterations that a logged value is the median of
_CLOCKS = ("time", "eta_seconds")  # a new process measures anew


class Reports(hooks.PeriodicWriter):
    """detectron2's ``PeriodicWriter``, which can take back what it wrote."""

    def go_back(self, iteration: int) -> None:
        """Takes back the lines of this iteration and later ones, and what a killed process left of
        a line."""
        last = -1
        for writer in self._writers:  # the JSONWriter comes first
            if isinstance(writer, JSONWriter):
                path = Path(writer._file_handle.name)
                size = 0
                for line in path.read_bytes().splitlines(keepends=True):
                    written = _iteration_of(line)
                    if written >= iteration:
                        break  # what stands behind is written again, of earlier iterations too
                    size, last = size + len(line), max(last, written)
                os.truncate(path, size)  # the writer appends, wherever the end is
                writer._last_write = last
            elif isinstance(writer, TensorboardXWriter):
                writer._writer_args["purge_step"] = max(iteration, 0)
                writer._last_write = last


def _iteration_of(line: bytes) -> float:
    """Infinite for a line that is none."""
    try:
        return json.loads(line)["iteration"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError):
        return math.inf


def storage_state(storage: EventStorage) -> dict[str, Any]:
    """What later lines will be made of: plain lists and dicts."""
    kept = [name for name in storage.latest() if name not in _CLOCKS]
    return {
        "values": {name: _recent(storage.history(name).values()) for name in kept},
        "latest": {name: storage.latest()[name] for name in kept},
        "smoothed": {name: storage.smoothing_hints()[name] for name in kept},
    }


def load_storage_state(storage: EventStorage, state: dict[str, Any]) -> None:
    """Puts what :func:`storage_state` returned into a new storage."""
    for name, values in state["values"].items():
        for value, at in values:
            storage.put_scalar(name, value, state["smoothed"][name], cur_iter=at)
    # in the order in which they came, which is that of the lines
    storage._latest_scalars.clear()
    storage._latest_scalars.update({name: tuple(pair) for name, pair in state["latest"].items()})


def _recent(values: list[tuple[float, float]]) -> list[tuple[float, int]]:
    first = values[-1][1] - _WINDOW + 1
    newest_first = takewhile(lambda pair: pair[1] >= first, reversed(values))
    return [(value, int(at)) for value, at in newest_first][::-1]
