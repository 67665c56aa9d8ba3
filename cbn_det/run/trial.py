"""A training that is only tried: what ``cbn-det check`` and the benchmark ask of an engine."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path

from torch import nn

from ..data import CocoReport
from .job import Job, built


class Trial:
    """The training of a job in one process of however many it will have. Nothing is written to
    ``OUTPUT_DIR``.

    Args:
        notes: a line for everything that was replaced because this machine lacks it.
        world_size: processes of the training.

    Attributes:
        cfg: read and checked, frozen.
        optimizer: known once it was built.
        unused_norms: config keys that name a norm of which the built model has no layer.
    """

    def __init__(self, job: Job, notes: list[str], world_size: int = 1) -> None:
        self._job = job
        self.cfg = job.cfg
        self.notes = notes
        self.world_size = world_size

    def prepare(self) -> dict[str, CocoReport]:
        """See :meth:`.job.Job.prepare`."""
        return built(lambda: self._job.prepare(eval_only=False))

    def build(self, folder: Path, load_weights: bool) -> nn.Module:
        """The model to train, on its device, as one process has it. What an engine cannot help
        writing goes to ``folder``.

        Raises:
            ValueError: it cannot be built from the config, or the weights do not fit.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        # what one process has of the batch, which is scaled already
        cfg.SOLVER.IMS_PER_BATCH //= self.world_size
        cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
        cfg.OUTPUT_DIR = str(folder)
        cfg.freeze()
        trainer = self._trainer = built(lambda: self._job.build_trainer(cfg))
        if load_weights:
            built(lambda: self._job.load(trainer, resume=False))
        self._batches = trainer.batches()
        self.optimizer, self.unused_norms = trainer.optimizer, trainer.unused_norms
        return trainer.bare_model.train()

    def repeat(self, batches: int) -> None:
        """Reads so many mini-batches; the steps take them in turn from now on."""
        self._batches = cycle(list(islice(self._batches, batches)))

    def step(self, iteration: int) -> None:
        """One training step on the next mini-batches."""
        self._trainer.try_step(iteration, self._batches)
