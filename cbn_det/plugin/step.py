"""The training step: losses are checked on all ranks at once, gradients may be accumulated."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..norms import SyncBN2d
from ..run.checkpoint import fit_optimizer_state, parameter_names
from ..run.nonfinite import Diverged, PeerFailed
from ..run.signals import StopRequest


class CheckedStep(SimpleTrainer):
    """A training step whose losses are checked between forward and backward.

    One all-reduce of three numbers tells every rank whether any of them has a loss that is not
    finite, failed in forward, or was asked to stop, so that all leave at the same iteration.

    Its checkpoints leave learning rate, momentum and weight decay to the config that resumes them;
    see :func:`~cbn_det.run.checkpoint.fit_optimizer_state`.

    Args:
        accumulate: mini-batches of the loader that make up a step. Each has a forward, a check and
            a backward pass of its own, the step takes the average of their losses, and ranks
            exchange gradients once, in the last of them.
        mixed_precision: the forward pass runs in ``precision``, with a gradient scaler as in
            detectron2's ``AMPTrainer``. The mini-batches of a step have the same scale, and one
            that overflows skips the whole step.

    Attributes:
        last_batch: the latest mini-batch.
        optimizer_change: what the optimizer of a resumed checkpoint lacked.
    """

    last_batch: Any = None
    optimizer_change = ""
    stop_request: StopRequest = StopRequest()
    stop_agreed = False
    precision = torch.float16

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        accumulate: int = 1,
        mixed_precision: bool = False,
    ) -> None:
        super().__init__(model, loader, optimizer)
        self.accumulate = accumulate
        self.grad_scaler = torch.amp.GradScaler(enabled=mixed_precision)

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        averages: dict[str, Tensor] = {}
        seconds = 0.0
        self.optimizer.zero_grad()
        for left in reversed(range(self.accumulate)):
            started = time.perf_counter()
            self.last_batch = next(self._data_loader_iter)
            seconds += time.perf_counter() - started
            parallel = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if left and parallel else contextlib.nullcontext():
                losses = self._checked_losses()
                self.grad_scaler.scale(sum(losses.values()) / self.accumulate).backward()
            for name, loss in losses.items():
                averages[name] = averages.get(name, 0.0) + loss.detach() / self.accumulate
        self.after_backward()
        self._write_metrics(averages, seconds)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        names = parameter_names(self.optimizer, self._bare_model)
        own = {"parameter_names": names, "grad_scaler": self.grad_scaler.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved, names = state_dict["optimizer"], state_dict.get("parameter_names")
        fitted = fit_optimizer_state(self.optimizer, self._bare_model, saved, names)
        optimizer, self.optimizer_change = fitted
        super().load_state_dict({**state_dict, "optimizer": optimizer})
        if state_dict.get("grad_scaler"):  # a training in full precision has none
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    @property
    def _bare_model(self) -> nn.Module:
        return getattr(self.model, "module", self.model)

    def _checked_losses(self) -> dict[str, Tensor]:
        device, mixed = next(self.model.parameters()).device, self.grad_scaler.is_enabled()
        try:
            with torch.autocast(device.type, self.precision) if mixed else contextlib.nullcontext():
                losses = self.model(self.last_batch)
        except Exception as error:
            # detectron2's RPN refuses proposals that are not finite
            diverged = isinstance(error, FloatingPointError)
            # with a synchronised norm the others wait inside it: this rank cannot tell them
            agreed = comm.get_world_size() == 1 or not has_sync_norm(self.model)
            if agreed:
                self._of_any_rank(diverged, not diverged)
            if diverged:
                raise Diverged(str(error), agreed) from error
            raise
        losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
        bad = [name for name, loss in losses.items() if not math.isfinite(loss.detach())]
        any_bad, any_failed = self._of_any_rank(bool(bad), False)
        if any_failed:
            raise PeerFailed("the forward pass of another rank failed")
        if any_bad:
            raise Diverged(f"losses not finite: {', '.join(bad)}" if bad else "")
        return losses

    def _of_any_rank(self, bad: bool, failed: bool) -> tuple[bool, bool]:
        flags = [bad, failed, self.stop_request.requested]
        if comm.get_world_size() > 1:
            device = next(self.model.parameters()).device
            shared = torch.tensor(flags, dtype=torch.float32, device=device)
            dist.all_reduce(shared)
            flags = (shared > 0).tolist()
        bad, failed, self.stop_agreed = flags
        return bad, failed


def has_sync_norm(model: nn.Module) -> bool:
    """Whether the model's forward communicates with other ranks."""
    return any(
        isinstance(m, nn.SyncBatchNorm)
        or type(m).__name__ == "NaiveSyncBatchNorm"
        or (isinstance(m, SyncBN2d) and m.started)
        for m in model.modules()
    )
