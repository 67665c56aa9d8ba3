"""Hooks of the training loop, in the order in which the trainer runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..norms import norm_diagnostics, sync_running_stats
from ..run.clock import RunClock
from ..run.freeze import FreezeStatistics
from ..run.nonfinite import check_state
from ..run.precise_bn import recompute_statistics
from ..run.signals import Interrupted
from .loading import place, seed_step


class ClockHook(HookBase):
    """Keeps the run's clock. Stands first, so that a step's time is its own."""

    def __init__(self, clock: RunClock) -> None:
        self._clock = clock
        self.before_train = clock.start
        self.before_step = clock.start_step
        self.after_step = clock.end_step
        self.after_train = clock.stop

    def state_dict(self) -> dict[str, Any]:
        return self._clock.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clock.load_state_dict(state)


class PreciseBN(hooks.PreciseBN):
    """``TEST.PRECISE_BN`` that survives iterations without a RoI and norms called twice, and takes
    the same images every time, so that a resumed run takes them too."""

    def update_stats(self) -> None:
        if self._disabled:
            return
        place(self._data_loader, self.trainer.seed)
        with EventStorage():  # what heads log of these forwards is dropped
            count = recompute_statistics(self._model, iter(self._data_loader), self._num_iter)
        self._logger.info(f"PreciseBN: {count} layers over {self._num_iter} iterations")


class Freeze(HookBase):
    """Freezes norms with ``freeze`` when their time has come, on the images and random numbers that
    a resumed run takes, too.

    Args:
        build_loader: makes a loader of training batches.
        iterations: how many of them statistics are computed over.
    """

    def __init__(
        self, model: nn.Module, max_iter: int, build_loader: Callable[[], Any], iterations: int
    ) -> None:
        self._freeze = FreezeStatistics(model, max_iter, self._batches, iterations)
        self._build_loader = build_loader

    def before_step(self) -> None:
        with EventStorage():  # what heads log of these forwards is dropped
            self._freeze.before_step(self.trainer.iter)

    def _batches(self) -> Iterator[Any]:
        seed_step(self.trainer.seed, comm.get_rank(), self.trainer.iter)
        loader = self._build_loader()
        place(loader, self.trainer.seed)
        return iter(loader)


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
        trainer = self.trainer
        done = trainer.iter + 1
        due = done == trainer.max_iter or any(done % period == 0 for period in self._periods)
        if trainer.stopping and not due:
            trainer.keep_buffers()  # a run that goes on does not pool them here
        if due or trainer.stopping:
            sync_running_stats(trainer.bare_model)
            check_state(trainer.bare_model)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """detectron2's hook, on all ranks: each leaves what it alone knows before rank 0 saves."""

    def step(self, iteration: int, **kwargs: Any) -> None:
        if (iteration + 1) % self.period == 0 or iteration >= self.max_iter - 1:
            self.trainer.save_rank()
        super().step(iteration, **kwargs)


class StopOnRequest(HookBase):
    """Saves and leaves the loop once a rank was asked to stop. Stands after the checkpointer."""

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.stopping:
            if trainer.iter + 1 < trainer.max_iter:  # else it is saved
                trainer.save_rank()
                trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            raise Interrupted(f"interrupted at iteration {trainer.iter}")


class EvalHook(hooks.EvalHook):
    """detectron2's hook, but it does not evaluate after a failure in the last iteration."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
