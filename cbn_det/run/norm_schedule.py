"""What norms do at a time of the schedule: ``freeze``, for which statistics are computed anew for
the last time, and SyncBN's ``start``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..norms import SyncBN2d
from ..norms.freeze import Freezable, with_freeze
from .precise_bn import recompute_statistics

logger = logging.getLogger(__name__)


class NormSchedule:
    """Does for the norms of a model what their time has come for: freezes those that have the
    option ``freeze``, and starts those that have ``start``::

        schedule = NormSchedule(model, max_iter, lambda: batches(train_set))
        for i in range(max_iter):
            schedule.before_step(i)
            ...

    Args:
        model: the bare model, with its norms.
        max_iter: iterations of the schedule that ``freeze`` and ``start`` are fractions of.
        batches: gives what yields training batches, each time from the same one on.
        iterations: how many of them statistics are computed over, on each rank.
        forward: runs the model on a batch; the model itself by default.
    """

    def __init__(
        self,
        model: nn.Module,
        max_iter: int,
        batches: Callable[[], Iterable[Any]],
        iterations: int = 200,
        forward: Callable[[Any], Any] | None = None,
    ) -> None:
        self._model, self._batches = model, batches
        self._iterations, self._forward = iterations, forward
        self._layers = list(with_freeze(model).values())
        for layer in self._layers:
            layer.freeze_steps = round(layer.freeze * max_iter)
        self._starting = [layer for layer in _synchronised(model) if layer.start > 0.0]
        for layer in self._starting:
            layer.start_steps = round(layer.start * max_iter)

    def due(self, iteration: int) -> list[Freezable]:
        """The layers to be frozen before an iteration. A resumed training may be past their
        time."""
        return [m for m in self._layers if not m.frozen and m.freeze_steps <= iteration]

    def before_step(self, iteration: int) -> int:
        """Freezes what is due before an iteration. Every rank must call it.

        Returns:
            The number of layers frozen.

        Raises:
            ValueError: ``batches`` ended early.
        """
        for layer in self._starting:
            layer.started = iteration >= layer.start_steps
        due = self.due(iteration)
        if due:
            # a frozen part of the model (FREEZE_AT, eval()) keeps its statistics
            trained = [layer for layer in due if layer.training]
            batches = self._batches()
            recompute_statistics(self._model, batches, self._iterations, self._forward, trained)
            for layer in due:
                layer.freeze_statistics()
            logger.info(
                f"iteration {iteration}: the statistics of {len(due)} norms are fixed from now on,"
                f" computed over {self._iterations} iterations"
            )
        return len(due)


def as_at_the_end(model: nn.Module) -> None:
    """Puts the norms of a trained model, which was loaded, to what they had become."""
    for frozen in with_freeze(model).values():
        frozen.freeze_statistics()
    for synced in _synchronised(model):
        synced.started = True


def _synchronised(model: nn.Module) -> list[SyncBN2d]:
    return [m for m in model.modules() if isinstance(m, SyncBN2d)]
