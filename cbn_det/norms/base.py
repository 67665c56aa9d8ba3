"""The contract that the small-batch norms share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.fx import Proxy

from . import binding, clock
from .binding import ConvBound
from .conv_call import ConvCall, in_backward
from .functional import Moments, moments, normalize
from .traced import Unscriptable, call_in_graph
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


def in_custom_function() -> bool:
    """Whether the forward of a ``torch.autograd.Function`` is running in this thread that will have
    a backward pass: gradients are off in it, and it may be a re-entrant activation checkpoint,
    which repeats what it calls. One that is called without gradient repeats nothing."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, FunctionCtx) and ctx.next_functions:
                return True
        frame = frame.f_back
    return False


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in zip(some, others, strict=True)
    )


def _exporting() -> bool:
    """Whether the forward is recorded as a graph that is kept."""
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return torch.jit.is_tracing() or (is_exporting is not None and is_exporting())


def _like(momentum: Tensor | float, buffer: Tensor) -> Tensor | float:
    """A weight that ``buffer.lerp_`` takes."""
    return momentum.to(buffer.dtype) if isinstance(momentum, Tensor) else momentum


class SmallBatchNorm2d(ConvBound, Unscriptable, nn.BatchNorm2d):
    """BatchNorm2d whose training statistics come from :meth:`estimate` instead of one mini-batch.

    A subclass of ``nn.BatchNorm2d`` with exactly its five state keys, because code around a norm
    decides by ``isinstance``: weight decay of norms, freezing, PreciseBN, weight loading. In
    evaluation it *is* ``nn.BatchNorm2d``. It differs in training:

    - statistics are float32 whatever the activations' dtype; the gradient is exact;
    - empty input is returned as it is, with zero gradients and unchanged state;
    - one value per channel is allowed (its variance is 0 where nothing else is remembered);
    - what is remembered between iterations is read-only within an optimiser step: forwards stage
      what they saw, and the first training forward after the step commits it. A recomputation
      inside a backward pass stages nothing twice;
    - training forwards that only gather statistics are BatchNorm's
      (:attr:`recomputing_statistics`): PreciseBN, ``update_bn`` and any other recalibration end
      with what BatchNorm's would, and the copy of a model that runs without gradient beside its
      training (mean teacher) is a BatchNorm;
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
        device, dtype: of weight, bias and running statistics, as BatchNorm2d takes them; the layers
            that derive from this one take them too.

    Raises:
        ValueError: an option out of range; names the option and what it takes.
    """

    #: whether what an iteration staged is staged anew, with the updated weights, in the second pass
    #: of :class:`cbn_det.norms.DoubleForward`
    double_forward = False
    #: whether it matters to the method which iteration a forward belongs to
    counts_iterations = False

    def __init__(
        self,
        num_features: int,
        *,
        ema: str = "pooled",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype
        )
        if ema not in ("pooled", "batch"):
            raise ValueError(f"ema={ema!r}: expected 'pooled' or 'batch'")
        if not (is_number(eps) and eps >= 0.0):
            raise ValueError(f"eps={eps!r}: expected a number of at least 0")
        if momentum is not None and not (is_number(momentum) and 0.0 <= momentum <= 1.0):
            raise ValueError(f"momentum={momentum!r}: expected a number in [0, 1] or None")
        self.ema = ema
        self._own_momentum = momentum  # the one that training goes by
        self._used_momentum = momentum  # by the latest forward
        self._recomputing = False  # this forward, see recomputing_statistics
        self._recalibrating = False  # forwards with gradient are
        self._reset_at: int | None = None  # the clock at the latest reset_running_stats()
        self.steps = 0  # iterations (optimiser steps) that this layer took part in
        self._seen = clock.now()
        self._staged_forwards = 0
        self._clock_moved = False  # as far as this layer has seen
        self._placed = False  # whether ``steps`` is known to be the place in the schedule
        self._memory_loaded = False  # since the latest training forward
        self._memory_is_of: list[Tensor] | None = None  # weights, where those of now are others
        self._watched: Tensor | None = None  # a weight of some forwards ago
        self._unrecorded = 0  # no-grad forwards that a recomputation may still record
        self._window: Window | None = None
        self._staged: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}  # constant within an iteration, taken at its start
        self._kept: dict[str, Tensor] = {}  # carried from iteration to iteration, changed by commit
        # Double Forward's second pass: layers stand still, but those it refreshes stage anew
        self._in_second_pass = False
        self._after_refresh: Callable[[], None] | None = None
        self._refreshed = False  # whether that pass has staged this iteration anew
        clock.install()
        binding.install()

    @property
    def recomputing_statistics(self) -> bool:
        """Whether this training forward is not part of training, and therefore BatchNorm's: memory
        is neither read nor written, and running statistics move by the mini-batch's own.

        It is one without gradient, unless it is the first pass of a re-entrant activation
        checkpoint; or, with gradient, every one from ``reset_running_stats()`` or a momentum of
        None or 1 that was another before (``StochasticWeightAveraging`` and ``bn_update`` average
        anew in these ways) to the next optimiser step, unless the first ones after the reset are
        without.
        """
        return self._recomputing

    def _recomputes(self) -> bool:
        if self._in_second_pass:
            return False
        if in_backward():  # as the forward that is repeated
            return self._recalibrating
        self._used_momentum = self.momentum
        anew = self.momentum in (1.0, None) and self.momentum != self._own_momentum
        anew = anew or self._reset_at == clock.now()
        if not (torch.is_grad_enabled() or in_custom_function()):
            self._reset_at = None  # those with gradient that follow are training again
            return True
        self._recalibrating = self._recalibrating or anew
        return self._recalibrating

    # ---- what a method defines ----

    @property
    def _waits(self) -> bool:
        """Whether what the layer does changes at some iteration of the schedule."""
        return False

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

    def stage(self, batch: Moments, y: Tensor, call: ConvCall | None) -> None:
        """Takes note of one recorded forward; called without gradient, after :meth:`estimate`.
        ``call`` is the convolution's that made ``y``, where the method needs it."""

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
        if isinstance(input, Proxy):
            return call_in_graph(self, input)
        if not self.training:
            return super().forward(input)
        if _exporting():
            raise RuntimeError(
                f"{type(self).__name__} in training mode cannot be exported or traced: what it"
                " remembers would be part of the graph. Call model.eval() first."
            )
        return self._train(input)

    # what an iteration leaves to the next is no part of a graph that is compiled once
    @torch.compiler.disable
    def _train(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        # a recomputation is of the iteration of its forward, whatever has stepped since
        if not (self._in_second_pass or in_backward()):
            if torch.is_grad_enabled() or in_custom_function():
                self._drop_memory_of_other_weights()
            self._see_weight(input)
            self._advance()
        self._recomputing = self._recomputes()
        conv_input = self._take_conv_input()
        if input.numel() == 0:
            return self._pass_empty(input)
        call = None
        if self.needs_conv:
            call = self._find_call(input, conv_input, self._to_be_recorded())
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
            self._record(batch, estimate, input, call, torch.is_grad_enabled())
        return output

    def _to_be_recorded(self) -> bool:
        """Whether :meth:`stage` is to be called in this forward."""
        if self._in_second_pass:
            return self._after_refresh is not None
        if self._recomputing or not torch.is_grad_enabled():
            return False
        return not in_backward() or self._unrecorded > 0

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
        """Commits what was staged, once an optimiser has stepped since. Not meanwhile that other
        weights are there."""
        if self._seen == clock.now() or self._memory_is_of is not None:
            return
        self._seen = clock.now()
        self._own_momentum = self._used_momentum  # an iteration was trained with it
        self._recalibrating = False
        self._unrecorded = 0
        self._held = {}
        if self._staged_forwards:
            self.steps += 1
            self._clock_moved, self._watched = True, None
            if not self._placed:
                self._find_place()
            # not in a caller's inference mode: its tensors could not be written to later
            with torch.inference_mode(False), torch.no_grad():
                self.commit()
            self._staged, self._staged_forwards, self._refreshed = {}, 0, False

    def _find_place(self) -> None:
        """Takes the count of steps from the optimiser's own, in the first iteration of which nobody
        told the layer: training may have been resumed, or the layer converted in the middle."""
        self._placed = True
        if self.weight is None or not self.counts_iterations or not self._waits:
            return
        taken = clock.steps_of(self.weight)
        if taken is not None:
            self.steps = max(self.steps, taken)
            return
        clock.warn_once(
            f"training goes on with an optimiser that keeps no count of its steps, and"
            f" {type(self).__name__} layers were not told how far it is: burn-in begins anew. Call"
            " cbn_det.norms.resolve_burn_in(model, max_iter, start_iter=...) before training, or"
            " save memory_state_dict(model) and load it."
        )

    def _drop_memory_of_other_weights(self) -> None:
        """Drops what is remembered of other weights than those that training goes on with."""
        self._memory_loaded = False
        if self._memory_is_of is not None:
            self._memory_is_of = None
            self.forget()
            self.steps, self._placed = 0, False

    def _weights(self) -> list[Tensor]:
        """What tells this layer's weights from others, of sharded ones this rank's part. Its
        convolution's is loaded before."""
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        present = [tensor.detach() for tensor in own if tensor is not None]
        return [t.to_local() if hasattr(t, "to_local") else t for t in present]

    def _watch_clock(self) -> None:
        """Warns where weights change and no iteration is counted. Looks at the weights in few
        forwards, and in none after the clock has moved once."""
        forwards = self._staged_forwards
        if self._clock_moved or not self.counts_iterations or forwards < 8:
            return
        if forwards & (forwards - 1) or self.weight is None:
            return
        before, self._watched = self._watched, self.weight.detach().clone()
        if before is not None and not torch.equal(before, self._watched.to(before)):
            clock.warn_once(
                f"the weights change, and no step of a torch.optim.Optimizer is seen:"
                f" {type(self).__name__} layers cannot tell iterations apart, and are BatchNorm."
                " Call cbn_det.norms.tick() after each update of the weights."
            )

    @torch.no_grad()
    def _record(
        self,
        batch: Moments,
        estimate: Estimate,
        y: Tensor,
        call: ConvCall | None,
        with_grad: bool,
    ) -> None:
        if self._in_second_pass:
            if self._after_refresh is not None:
                self.stage(batch, y.detach(), call)
                self._staged_forwards += 1
                self._after_refresh()
            return
        recomputing = in_backward()
        if not recomputing:
            self._update_running(batch, estimate)
        if self._recomputing:
            return
        if not with_grad:
            self._unrecorded += 1
            return
        if not recomputing:
            self._unrecorded = 0
        elif self._unrecorded:
            self._unrecorded -= 1
        else:
            return  # recorded when it ran for the first time
        self.stage(batch, y.detach(), call)
        self._staged_forwards += 1
        self._watch_clock()

    def _update_running(self, batch: Moments, estimate: Estimate) -> None:
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / self.num_batches_tracked.to(batch.mean.dtype)
        elif self.recomputing_statistics and self.ema == "pooled":
            # an average begun anew is of what was shown, not of the 0 and 1 that it begins with
            momentum = (1.0 / self.num_batches_tracked).clamp(min=momentum).to(batch.mean.dtype)
        mean, var, count = batch.mean, batch.var, batch.count
        if self.ema == "pooled":
            mean, var, count = estimate.mean, estimate.var, batch.count / estimate.share
        # BatchNorm keeps the unbiased variance; a single value has none
        if isinstance(count, Tensor):
            var = var * (count / (count - 1.0).clamp(min=1.0))
        else:
            var = var * (count / max(count - 1.0, 1.0))
        old_mean, old_var = self.running_mean, self.running_var
        if self.ema == "pooled":  # variance of a mixture: within plus between its parts
            between = (mean - old_mean).square()
            if isinstance(momentum, Tensor):
                var = var + (1.0 - momentum) * between
            else:
                var = var.add_(between, alpha=1.0 - momentum)
        # torch's lerp is exact at both ends, so that a momentum of 1 keeps the batch itself
        old_var.lerp_(var.to(old_var.dtype), _like(momentum, old_var))
        old_mean.lerp_(mean.to(old_mean.dtype), _like(momentum, old_mean))

    # ---- memory ----

    def forget(self) -> None:
        """Drops what is remembered of earlier iterations; weights, running statistics and the count
        of steps stay."""
        if self._window is not None:
            self._window.clear()
        self._staged, self._staged_forwards = {}, 0
        self._held, self._kept = {}, {}

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self._reset_at = clock.now()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_at = None  # nothing is left to be gathered anew for
        if "_staged" in self.__dict__:  # BatchNorm's constructor calls this, too
            self.forget()
            self.steps, self._placed = 0, False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        remembers = self.steps > 0 or self._staged_forwards > 0
        # memory that was loaded is of the weights that come with it, in whatever order
        if remembers and not self._memory_loaded and self._memory_is_of is None:
            self._memory_is_of = [weight.clone() for weight in self._weights()]
        super()._load_from_state_dict(*args, **kwargs)
        if self._memory_is_of is not None and _equal(self._weights(), self._memory_is_of):
            self._memory_is_of = None  # they are back

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
        self._placed = self._memory_loaded = True
        self._memory_is_of = None
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
        return {
            **self.__dict__,
            "_seen": int(self._seen != clock.now()),
            "_reset_at": self._reset_at == clock.now(),
            **binding.NOTHING_SEEN,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = clock.now() - state["_seen"]
        self._reset_at = clock.now() if state["_reset_at"] else None
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
