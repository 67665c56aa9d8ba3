"""What a training run writes as it goes: ``metrics.json``, TensorBoard events, lines of the log."""

from __future__ import annotations

import json
import logging
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..run.metrics_file import cut

logger = logging.getLogger(__name__)

_FILE = "metrics.json"
_WINDOW = 20  # iterations that a logged value is the median of, as in detectron2


class Metrics:
    """Collects scalars and writes them out.

    A line of ``metrics.json`` holds everything put since the line before: losses as the median of
    the latest 20 iterations, everything else as it is.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._losses: dict[str, deque[float]] = {}
        self._latest: dict[str, float] = {}

    @contextmanager
    def writing(self, start: int) -> Iterator[bool]:
        """Opens the files, within which :meth:`write` works.

        Args:
            start: the iteration that writing begins at; later lines of an earlier part are removed.

        Yields:
            whether an earlier part has written its line for iteration ``start - 1``.
        """
        path = self._folder / _FILE
        written = cut(path, start) == start - 1 >= 0
        with ExitStack() as stack:
            self._file = stack.enter_context(open(path, "a", encoding="utf-8"))
            self._events = None
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                logger.warning(f"no TensorBoard events are written: {error}")
            else:
                writer = SummaryWriter(str(self._folder), purge_step=start)
                self._events = stack.enter_context(writer)
            yield written

    def begin_line(self) -> None:
        """What was put for the line before is on file."""
        self._latest = {}

    def put_losses(self, losses: Mapping[str, float]) -> None:
        """Of one iteration; their sum is written as ``total_loss``."""
        for name, value in {**losses, "total_loss": sum(losses.values())}.items():
            self._losses.setdefault(name, deque(maxlen=_WINDOW)).append(value)

    def put(self, values: Mapping[str, Any]) -> None:
        """Of a table within, the AP of a task or of a test set, as ``bbox/AP``."""
        self._latest.update(_flat(values))

    def write(self, iteration: int) -> dict[str, float]:
        """Writes a line for an iteration and returns it."""
        losses = {name: statistics.median(values) for name, values in self._losses.items()}
        line = {"iteration": iteration, **losses, **self._latest}
        self._file.write(json.dumps(line, sort_keys=True) + "\n")
        self._file.flush()
        if self._events:
            for name, value in line.items():
                self._events.add_scalar(name, value, iteration)
        self.begin_line()
        return line

    def state_dict(self) -> dict[str, Any]:
        """What the next line will be made of."""
        return {
            "losses": {name: list(values) for name, values in self._losses.items()},
            "latest": dict(self._latest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = {k: deque(values, maxlen=_WINDOW) for k, values in state["losses"].items()}
        self._latest = dict(state["latest"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}/") if inner else {f"{prefix}{key}": value}
    return flat
