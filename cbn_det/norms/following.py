"""A norm whose memory follows the weight of the convolution before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import binding
from .base import Forward, Found
from .binding import ConvBound
from .conv_call import ConvCall
from .remembering import RememberingNorm2d


class FollowingNorm2d(ConvBound, RememberingNorm2d):
    """A :class:`~.remembering.RememberingNorm2d` that is bound to a convolution.

    A method has the options ``compensation`` and ``positions``, and stages :attr:`call`. Remembered
    means are without the convolution's bias.
    """

    compensation: str
    positions: int | None

    def _start_following(self, window: int, **times: int | float) -> None:
        self._start_memory(window, **times)
        self.call: ConvCall | None = None  # of the convolution, during a forward that is recorded
        binding.install()

    def _hold_running_statistics(self) -> None:
        super()._hold_running_statistics()
        if self.adds_bias:  # as entries are without it
            self.memory.held[0] -= self.conv.bias.detach()

    def carry_bias(self) -> None:
        """Takes the running mean along with the convolution's bias."""
        if self.adds_bias:
            now = self.conv.bias.detach().clone()
            then = self.memory.pending.pop("bias", self.memory.kept.get("bias", now))
            self.memory.kept["bias"] = now
            self.running_mean.add_((now - then).to(self.running_mean.dtype))

    def _begin(self, input: Tensor, how: Forward) -> None:
        if not (self._unchanged or how.repeated):
            self._see_weight(input)
        super()._begin(input, how)
        conv_input = self._take_conv_input()
        if self.needs_conv and input.numel():
            self.__dict__["call"] = self._find_call(input, conv_input, self._will_record(how))

    def _record(self, found: Found | None, input: Tensor, how: Forward) -> None:
        super()._record(found, input, how)
        self.__dict__["call"] = None  # its input is released

    @property
    def adds_bias(self) -> bool:
        """Whether remembered means are without the convolution's bias, and the present one is added
        to them."""
        conv = self.conv
        return conv is not None and conv.bias is not None and self.needs_conv

    @property
    def commits_early(self) -> bool:
        """Not where the convolution's weight is computed, or whole only while it runs (FSDP)."""
        if not self.needs_conv:
            return True
        return self.conv is not None and self.weight_is_at_hand

    def settle(self) -> None:
        if not (self.needs_conv and self._weight_is_sharded):
            self._see_weight(None)
            self.advance()

    @property
    def _kind(self) -> dict[str, Any]:
        """What tells entries of one kind from those of another, which may look alike."""
        if not self.needs_conv:
            return {"compensation": "none"}
        positions = None if self.positions is None else "some"
        kind = {"compensation": self.compensation, "positions": positions}
        return {**kind, "conv.bias": self.conv is not None and self.conv.bias is not None}

    def memory_state_dict(self) -> dict[str, Any]:
        return {**super().memory_state_dict(), "kind": self._kind}

    def check_memory(self, state: dict[str, Any]) -> None:
        super().check_memory(state)
        if not (state["pending"] or state["pushed"]) or (self.needs_conv and self.conv is None):
            return
        if state["kind"] != self._kind:
            raise ValueError(
                f"the saved memory is of another kind than that of {_told(self._kind)}: of"
                f" {_told(state['kind'])}"
            )
        patch = (state["stacked"] or state["pending"]).get("patch")
        if patch is not None:
            d = self.weight_shape[1:].numel()
            if tuple(patch.shape[-2:]) != (self.conv.groups, d):
                raise ValueError("the saved memory is of a convolution of another shape")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **binding.NOTHING_SEEN, "call": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        binding.install()


def _told(kind: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in kind.items())
