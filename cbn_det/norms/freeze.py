"""BatchNorm first, fixed statistics for the last part of training.

At one or two images a mini-batch's statistics are noise, which weights would fit to the end. From a
fraction of the schedule on, a layer with ``freeze`` normalises with statistics computed anew at
that time, over many mini-batches of all ranks ("Rethinking 'Batch' in BatchNorm", arXiv
2105.07576), as in evaluation; weights and affine parameters go on training. A training loop brings
the mini-batches by :class:`cbn_det.run.norm_schedule.NormSchedule`, which the trainers of this
package and ``NormHook`` call.
"""

from __future__ import annotations

from torch import nn

from . import clock


class Freezable(nn.BatchNorm2d):
    """A BatchNorm2d that is in evaluation mode from a time of the schedule on, whatever
    ``train()`` says, until ``reset_running_stats()``: there is then nothing to normalise with.

    Attributes:
        freeze: fraction of the schedule, in (0, 1]; 1 is never.
        freeze_steps: the iteration that it comes to; None until a training loop that freezes is
            there, and where it is never.
        frozen: whether that time has come.
    """

    freeze: float = 1.0
    freeze_steps: int | None = None
    frozen = False

    def train(self, mode: bool = True) -> Freezable:
        return super().train(mode and not self.frozen)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self.frozen = False

    def freeze_statistics(self) -> None:
        """Fixes the running statistics as they are."""
        self.frozen = True
        self.eval()

    def _look_for_freezer(self) -> None:
        """Warns once where nobody will ever freeze the layer; called in training forwards."""
        if self.freeze < 1 and self.freeze_steps is None:
            warn_of_no_schedule(self, "freeze")


def warn_of_no_schedule(layer: nn.Module, option: str) -> None:
    """Warns once that nobody told the layer how long its schedule is."""
    norm = type(layer).__name__
    clock.warn_once(
        f"{option}={getattr(layer, option)!r} of {norm} layers has no effect: nobody says when that"
        " time has come. Call cbn_det.run.norm_schedule.NormSchedule(model, max_iter,"
        " batches).before_step(i) before each iteration i."
    )


def with_freeze(model: nn.Module) -> dict[str, Freezable]:
    """The layers that are, or will be, frozen."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, Freezable) and m.freeze < 1}


def frozen_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose statistics are fixed, for a checkpoint."""
    return [name for name, layer in with_freeze(model).items() if layer.frozen]


def freeze_layers(model: nn.Module, names: list[str], start_iter: int) -> None:
    """Restores what :func:`frozen_layers` returned, in a training that goes on at ``start_iter``
    with the statistics of then. Where the schedule was made longer since, layers whose time has not
    come train on until it has."""
    layers = with_freeze(model)
    for name in names:
        layer = layers.get(name)
        if layer is not None and (layer.freeze_steps or 0) <= start_iter:
            layer.freeze_statistics()
