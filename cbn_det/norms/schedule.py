"""Options that are a time: optimiser steps, or a fraction of the schedule."""

from __future__ import annotations

import warnings

from . import clock

#: schedule, in optimiser steps, of a layer that nobody told the length of its schedule
UNRESOLVED_SCHEDULE = 3000


class Scheduled:
    """Mixin of a :class:`~.base.SmallBatchNorm2d` with options that are times.

    They are optimiser steps (int) or a fraction of the schedule (float in (0, 1)) that
    :func:`cbn_det.norms.resolve_burn_in` turns into steps. Those of ``burn_in`` are in
    ``burn_in_steps``, None until they are known.
    """

    timed: tuple[str, ...]  # names of these options
    burn_in: int | float
    freeze: float
    steps: int

    @property
    def _waits(self) -> bool:
        return any(getattr(self, name) for name in self.timed)

    @property
    def in_burn_in(self) -> bool:
        """Whether burn-in is not over in the present iteration, or its length unknown."""
        return self.burn_in_steps is None or self.steps < self.burn_in_steps

    def _set_times(self, **times: int | float) -> None:
        """Takes the values of these options.

        Raises:
            ValueError: a value is neither of the two forms.
        """
        self.timed = tuple(times)
        for name, value in times.items():
            steps = type(value) is int and value >= 0
            if not (steps or (isinstance(value, float) and 0.0 < value < 1.0)):
                raise ValueError(
                    f"{name}={value!r}: expected an int (optimiser steps, 0 or more) or a float"
                    " between 0 and 1 (fraction of SOLVER.MAX_ITER)"
                )
            setattr(self, name, value)
            setattr(self, f"{name}_steps", value if steps else None)
        if self.freeze < 1 and self.freeze <= self.burn_in < 1:
            norm = type(self).__name__.removesuffix("2d")
            clock.warn_once(
                f"{norm}(burn_in={self.burn_in:.3g}, freeze={self.freeze:.3g}): burn-in is not over"
                f" when statistics are fixed, so these layers are BatchNorm throughout. Give {norm}"
                " a burn_in below freeze, or use BN with freeze."
            )

    def resolve_burn_in(self, max_iter: int) -> None:
        """Turns the fractions into optimiser steps of a schedule of ``max_iter`` steps."""
        for name in self.timed:
            value = getattr(self, name)
            if isinstance(value, float):
                setattr(self, f"{name}_steps", round(value * max_iter))

    def _require_times(self) -> None:
        """Warns once, and takes a schedule of ``UNRESOLVED_SCHEDULE`` steps, where a fraction was
        not resolved."""
        for name in self.timed:
            if getattr(self, name + "_steps") is None:
                break
        else:
            return
        self.resolve_burn_in(UNRESOLVED_SCHEDULE)
        warnings.warn(
            f"{name}={getattr(self, name)!r} is a fraction of a schedule that this"
            f" {type(self).__name__.removesuffix('2d')} layer was not told: taking"
            f" {getattr(self, f'{name}_steps')} optimiser steps. Call"
            " cbn_det.norms.resolve_burn_in(model, max_iter) before training, or give it as an"
            " int.",
            stacklevel=8,
        )
