"""The one hook that somebody else's detectron2 trainer needs for our norms."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..norms import (
    DoubleForward,
    check_bindings,
    find_chain_at_call,
    resolve_burn_in,
    sync_running_stats,
)
from ..run.checkpoint import load_norm_state, norm_state
from ..run.norm_schedule import NormSchedule

logger = logging.getLogger(__name__)

_FIRST = "return [cbn_det.NormHook(self.model), *super().build_hooks()]"


class NormHook(HookBase):
    """Gives the norms of a model what they need of a training loop; for any detectron2 trainer.

    Add it on all ranks, first in the list::

        def build_hooks(self):
            return [cbn_det.NormHook(self.model), *super().build_hooks()]

    It tells the layers how long training is, runs MBN's second forward pass after each step,
    freezes norms with ``freeze`` and starts SyncBN with ``start`` at their time, and pools running
    statistics over ranks before each evaluation and checkpoint. It takes their periods from the
    hooks behind it: from the attribute ``period`` or ``_period``, which those of detectron2 have
    and one of your own may have. The trainer's checkpoints hold what the norms remember, and a
    resumed training goes on with it (on several ranks, with that of rank 0).

    One iteration of the trainer must be one optimiser step. If you wrap the model in a
    DistributedDataParallel yourself, pass it ``broadcast_buffers=False``, as detectron2 does.

    Args:
        model: on its device; a DistributedDataParallel of it will do.

    Raises:
        ValueError: a norm that needs its convolution is bound to none; when training starts: a hook
            that saves or evaluates stands before this one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        check_bindings(self._model)
        find_chain_at_call(self._model)
        proposals = getattr(self._model, "proposal_generator", None)
        self._double_forward = DoubleForward(self._model, proposals)
        self._periods: set[int] = set()
        self._saved: dict[str, Any] | None = None
        self._norm_schedule: NormSchedule | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        place = next(i for i, hook in enumerate(trainer._hooks) if hook is self)
        early = next((h for h in trainer._hooks[:place] if _periods([h])), None)
        if early is not None:
            raise ValueError(
                f"{type(early).__name__} saves or evaluates before NormHook has finished the"
                f" iteration: put NormHook first, {_FIRST}"
            )
        # rank 0 alone has the hook that saves
        self._periods = set().union(*comm.all_gather(_periods(trainer._hooks)))
        resolve_burn_in(self._model, trainer.max_iter, trainer.start_iter)
        config = getattr(trainer, "cfg", None)  # a LazyConfig's trainer has none
        self._norm_schedule = NormSchedule(
            self._model,
            trainer.max_iter,
            lambda: iter(trainer.data_loader),
            config.TEST.PRECISE_BN.NUM_ITER if config else 200,
        )
        if self._saved is not None:
            schedule = trainer.start_iter, trainer.max_iter
            change = load_norm_state(self._model, self._saved, *schedule)
            self._saved = None
            if change:
                logger.warning(f"the norms cannot be resumed exactly: {change}")

    def before_step(self) -> None:
        with EventStorage():  # what heads log of these forwards is dropped
            self._norm_schedule.before_step(self.trainer.iter)

    def after_step(self) -> None:
        with EventStorage():  # what heads log of the second pass is dropped
            self._double_forward.refresh()
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            sync_running_stats(self._model)

    def state_dict(self) -> dict[str, Any]:
        return norm_state(self._model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state  # the schedule is known when training starts


def _periods(several: Iterable[HookBase]) -> set[int]:
    """Of the hooks that save or evaluate, in iterations."""
    others = (hooks.PeriodicWriter, hooks.PreciseBN)
    found = (
        getattr(hook, "period", getattr(hook, "_period", 0))
        for hook in several
        if not isinstance(hook, others)
    )
    return {period for period in found if isinstance(period, int) and period > 0}
