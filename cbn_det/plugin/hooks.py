"""Hooks of the training loop, in the order in which the trainer runs them."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from fvcore.common.checkpoint import PeriodicCheckpointer

from ..norms import norm_diagnostics, sync_running_stats
from ..run.metrics_file import cut
from ..run.nonfinite import check_state
from ..run.precise_bn import recompute_statistics
from ..run.signals import Interrupted
from .loading import place

_WINDOW = 20  # iterations that a logged value is the median of
_CLOCKS = ("time", "eta_seconds")  # a new process measures anew


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


def report_norms(trainer: Any, period: int) -> None:
    """What the norms report of themselves, for TensorBoard and ``metrics.json``."""
    if (trainer.iter + 1) % period == 0:
        trainer.storage.put_scalars(**norm_diagnostics(trainer.bare_model))


class Save(HookBase):
    """Before an evaluation or a checkpoint pools running statistics over ranks and checks numbers,
    then saves; leaves the loop once a rank was asked to stop.

    Runs on all ranks: each leaves what it alone knows before rank 0 saves. Stands after PreciseBN
    and before whoever evaluates.
    """

    def after_step(self) -> None:
        trainer, done = self.trainer, self.trainer.iter + 1
        stopping = trainer.step.stop_agreed  # all ranks
        period, last = trainer.cfg.SOLVER.CHECKPOINT_PERIOD, done == trainer.max_iter
        evaluating = last or _divides(trainer.cfg.TEST.EVAL_PERIOD, done)
        saving = last or _divides(period, done)
        if stopping and not (evaluating or saving):
            trainer.keep_buffers()  # a run that goes on does not pool them here
        if stopping or evaluating or saving:
            sync_running_stats(trainer.bare_model)
            check_state(trainer.bare_model)
        if stopping or saving:
            trainer.save_rank()
        if saving:
            PeriodicCheckpointer(trainer.checkpointer, period, trainer.max_iter).step(trainer.iter)
        elif stopping:
            trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        if stopping:
            raise Interrupted(f"interrupted at iteration {trainer.iter}")


def _divides(period: int, iterations: int) -> bool:
    return period > 0 and iterations % period == 0


class EvalHook(hooks.EvalHook):
    """detectron2's hook, but it does not evaluate after a failure in the last iteration."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class Reports(hooks.PeriodicWriter):
    """detectron2's ``PeriodicWriter``, which can take back what it wrote."""

    def go_back(self, iteration: int) -> None:
        """Takes back the lines of this iteration and later ones, and what a killed process left of
        a line."""
        last = -1
        for writer in self._writers:  # the JSONWriter comes first
            if isinstance(writer, JSONWriter):
                last = writer._last_write = cut(Path(writer._file_handle.name), iteration)
            elif isinstance(writer, TensorboardXWriter):
                writer._writer_args["purge_step"] = max(iteration, 0)
                writer._last_write = last


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
