"""The launcher of a training on detectron2 in which the errors of statistics are measured.

python benchmarks/statistics_run.py --statistics-error JSON LAUNCHER-ARGUMENTS

JSON is an object with the attributes of :class:`~shadow_errors.Request`.
statistics_error.py calls it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import clone  # noqa: F401
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from shadow_errors import FILE, Request, StatisticsError

from cbn_det.launch import main as launch
from cbn_det.plugin import job
from cbn_det.plugin.loading import place
from cbn_det.plugin.trainer import Trainer
from cbn_det.run.errors import ConfigError


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


class MeasuringTrainer(Trainer):
    """Measures what `request` asks for while it trains."""

    request: Request

    def resume_or_load(self, resume: bool = True) -> Any:
        if not resume:
            Path(self.cfg.OUTPUT_DIR, FILE).unlink(missing_ok=True)
        self.register_hooks([StatisticsHook(self, self.request)])
        return super().resume_or_load(resume=resume)


def main(words: list[str]) -> int:
    """Trains and returns the launcher's exit code."""
    at = words.index("--statistics-error")
    MeasuringTrainer.request = Request(**json.loads(words[at + 1]))
    job.Trainer = MeasuringTrainer
    try:
        return launch([*words[:at], *words[at + 2 :]])
    finally:
        job.Trainer = Trainer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
