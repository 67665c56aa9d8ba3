"""Checkpoints that a training goes on from as if it had never stopped."""

from __future__ import annotations

import logging
import os
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch import Tensor, nn

from ..run.checkpoint import load_norm_state, norm_state, settings, settings_changes
from ..run.errors import one_line
from ..run.files import replace_file
from ..run.measure import RunClock
from .checkpointer import check_weights
from .hooks import Reports, Save, load_storage_state, storage_state
from .loading import ResumableLoader
from .step import CheckedStep

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """detectron2's trainer, whose checkpoints hold all that iterations leave to later ones.

    A training that was killed at any moment and resumed gives the weights and losses of one that
    was not, bit for bit on CPU, with the same number of processes and threads. What an iteration
    works with besides depends on the seed and its number alone (:mod:`.loading`). What rank 0
    cannot know of the others, their norms' memory and running statistics, each leaves in a file of
    its own beside the checkpoint (on its machine, where machines do not share the folder). What
    hooks behind :class:`.hooks.Save` do in the iteration of a checkpoint (an evaluation, a line of
    ``metrics.json``) comes after it was saved, and is done again.

    A subclass with a ``build_train_loader`` of its own is exact if that gives what
    :func:`.loading.build_loader` makes, which takes a mapper. Where something starts anew, because
    the checkpoint is of another number of processes, of other norms or another seed, a warning says
    what.

    Attributes:
        seed: of images and training steps: ``SEED``, or a random one that is kept at resume.
    """

    bare_model: nn.Module
    clock: RunClock
    reports: Reports | None
    step: CheckedStep

    def _prepare_to_resume(self, seed: int) -> None:
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self._run = comm.all_gather(os.urandom(8).hex())[0]  # what is saved together has it
        self._last_save = -1
        self._own_buffers: dict[str, Tensor] | None = None
        self._resuming = False
        self._saved_storage: dict[str, Any] | None = None

    def resume_or_load(self, resume: bool = True) -> None:
        """See ``DefaultTrainer``. Without a checkpoint to resume, training starts anew.

        Raises:
            ValueError: the checkpoint is of another model, not all processes find it, or
                ``MODEL.WEIGHTS`` does not fit the norms (:func:`.checkpointer.check_weights`).
        """
        found = comm.all_gather(Path(self.checkpointer.get_checkpoint_file()).name)
        if resume and len(set(found)) > 1:
            other = next(rank for rank, name in enumerate(found) if name != found[0])
            raise ValueError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}: the last checkpoint that rank 0 finds is"
                f" '{found[0]}', rank {other} finds '{found[other]}'. A machine that does not share"
                " the folder needs a copy of rank 0's checkpoint and last_checkpoint"
            )
        super().resume_or_load(resume)
        self._resuming = resume
        resumed = resume and self.checkpointer.has_checkpoint()
        if self.checkpointer.incompatible is not None and not resumed:
            check_weights(self.bare_model, self.checkpointer.incompatible, self.cfg)

    def _end_saved_iteration(self) -> None:
        """Does what an unbroken run does between saving in an iteration and the next one: lines
        that are on file already are taken back, and the hooks that stand behind the checkpointers
        run, again where they had run before the training was broken off."""
        if self.start_iter and self._saved_storage is None:
            return  # detectron2's own checkpoint does not say what the next lines are made of
        self.iter = self.storage.iter = self.start_iter - 1
        if self.reports:
            self.reports.go_back(self.iter)
        if self.start_iter:
            if self.reports:
                load_storage_state(self.storage, self._saved_storage)
            behind = dropwhile(lambda hook: not isinstance(hook, Save), self._hooks)
            for hook in islice(behind, 1, None):
                hook.after_step()
        self.iter = self.start_iter

    def keep_buffers(self) -> None:
        """Before the ranks' running statistics are pooled for a checkpoint alone: a resumed run
        goes on with those of now."""
        self._own_buffers = _buffers(self.bare_model)

    def save_rank(self) -> None:
        """Leaves what this rank knows for the checkpoint of this iteration, which may be saved once
        this returns. All ranks must call it."""
        path = self._rank_file(self.iter)
        if comm.get_rank():
            data = {"run": self._run, "iteration": self.iter, **self._rank_state()}
            path.parent.mkdir(parents=True, exist_ok=True)  # rank 0 may have, on another machine
            replace_file(path, lambda file: torch.save(data, file))
        comm.synchronize()
        if comm.get_rank():
            # they may hold much. Rank 0 is done with the save before this one, and may never finish
            # this one; any other checkpoint can be resumed without
            kept = {path, self._rank_file(self._last_save)}
            for old in path.parent.glob(f"rank{comm.get_rank()}_{'[0-9]' * 7}.pth"):
                if old not in kept:
                    old.unlink(missing_ok=True)
        self._last_save = self.iter

    def _rank_file(self, iteration: int) -> Path:
        return Path(self.cfg.OUTPUT_DIR, f"rank{comm.get_rank()}_{iteration:07d}.pth")

    def _read_rank_file(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """What this rank left with a checkpoint; or the checkpoint, and why that is not known."""
        path = self._rank_file(checkpoint["iteration"])
        why = "was not written with this checkpoint"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if all(state[key] == checkpoint[key] for key in ("run", "iteration")):
                return state, ""
        except Exception as error:  # whatever the bytes of a broken or foreign file make it do
            why = f"cannot be read ({one_line(error)[:200]})"
        rank = comm.get_rank()
        return (
            checkpoint,
            f"{path} {why}: rank {rank} goes on with what the norms of rank 0 remember",
        )

    def state_dict(self) -> dict[str, Any]:
        state = {
            **super().state_dict(),
            **self._rank_state(),
            "clock": self.clock.state_dict(),
            "run": self._run,
            "world_size": comm.get_world_size(),
            "settings": settings(self.cfg, self.seed, self.step.accumulate),
        }
        if self.reports and hasattr(self, "storage"):
            state["storage"] = storage_state(self.storage)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rates = list(getattr(self.scheduler, "base_lrs", ()))
        super().load_state_dict(state_dict)
        if isinstance(self.scheduler, LRMultiplier):  # the config's, not the checkpoint's
            self.scheduler.base_lrs = rates
            for group, rate in zip(
                self.optimizer.param_groups, self.scheduler.get_lr(), strict=True
            ):
                group["lr"] = rate
        self._last_save = self.iter
        self._saved_storage = state_dict.get("storage")
        self.clock.load_state_dict(state_dict.get("clock", {}))
        saved = state_dict.get("settings", {})
        if self.cfg.SEED < 0:
            self.seed = saved.get("SEED", self.seed)
        changes = self._load_rank_state(state_dict)
        changes += settings_changes(saved, settings(self.cfg, self.seed, self.step.accumulate))
        changes.append(self.step.optimizer_change)
        if not isinstance(self.data_loader, ResumableLoader):
            changes.append("the training loader cannot go on where it was: it starts anew")
        if any(changes):
            why = "; ".join(filter(None, changes))
            logger.warning(f"the checkpoint cannot be resumed exactly: {why}")

    def _rank_state(self) -> dict[str, Any]:
        state = {**norm_state(self.bare_model), "normalizers": _normalizers(self.bare_model)}
        if comm.get_world_size() > 1:
            state["buffers"] = self._own_buffers or _buffers(self.bare_model)
        return state

    def _load_rank_state(self, state: dict[str, Any]) -> list[str]:
        """Restores what the iterations before leave to this rank; returns what it could not, of all
        ranks."""
        schedule = (state["iteration"] + 1, self.cfg.SOLVER.MAX_ITER)
        if "norm_memory" not in state:  # detectron2's own
            return [load_norm_state(self.bare_model, state, *schedule)]
        rank, ranks = comm.get_rank(), comm.get_world_size()
        changes, mine, trouble = [], state, ""
        same_ranks = state["world_size"] == ranks
        if not same_ranks:
            changes.append(
                f"it was written by {state['world_size']} processes, now there are {ranks}: images"
                " are shared out anew, every rank goes on with what the norms of rank 0 remember"
            )
        elif rank:
            mine, trouble = self._read_rank_file(state)
        changes += comm.all_gather(trouble)
        changes.append(load_norm_state(self.bare_model, mine, *schedule))
        for name, value in mine["normalizers"].items():
            self.bare_model.get_submodule(name).loss_normalizer = value
        if same_ranks and not trouble:
            saved = mine.get("buffers", {})
            for name, buffer in self.bare_model.named_buffers():
                if name in saved and saved[name].shape == buffer.shape:
                    buffer.copy_(saved[name])
        return changes


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies: ranks have running statistics of their own."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _normalizers(model: nn.Module) -> dict[str, float]:
    """What RetinaNet and FCOS divide their losses by, by name of the module: an average over
    iterations, of this rank's images, in an attribute that is no buffer."""
    return {
        name: module.loss_normalizer
        for name, module in model.named_modules()
        if isinstance(module, DenseDetector) and hasattr(module, "loss_normalizer")
    }
