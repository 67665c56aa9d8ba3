"""The region proposals of a forward, given again when it is run a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class RandomState:
    """State of torch's random generators: the CPU's and, if ``device`` is a GPU, that GPU's."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        on_gpu = device.type == "cuda"
        gpu = torch.cuda.get_rng_state(device) if on_gpu else None
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
        self._generator = generator
        self._device = device
        self._calls = calls
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
        self._handles = []

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

        with _replaced_forward(self._generator, forward):
            yield

    def _before(self, generator: nn.Module, args: Any) -> None:
        self._calls_before = self._calls()

    def _after(self, generator: nn.Module, args: Any, output: Any) -> None:
        called_layers = self._calls() != self._calls_before
        kept = None if called_layers else (_without_graph(output), RandomState.now(self._device))
        self._outputs.append(kept)


def _without_graph(value: Any) -> Any:
    """The losses in nested lists, tuples and dicts let go of the activations behind them."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) is dict:
        return {key: _without_graph(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_graph(item) for item in value)
    return value


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, ``forward`` is called in place of the module's own."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _is_compiled(module: nn.Module) -> bool:
    """Whether the module does not call its ``forward`` each time it is called."""
    return (
        isinstance(module, torch.jit.ScriptModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__module__.startswith("torch._dynamo")
    )
