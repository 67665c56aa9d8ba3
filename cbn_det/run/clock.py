"""How long training takes."""

from __future__ import annotations

import time
from typing import Any

from .measure import peak_memory_mb

_WARM_UP = 3  # iterations that are not timed, as in detectron2's IterationTimer


class RunClock:
    """Seconds of training, summed over resumed parts, and the peak memory of this part (MiB)."""

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.timed_seconds = 0.0
        self.timed_iterations = 0
        self.peak_memory_mb: float | None = None
        self._started: float | None = None
        self._steps = 0

    def start(self) -> None:
        """Training begins."""
        self._started = time.perf_counter()
        self._steps = 0

    def start_step(self) -> None:
        self._step_started = time.perf_counter()

    def end_step(self) -> None:
        if self._steps >= _WARM_UP:
            self.timed_seconds += time.perf_counter() - self._step_started
            self.timed_iterations += 1
        self._steps += 1

    def stop(self) -> None:
        """Training ends; called before the final evaluation, which uses memory of its own."""
        self._add_elapsed()
        self.peak_memory_mb = peak_memory_mb()

    @property
    def sec_per_iter(self) -> float | None:
        return self.timed_seconds / self.timed_iterations if self.timed_iterations else None

    def state_dict(self) -> dict[str, Any]:
        if self._started is not None:
            self._add_elapsed()
        names = ("train_seconds", "timed_seconds", "timed_iterations")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _add_elapsed(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._started
        self._started = now
