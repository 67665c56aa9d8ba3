"""Hooks of the training loop, in the order in which the trainer runs them."""

from __future__ import annotations

import time
from typing import Any

from detectron2.engine import HookBase, hooks

from ..norms import norm_diagnostics, sync_running_stats
from .measure import peak_memory_mb
from .nonfinite import check_state
from .precise_bn import recompute_statistics
from .signals import Interrupted

_WARM_UP = 3  # iterations that are not timed, as in detectron2's IterationTimer


class RunClock(HookBase):
    """Seconds of training, summed over resumed parts, and the peak memory of this part.

    Stands first, so that a step's time is its own.
    """

    train_seconds = 0.0
    timed_seconds = 0.0
    timed_iterations = 0
    peak_memory_mb: float | None = None
    _started: float | None = None

    def before_train(self) -> None:
        self._started = time.perf_counter()

    def before_step(self) -> None:
        self._step_started = time.perf_counter()

    def after_step(self) -> None:
        if self.trainer.iter >= self.trainer.start_iter + _WARM_UP:
            self.timed_seconds += time.perf_counter() - self._step_started
            self.timed_iterations += 1

    def after_train(self) -> None:
        self._add_elapsed()
        self.peak_memory_mb = peak_memory_mb()  # before the final evaluation adds its own

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


class PreciseBN(hooks.PreciseBN):
    """``TEST.PRECISE_BN`` that survives iterations without a RoI and norms called twice."""

    def update_stats(self) -> None:
        if self._disabled:
            return
        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        count = recompute_statistics(self._model, self._data_iter, self._num_iter)
        self._logger.info(f"PreciseBN: {count} layers over {self._num_iter} iterations")


class NormDiagnostics(HookBase):
    """What the norms report of themselves, for TensorBoard and ``metrics.json``."""

    def __init__(self, period: int) -> None:
        self._period = period

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._period == 0:
            self.trainer.storage.put_scalars(**norm_diagnostics(self.trainer.bare_model))


class SettleStatistics(HookBase):
    """Before an evaluation or a checkpoint, pools running statistics over ranks and checks numbers.

    Runs on all ranks; stands after PreciseBN and before whoever evaluates or saves.
    """

    def __init__(self, *periods: int) -> None:
        self._periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        due = any(done % period == 0 for period in self._periods)
        if due or done == self.trainer.max_iter or self.trainer.stopping:
            sync_running_stats(self.trainer.bare_model)
            check_state(self.trainer.bare_model)


class StopOnRequest(HookBase):
    """Saves and leaves the loop once a rank was asked to stop. Stands after the checkpointer."""

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.stopping and trainer.iter + 1 < trainer.max_iter:
            trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            raise Interrupted(f"interrupted at iteration {trainer.iter}")


class EvalHook(hooks.EvalHook):
    """detectron2's hook, but it does not evaluate after a failure in the last iteration."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
