"""Measuring how far norms' statistics are from the truth, in a training on detectron2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..run.errors import ConfigError
from ..run.statistics_error import Request, StatisticsError
from .loading import place
from .trainer import Trainer


class StatisticsHook(HookBase):
    """Measures what ``request`` asks for before the iterations that it names.

    Args:
        trainer: whose hook this becomes. One process; it calls ``resume_or_load()`` afterwards.

    Raises:
        ConfigError: there are several processes, or a norm cannot be measured.
    """

    def __init__(self, trainer: Trainer, request: Request) -> None:
        if comm.get_world_size() > 1:
            raise ConfigError("--statistics-error is for one process")
        cfg = trainer.cfg
        self._measured = StatisticsError(
            trainer.bare_model,
            trainer.double_forward,
            request,
            trainer.max_iter,
            cfg.SOLVER.IMS_PER_BATCH,
            Path(cfg.OUTPUT_DIR),
        )
        self._loader = trainer.build_train_loader(cfg)

    def before_step(self) -> None:
        trainer = self.trainer
        if not self._measured.due(trainer.iter):
            return
        place(self._loader, trainer.seed, trainer.max_iter * trainer.step.accumulate)
        model = trainer.bare_model
        device, amp = next(model.parameters()).device.type, trainer.cfg.SOLVER.AMP.ENABLED
        with EventStorage(), torch.autocast(device, enabled=amp):  # what heads log is dropped
            self._measured.measure(trainer.iter, iter(self._loader), model)

    def after_train(self) -> None:
        self._measured.remove()

    def state_dict(self) -> dict[str, Any]:
        # as large as the model several times over, and after the last iteration of no use
        return self._measured.state_dict() if self.trainer.iter + 1 < self.trainer.max_iter else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._measured.load_state_dict(state)
