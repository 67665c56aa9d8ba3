"""The training step: losses are checked on all ranks at once, gradients may be accumulated."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..run.nonfinite import Diverged, PeerFailed
from ..run.resume import fit_optimizer_state, parameter_names
from ..run.signals import StopRequest


class OptimizerOfConfig(SimpleTrainer):
    """Its checkpoints leave learning rate, momentum and weight decay to the config that resumes
    them; see :func:`~cbn_det.run.resume.fit_optimizer_state`.

    Attributes:
        optimizer_change: what the optimizer of a resumed checkpoint lacked.
    """

    optimizer_change = ""

    def state_dict(self) -> dict[str, Any]:
        names = parameter_names(self.optimizer, self._bare_model)
        return {**super().state_dict(), "parameter_names": names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        fitted, self.optimizer_change = fit_optimizer_state(
            self.optimizer,
            self._bare_model,
            state_dict["optimizer"],
            state_dict.get("parameter_names"),
        )
        super().load_state_dict({**state_dict, "optimizer": fitted})

    @property
    def _bare_model(self) -> nn.Module:
        return getattr(self.model, "module", self.model)


class CheckedStep(OptimizerOfConfig):
    """A training step whose losses are checked between forward and backward.

    One all-reduce of three numbers tells every rank whether any of them has a loss that is not
    finite, failed in forward, or was asked to stop, so that all leave at the same iteration.

    Args:
        accumulate: mini-batches of the loader that make up a step. Each has a forward, a check and
            a backward pass of its own, the step takes the average of their losses, and ranks
            exchange gradients once, in the last of them.
    """

    last_batch: Any = None
    bad_losses: tuple[str, ...] = ()
    stop_request: StopRequest = StopRequest()
    stop_agreed = False

    def __init__(self, *args: Any, accumulate: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accumulate = accumulate

    def run_step(self) -> None:
        # also called when forward raises, which is how other ranks learn of it
        handle = self.model.register_forward_hook(self._after_forward, always_call=True)
        try:
            if self.accumulate == 1:
                super().run_step()
            else:
                self._accumulated_step()
        except Diverged:
            raise
        except (
            FloatingPointError
        ) as error:  # detectron2's RPN refuses proposals that are not finite
            agreed = comm.get_world_size() == 1 or not has_sync_norm(self.model)
            raise Diverged(str(error), agreed) from error
        finally:
            handle.remove()

    def _accumulated_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        averages: dict[str, Tensor] = {}
        seconds = 0.0
        self.optimizer.zero_grad()
        for left in reversed(range(self.accumulate)):
            started = time.perf_counter()
            batch = next(self._data_loader_iter)
            seconds += time.perf_counter() - started
            with self._without_exchange() if left else contextlib.nullcontext():
                losses = _by_name(self._forward(batch))
                self._backward(sum(losses.values()) / self.accumulate)
            for name, loss in losses.items():
                averages[name] = averages.get(name, 0.0) + loss.detach() / self.accumulate
        self.after_backward()
        self._write_metrics(averages, seconds)
        self._update()

    def _without_exchange(self) -> contextlib.AbstractContextManager[None]:
        """Gradients stay this rank's own for now."""
        parallel = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if parallel else contextlib.nullcontext()

    def _forward(self, batch: Any) -> Any:
        return self.model(batch)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _update(self) -> None:
        self.optimizer.step()

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], losses: Any) -> None:
        self.last_batch = args[0]
        error = sys.exc_info()[1] if losses is None else None  # what forward is raising
        refused = isinstance(error, FloatingPointError)
        failed = losses is None and not refused
        named = {} if losses is None else _by_name(losses)
        values = {name: float(loss.detach()) for name, loss in named.items()}
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
    """:class:`CheckedStep` in mixed precision; the gradient scaler works as in detectron2. The
    mini-batches of a step have the same scale, and one that overflows skips the whole step."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        scaler = self.grad_scaler.state_dict()  # for a checkpoint of a training in full precision
        super().load_state_dict({"grad_scaler": scaler, **state_dict})

    def _forward(self, batch: Any) -> Any:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, dtype=self.precision):
            return self.model(batch)

    def _backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def _update(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def _by_name(losses: Any) -> dict[str, Tensor]:
    return {"total_loss": losses} if isinstance(losses, Tensor) else losses


def has_sync_norm(model: nn.Module) -> bool:
    """Whether the model's forward communicates with other ranks."""
    return any(
        isinstance(m, nn.SyncBatchNorm) or type(m).__name__ == "NaiveSyncBatchNorm"
        for m in model.modules()
    )
