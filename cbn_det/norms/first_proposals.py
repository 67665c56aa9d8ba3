"""The region proposals of a forward, given again when it is run a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


@dataclass
class RandomState:
    """State of torch's random generators: the CPU's and, if ``device`` is a GPU, that GPU's."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(device, torch.get_rng_state(), gpu)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


class FirstProposals:
    """What a proposal generator gives in one forward, and the random state it leaves behind.

    Given both in the repetition, a detector whose weights have moved samples the very RoIs of the
    first time; computed anew, proposals move a little, another number of them survives NMS, and the
    sampled RoIs are others. Proposals carry no gradient; the generator's losses are of no use to a
    repetition.

    A generator that is compiled, was called more than once in the forward, or holds layers to
    refresh, is run again.

    Args:
        generator: the submodule. Keeping begins here and ends with :meth:`keep_no_more`.
        device: of the random generators.
        calls: how often layers to refresh have been called so far.
    """

    def __init__(
        self, generator: nn.Module, device: torch.device, calls: Callable[[], object]
    ) -> None:
        self._generator, self._device, self._calls = generator, device, calls
        self._calls_before: object = None
        self._outputs: list[tuple[Any, RandomState] | None] = []
        self._handles = [
            generator.register_forward_pre_hook(self._before),
            generator.register_forward_hook(self._after),
        ]

    def keep_no_more(self) -> None:
        """Ends the forward that is kept from."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def given(self) -> Iterator[None]:
        """Within it, the generator gives what was kept, where it can stand for a call."""
        kept = self._outputs[0] if len(self._outputs) == 1 else None
        if kept is None or _is_compiled(self._generator):
            yield
            return
        output, random_state = kept

        def forward(*args: Any, **kwargs: Any) -> Any:
            random_state.restore()
            return output

        own = vars(self._generator)
        before = own.get("forward")
        own["forward"] = forward
        try:
            yield
        finally:
            del own["forward"]
            if before is not None:
                own["forward"] = before

    def _before(self, generator: nn.Module, args: Any) -> None:
        self._calls_before = self._calls()

    def _after(self, generator: nn.Module, args: Any, output: Any) -> None:
        kept = None
        if self._calls() == self._calls_before:
            # the losses let go of the activations behind them
            output = tree_map_only(Tensor, Tensor.detach, output)
            kept = output, RandomState.now(self._device)
        self._outputs.append(kept)


def _is_compiled(module: nn.Module) -> bool:
    """Whether the module does not call its ``forward`` each time it is called."""
    return (
        isinstance(module, torch.jit.ScriptModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__module__.startswith("torch._dynamo")
    )
