"""What a run writes as it goes, continued by a resumed run as if nothing had happened."""

from __future__ import annotations

import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from detectron2.engine import hooks
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter

_WINDOW = 20  # iterations that a logged value is the median of
_CLOCKS = ("time", "eta_seconds")  # a new process measures anew


class Reports(hooks.PeriodicWriter):
    """detectron2's ``PeriodicWriter``, whose state is part of a checkpoint."""

    def __init__(self, writers: list[EventWriter], period: int) -> None:
        super().__init__(writers, period)
        self._json = [w for w in writers if isinstance(w, JSONWriter)]
        self._counting = [w for w in writers if isinstance(w, (JSONWriter, TensorboardXWriter))]

    def position(self) -> dict[str, Any]:
        """How far the writers have got."""
        return {
            "sizes": [_path(writer).stat().st_size for writer in self._json],
            "last": [writer._last_write for writer in self._counting],
        }

    def go_back(self, position: dict[str, Any] | None, iteration: int) -> None:
        """Removes the lines that were written after a checkpoint.

        Args:
            position: at that checkpoint; None for the very beginning.
            iteration: that the checkpoint was written in.
        """
        position = position or {"sizes": [0] * len(self._json), "last": [-1] * len(self._counting)}
        for writer, size in zip(self._json, position["sizes"], strict=True):
            if _path(writer).stat().st_size > size:  # not if somebody else shortened it
                os.truncate(_path(writer), size)  # the writer appends, wherever the end is
        for writer, last in zip(self._counting, position["last"], strict=True):
            writer._last_write = last
            if isinstance(writer, TensorboardXWriter):
                writer._writer_args["purge_step"] = max(iteration, 0)


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


def _path(writer: JSONWriter) -> Path:
    return Path(writer._file_handle.name)
