"""The training step: losses are checked on all ranks at once."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ..run.nonfinite import Diverged, PeerFailed
from ..run.signals import StopRequest


class CheckedStep(SimpleTrainer):
    """A training step whose losses are checked between forward and backward.

    One all-reduce of three numbers tells every rank whether any of them has a loss that is not
    finite, failed in forward, or was asked to stop, so that all leave at the same iteration.
    """

    last_batch: Any = None
    bad_losses: tuple[str, ...] = ()
    stop_request: StopRequest = StopRequest()
    stop_agreed = False

    def run_step(self) -> None:
        # also called when forward raises, which is how other ranks learn of it
        handle = self.model.register_forward_hook(self._after_forward, always_call=True)
        try:
            super().run_step()
        except Diverged:
            raise
        except (
            FloatingPointError
        ) as error:  # detectron2's RPN refuses proposals that are not finite
            agreed = comm.get_world_size() == 1 or not has_sync_norm(self.model)
            raise Diverged(str(error), agreed) from error
        finally:
            handle.remove()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], losses: Any) -> None:
        self.last_batch = args[0]
        error = sys.exc_info()[1] if losses is None else None  # what forward is raising
        refused = isinstance(error, FloatingPointError)
        failed = losses is None and not refused
        if isinstance(losses, torch.Tensor):
            losses = {"total_loss": losses}
        values = {name: float(loss.detach()) for name, loss in (losses or {}).items()}
        self.bad_losses = tuple(name for name, value in values.items() if not math.isfinite(value))
        bad = refused or bool(self.bad_losses)
        flags = [float(bad), float(failed), float(self.stop_request.requested)]
        if comm.get_world_size() > 1:
            if losses is None and has_sync_norm(model):
                return  # the others wait inside a norm: this rank cannot tell them, it ends
            shared = torch.tensor(flags, device=next(model.parameters()).device)
            dist.all_reduce(shared)
            flags = shared.tolist()
        self.stop_agreed = flags[2] > 0
        if losses is None:
            return  # what forward raised goes on
        if flags[1]:
            raise PeerFailed("the forward pass of another rank failed")
        if flags[0]:
            raise Diverged(f"losses not finite: {', '.join(self.bad_losses)}" if bad else "")


class CheckedAMPStep(CheckedStep, AMPTrainer):
    """:class:`CheckedStep` in mixed precision; the gradient scaler works as in detectron2."""


def has_sync_norm(model: nn.Module) -> bool:
    """Whether the model's forward communicates with other ranks."""
    return any(
        isinstance(m, nn.SyncBatchNorm) or type(m).__name__ == "NaiveSyncBatchNorm"
        for m in model.modules()
    )
