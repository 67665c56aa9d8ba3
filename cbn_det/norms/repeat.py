"""What need not be computed again when a forward is run a second time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .base import SmallBatchNorm2d


class FrozenParts:
    """The outputs of a model's frozen parts, kept from one forward for its repetition.

    A part is a submodule, as large as possible, none of whose parameters is trained. In the
    repetition it gives its kept output if all that its forward is seen to depend on is unchanged:
    its input, by value; its parameters and buffers; its training flags. A part that draws random
    numbers, changes a buffer or its input, is called twice, holds a norm that remembers iterations,
    has hooks, or whose output needs a gradient or is changed in place afterwards, is computed
    again. So is every part the first time it could be reused, and if it does not give the kept
    output bit for bit, always.

    What is kept, inputs and outputs of the parts, is of the latest forward only, so that gradient
    accumulation does not add it up.
    """

    def __init__(self) -> None:
        self._kept: dict[nn.Module, _Call | None] = {}
        self._handles: list[RemovableHandle] = []
        self._repeats: dict[nn.Module, bool] = {}  # whether a part was seen to repeat itself

    def keep_from(self, model: nn.Module) -> None:
        """Begins to keep outputs: what follows is a forward of ``model``. What was kept of an
        earlier one is dropped."""
        self.forget()
        for part in _frozen_parts(model):
            if self._repeats.get(part, True):
                before = part.register_forward_pre_hook(self._before, with_kwargs=True)
                after = part.register_forward_hook(self._after, with_kwargs=True)
                self._handles += [before, after]

    def keep_no_more(self) -> None:
        """Ends that forward."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forget(self) -> None:
        """Drops what is kept."""
        self.keep_no_more()
        self._kept = {}

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Within it, parts give what was kept wherever that is what they would compute."""
        with ExitStack() as stack:
            for part, call in self._kept.items():
                if call is not None and call.output is not None:
                    stack.enter_context(self._replaced(part, call))
            yield

    def __getstate__(self) -> dict[str, Any]:
        # copies of a model carry no activations
        return {**self.__dict__, "_kept": {}, "_handles": [], "_repeats": {}}

    def _before(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = part in self._kept or not torch.is_grad_enabled()
        self._kept[part] = None if known else _Call.begin(part, (args, kwargs))

    def _after(self, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._kept.get(part)
        if call is not None and not call.finish(output):
            self._kept[part] = None

    @contextmanager
    def _replaced(self, part: nn.Module, call: _Call) -> Iterator[None]:
        compute = part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not call.holds_for(part, (args, kwargs)):
                return compute(*args, **kwargs)
            if part in self._repeats:
                return _copied(call.output)
            output = compute(*args, **kwargs)
            self._repeats[part] = _equal(output, call.output)
            return output

        with replaced_forward(part, forward):
            yield


@dataclass
class _Call:
    """One call of a part: what it was given, what it depends on besides, and what it gave."""

    inputs: Any
    input_versions: list[int] | None
    state: tuple[Any, ...]
    random_states: list[Tensor]
    output: Any = None
    output_versions: list[int] | None = None

    @staticmethod
    def begin(part: nn.Module, inputs: Any) -> _Call | None:
        """None where the call could not be told from another one."""
        if not _tensors(inputs):
            return None
        return _Call(_copied(inputs), _versions(inputs), _state(part), _random_states(inputs))

    def finish(self, output: Any) -> bool:
        """Takes the output; False where it cannot be kept, or random numbers were drawn."""
        states, self.random_states = self.random_states, []
        drew = not _equal(states, _random_states(self.inputs))
        if drew or not _tensors(output):
            return False
        self.output, self.output_versions = _copied(output), _versions(output)
        return True

    def holds_for(self, part: nn.Module, inputs: Any) -> bool:
        """Whether a call with ``inputs`` gives the output kept."""
        return (
            self.state == _state(part)
            and self.input_versions == _versions(self.inputs)
            and self.output_versions == _versions(self.output)
            and _equal(inputs, self.inputs)
        )


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, ``forward`` is called in place of the module's own."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def is_compiled(module: nn.Module) -> bool:
    """Whether the module does not call its ``forward`` each time it is called."""
    return (
        isinstance(module, torch.jit.ScriptModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__module__.startswith("torch._dynamo")
    )


def _frozen_parts(module: nn.Module) -> list[nn.Module]:
    """The outermost submodules that may be frozen parts, each once."""
    parts: dict[nn.Module, None] = {}
    for child in module.children():
        found = [child] if _is_frozen(child) else _frozen_parts(child)
        parts.update(dict.fromkeys(found))
    return list(parts)


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return (
        bool(parameters)
        # sharded parameters, of other types, have ranks talk to each other
        and all(type(p) is nn.Parameter and not p.requires_grad for p in parameters)
        and type(module).forward is not nn.Module.forward  # else a list, which nobody calls
        and all(_is_plain(m) for m in module.modules())
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether what a module does can be seen from outside, and be replaced."""
    return not (
        isinstance(module, SmallBatchNorm2d)
        or is_compiled(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
    )


def _state(part: nn.Module) -> tuple[Any, ...]:
    """What tells a part from its later self."""
    tensors = [*part.parameters(), *part.buffers()]
    return (
        [(id(t), t.data_ptr(), t._version) for t in tensors],
        [m.training for m in part.modules()],
    )


def _random_states(inputs: Any) -> list[Tensor]:
    """Of the CPU's random generator, and of those of the GPUs that the inputs are on."""
    gpus = {t.device for t in _tensors(inputs) or [] if t.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus)]


def _tensors(value: Any) -> list[Tensor] | None:
    """The tensors in nested lists, tuples and dicts; None if there is anything that cannot be
    compared, or a tensor that must not be kept because of the graph behind it."""
    if type(value) is Tensor:
        usable = not (value.requires_grad or value.is_inference() or value.layout != torch.strided)
        return [value] if usable else None
    if value is None or isinstance(value, (bool, int, float, str)):
        return []
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    elif type(value) not in (list, tuple):
        return None
    parts = [_tensors(item) for item in value]
    return None if None in parts else [tensor for part in parts for tensor in part]


def _versions(value: Any) -> list[int] | None:
    """How often the tensors in a value were changed in place; None as :func:`_tensors`."""
    tensors = _tensors(value)
    return None if tensors is None else [tensor._version for tensor in tensors]


def _copied(value: Any) -> Any:
    """The same tensors in containers of their own."""
    if isinstance(value, dict):
        content = copy.copy(value)
        content.update((key, _copied(item)) for key, item in value.items())
        return content
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are the same bit for bit, in kind, layout and device too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a is b:
            return True
        kind = lambda t: (t.shape, t.dtype, t.device, t.stride())  # noqa: E731
        return kind(a) == kind(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
