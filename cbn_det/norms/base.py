"""The contract that the small-batch norms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import binding, clock
from .binding import ConvBound
from .functional import Moments, moments, normalize
from .window import Window, moved


@dataclass
class Estimate:
    """What a method takes for a layer's statistics in one training forward.

    Attributes:
        mean: [C]. What depends on the current mini-batch is detached (``share`` stands for it);
            other dependencies, such as a conv bias, may carry gradient.
        var: [C], biased, not negative; likewise.
        share: number or [C]: the weight of the current mini-batch in the first and the second
            moment.
        groups: number of groups of neighbouring channels that have their statistics in common;
            None: every channel has its own.
        scale, shift: [C] each, or None: what the normalised values are multiplied by, and what is
            then added, before the affine parameters; constants for the gradient.
    """

    mean: Tensor
    var: Tensor
    share: Tensor | float
    groups: int | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


def is_number(value: Any) -> bool:
    """Whether an option's value is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (activation checkpointing
    recomputes forwards there)."""
    return torch._C._current_graph_task_id() != -1


class SmallBatchNorm2d(ConvBound, nn.BatchNorm2d):
    """BatchNorm2d whose training statistics come from :meth:`estimate` instead of one mini-batch.

    A subclass of ``nn.BatchNorm2d`` with exactly its five state keys, because code around a norm
    decides by ``isinstance``: weight decay of norms, freezing, PreciseBN, weight loading. In
    evaluation it *is* ``nn.BatchNorm2d``. It differs in training:

    - statistics are float32 whatever the activations' dtype; the gradient is exact;
    - empty input is returned as it is, with zero gradients and unchanged state;
    - one value per channel is allowed (its variance is 0 where nothing else is remembered);
    - what is remembered between iterations is read-only within an optimiser step: forwards stage
      what they saw, and the first training forward after the step commits it. Forwards without
      gradient (PreciseBN, the first pass of a re-entrant activation checkpoint) and recomputations
      inside a backward pass never stage anything twice; PreciseBN sees a layer without memory, so
      that its result is that of BatchNorm with the same weights;
    - nothing is communicated between ranks in forward. :func:`cbn_det.norms.sync_running_stats`
      pools the running statistics of all ranks, and should run before evaluation and saving.

    Memory is neither parameter nor buffer, so that a user's ``broadcast_buffers=True`` leaves it
    alone and checkpoints stay BatchNorm's; :func:`cbn_det.norms.memory_state_dict` saves it.

    Args:
        num_features: channels C of the input [N, C, H, W].
        ema: what running statistics average. ``'pooled'``: first and second moments, so that the
            variance *between* mini-batches counts, which one image's variance lacks; ``'batch'``:
            BatchNorm's rule.
        momentum: of the running statistics; None for a cumulative average.
        eps: added to the variance.
        affine: whether there are a weight and a bias.

    Raises:
        ValueError: an option out of range; names the option and what it takes.
    """

    #: whether what an iteration staged is staged anew, with the updated weights, in the second pass
    #: of :class:`cbn_det.norms.DoubleForward`
    double_forward = False

    def __init__(
        self,
        num_features: int,
        *,
        ema: str = "pooled",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if ema not in ("pooled", "batch"):
            raise ValueError(f"ema={ema!r}: expected 'pooled' or 'batch'")
        if not (is_number(eps) and eps >= 0.0):
            raise ValueError(f"eps={eps!r}: expected a number of at least 0")
        if momentum is not None and not (is_number(momentum) and 0.0 <= momentum <= 1.0):
            raise ValueError(f"momentum={momentum!r}: expected a number in [0, 1] or None")
        self.ema = ema
        self._own_momentum = momentum
        self.steps = 0  # iterations (optimiser steps) that this layer took part in
        self._seen = clock.now()
        self._staged_forwards = 0
        self._unrecorded = 0  # no-grad forwards that a recomputation may still record
        self._window: Window | None = None
        self._staged: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}  # constant within an iteration, taken at its start
        self._kept: dict[str, Tensor] = {}  # carried from iteration to iteration, changed by commit
        # Double Forward's second pass: layers stand still, but those it refreshes stage anew
        self._in_second_pass = False
        self._after_refresh: Callable[[], None] | None = None
        clock.install()
        binding.install()

    @property
    def recomputing_statistics(self) -> bool:
        """Whether this forward belongs to PreciseBN (it sets the momentum to 1, torch's
        ``update_bn`` to None, and both run without gradient). Memory is then ignored: the same few
        iterations would take part in the normalisation of every batch that the population's
        statistics are gathered from."""
        without_grad = not torch.is_grad_enabled() and not self._in_second_pass
        another = self.momentum in (1.0, None) and self.momentum != self._own_momentum
        return another and without_grad

    # ---- what a method defines ----

    @property
    def batch_share(self) -> float:
        """Weight of the current mini-batch in the statistics it is normalised with, after burn-in
        and with a full memory."""
        return 1.0

    def batch_moments(self, y: Tensor) -> Moments:
        """Moments of one mini-batch as this method takes them, expanded to [C]."""
        return moments(y)

    def estimate(self, batch: Moments) -> Estimate:
        """Statistics of this layer now, from this mini-batch's moments and what is remembered."""
        raise NotImplementedError

    def stage(self, batch: Moments, y: Tensor, conv_input: Tensor | None) -> None:
        """Takes note of one recorded forward; called without gradient, after :meth:`estimate`."""

    def commit(self) -> None:
        """Turns what the forwards of the finished iteration staged into memory."""

    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Sets the running statistics, for evaluation, from mean and variance [C] of this layer's
        input over many mini-batches (PreciseBN)."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)

    def check_memory(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuses a saved entry, given by its tensors' shapes, that this layer could not use.

        Raises:
            ValueError: says what differs.
        """
        width = shapes.get("mean", (self.num_features,))
        if width != (self.num_features,):
            raise ValueError(f"the saved memory has {width[0]} channels, not {self.num_features}")

    def options(self) -> dict[str, Any]:
        """The constructor's options with their present values, as ``type(self)(C, **options)``
        takes."""
        return {"ema": self.ema, "momentum": self.momentum, "eps": self.eps, "affine": self.affine}

    # ---- forward ----

    def forward(self, input: Tensor) -> Tensor:
        return self._train(input) if self.training else super().forward(input)

    # what an iteration leaves to the next is no part of a graph that is compiled once
    @torch.compiler.disable
    def _train(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        # a recomputation is of the iteration of its forward, whatever has stepped since
        if not (self._in_second_pass or in_backward()):
            self._advance()
        conv_input = self._take_conv_input()
        if input.numel() == 0:
            return self._pass_empty(input)
        if self.needs_conv:
            self._check_binding(input, conv_input)
        # without autocast, which would run the matrix products of the compensation in 16 bits
        with torch.autocast(input.device.type, enabled=False):
            batch = self.batch_moments(input)
            estimate = self.estimate(batch)
            weight, bias = self._affine(estimate)
            output = normalize(
                input,
                estimate.mean,
                estimate.var,
                weight,
                bias,
                estimate.share,
                self.eps,
                estimate.groups,
            )
            self._record(batch, estimate, input, conv_input, torch.is_grad_enabled())
        return output

    def _affine(self, estimate: Estimate) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, with the estimate's scale and shift taken into them."""
        weight, bias = self.weight, self.bias
        if estimate.shift is not None:
            shift = estimate.shift if weight is None else weight * estimate.shift
            bias = shift if bias is None else bias + shift
        if estimate.scale is not None:
            weight = estimate.scale if weight is None else weight * estimate.scale
        return weight, bias

    def _pass_empty(self, input: Tensor) -> Tensor:
        if self.affine:  # an empty sum connects the affine parameters, with zero gradients
            scale, shift = (p.to(input.dtype).view(1, -1, 1, 1) for p in (self.weight, self.bias))
            return input * scale + shift
        return input * 1.0

    def _advance(self) -> None:
        """Commits what was staged, once an optimiser has stepped since."""
        if self._seen == clock.now():
            return
        self._seen = clock.now()
        self._unrecorded = 0
        self._held = {}
        if self._staged_forwards:
            self.steps += 1
            # not in a caller's inference mode: its tensors could not be written to later
            with torch.inference_mode(False), torch.no_grad():
                self.commit()
            self._staged, self._staged_forwards = {}, 0

    @torch.no_grad()
    def _record(
        self,
        batch: Moments,
        estimate: Estimate,
        y: Tensor,
        conv_input: Tensor | None,
        with_grad: bool,
    ) -> None:
        if self._in_second_pass:
            if self._after_refresh is not None:
                self.stage(batch, y.detach(), conv_input)
                self._staged_forwards += 1
                self._after_refresh()
            return
        recomputing = in_backward()
        if not recomputing:
            self._update_running(batch, estimate)
        if not with_grad:
            self._unrecorded += 1
            return
        if not recomputing:
            self._unrecorded = 0
        elif self._unrecorded:
            self._unrecorded -= 1
        else:
            return  # recorded when it ran for the first time
        self.stage(batch, y.detach(), conv_input)
        self._staged_forwards += 1

    def _update_running(self, batch: Moments, estimate: Estimate) -> None:
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / self.num_batches_tracked.to(batch.mean.dtype)
        mean, var, count = batch.mean, batch.var, batch.count
        if self.ema == "pooled":
            mean, var, count = estimate.mean, estimate.var, batch.count / estimate.share
        # BatchNorm keeps the unbiased variance; a single value has none
        var = var * (count / torch.as_tensor(count - 1.0, dtype=var.dtype).clamp(min=1.0))
        old_mean, old_var = self.running_mean, self.running_var
        if self.ema == "pooled":  # variance of a mixture: within plus between its parts
            var = var + (1.0 - momentum) * (mean - old_mean).square()
        old_var.mul_(1.0 - momentum).add_((var * momentum).to(old_var.dtype))
        old_mean.mul_(1.0 - momentum).add_((mean * momentum).to(old_mean.dtype))

    # ---- memory ----

    def forget(self) -> None:
        """Drops what is remembered of earlier iterations; weights, running statistics and the count
        of steps stay."""
        if self._window is not None:
            self._window.clear()
        self._staged, self._staged_forwards = {}, 0
        self._held, self._kept = {}, {}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "_staged" in self.__dict__:  # BatchNorm's constructor calls this, too
            self.forget()
            self.steps = 0

    def memory_state_dict(self) -> dict[str, Any]:
        """What is remembered, for :meth:`load_memory_state_dict`; not part of ``state_dict()``."""
        return {
            "steps": self.steps,
            "staged": dict(self._staged),
            "staged_forwards": self._staged_forwards,
            "held": dict(self._held),
            "kept": {key: value.clone() for key, value in self._kept.items()},
            # whether an optimiser has stepped since: what was staged is then ready to be committed
            "stepped": self._seen != clock.now(),
            "window": None if self._window is None else self._window.state_dict(),
        }

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`memory_state_dict` returned.

        Raises:
            ValueError: the state comes from a layer of other options or another width.
        """
        device = self.running_mean.device
        if (state["window"] is None) != (self._window is None):
            raise ValueError("the saved memory comes from a norm of another kind or window")
        stacked = {} if state["window"] is None else state["window"]["stacked"]
        oldest = {key: value[0] for key, value in stacked.items()}
        held, kept = (state.get(key, {}) for key in ("held", "kept"))  # version 0.1 had none
        for rows in (state["staged"], held, kept, oldest):
            self.check_memory({key: tuple(value.shape) for key, value in rows.items()})
        if self._window is not None:
            self._window.load_state_dict(state["window"], device)
        self.steps = state["steps"]
        self._staged = {key: value.to(device) for key, value in state["staged"].items()}
        self._staged_forwards = state["staged_forwards"]
        self._held = {key: value.to(device) for key, value in held.items()}
        self._kept = {key: value.to(device).clone() for key, value in kept.items()}
        self._seen = clock.now() - int(state["stepped"])
        self._unrecorded = 0

    def _replicate_for_data_parallel(self) -> SmallBatchNorm2d:
        raise RuntimeError(
            f"{type(self).__name__} does not work in nn.DataParallel, whose replicas, and what they"
            " remember, are thrown away after each forward: use"
            " nn.parallel.DistributedDataParallel, one process a GPU"
        )

    def __getstate__(self) -> dict[str, Any]:
        # the clock is the process's; what counts elsewhere is whether it has moved since
        return {**self.__dict__, "_seen": int(self._seen != clock.now()), "_conv_input": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = clock.now() - state["_seen"]
        clock.install()
        binding.install()

    def _apply(self, fn: Any, recurse: bool = True) -> SmallBatchNorm2d:
        super()._apply(fn, recurse)
        self._staged = {key: moved(value, fn) for key, value in self._staged.items()}
        self._held = {key: moved(value, fn) for key, value in self._held.items()}
        self._kept = {key: moved(value, fn) for key, value in self._kept.items()}
        if self._window is not None:
            self._window.apply(fn)
        return self

    def extra_repr(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return f"{self.num_features}, {options}"
