"""What every client's model goes through with a norm of ours at each of its norm keys.

Everything is judged from outside the layers: convolutions are intercepted, and what a layer
normalised with is read off its input and output.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.overrides import TorchFunctionMode

from cbn_det.deploy import fold, to_batchnorm
from cbn_det.norms import (
    BGN2d,
    CBN2d,
    DoubleForward,
    KN2d,
    MBN2d,
    SmallBatchNorm2d,
    load_memory_state_dict,
    memory_state_dict,
    resolve_burn_in,
)

STEPS = 4
NORMS = {  # with memory from the first iteration on, on whatever widths a project has
    "CBN": "CBN(burn_in=0)",
    "KN": "KN",
    "MBN": "MBN(burn_in=0)",
    "BGN": "BGN",
    "BRN": "BRN(burn_in=0, ramp=1)",
}


@dataclass
class Case:
    """One configuration of a project.

    Attributes:
        name: of the configuration.
        build: from a norm as a config names it to the model, in training mode.
        batch: makes what the model is called with in training.
    """

    name: str
    build: Callable[[str], nn.Module]
    batch: Callable[[], Any]

    @functools.cached_property
    def batchnorms(self) -> set[str]:
        """Names of the layers that are BatchNorm where the norm is "BN"."""
        return {n for n, m in self.build("BN").named_modules() if isinstance(m, nn.BatchNorm2d)}


@dataclass
class Outcome:
    """What was found out; ``problems`` is empty where all is well."""

    layers: int = 0
    losses: list[float] = field(default_factory=list)
    folded: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        losses = f"{self.losses[0]:.3g} -> {self.losses[-1]:.3g}" if self.losses else "none"
        said = "ok" if not self.problems else "WRONG: " + "; ".join(self.problems)
        notes = f"  ({'; '.join(self.notes)})" if self.notes else ""
        return f"{self.layers} layers, loss {losses}, {self.folded}: {said}{notes}"


def seed() -> None:
    """The same random choices in every forward: RoIs, dropout, points."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def loss_of(output: Any) -> Tensor:
    if isinstance(output, (list, tuple)):  # of the teachers' models: losses, and more
        output = next(part for part in output if isinstance(part, dict))
    return sum(value.sum() for value in output.values() if torch.is_tensor(value))


def ours(model: nn.Module) -> dict[str, SmallBatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SmallBatchNorm2d)}


class Convolutions(TorchFunctionMode):
    """Remembers, for the output of every convolution, how it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Tensor, tuple]] = {}  # of an output: itself, and how

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (conv2d, torch.conv2d):
            self.made[id(output)] = output, (args[0].detach(), args[1:], kwargs or {})
        return output


@dataclass
class Call:
    """One forward of a norm: what it was given and gave, and the convolution before it."""

    y: Tensor
    output: Tensor
    made: tuple | None


@contextlib.contextmanager
def calls_of(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Every forward of the layers, with the convolution that made its input."""
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    convolutions = Convolutions()

    def note(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            _, made = convolutions.made.get(id(args[0]), (None, None))
            # cloned: an activation in place may follow
            calls[name].append(Call(args[0].detach(), output.detach().clone(), made))

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with convolutions:
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def normalised_with(layer: nn.BatchNorm2d, call: Call) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] that a forward normalised with: its output is a straight
    line over its input in every channel."""
    y, out = (v.double().transpose(0, 1).flatten(1) for v in (call.y, call.output))
    centred = y - y.mean(1, keepdim=True)
    slope = (centred * out).sum(1) / centred.square().sum(1).clamp(min=1e-30)
    offset = out.mean(1) - slope * y.mean(1)
    weight = layer.weight.detach().double() if layer.affine else torch.ones_like(slope)
    bias = layer.bias.detach().double() if layer.affine else torch.zeros_like(slope)
    return (bias - offset) / slope, weight / slope


def moments(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of all of them together."""
    values = torch.cat([v.double().transpose(0, 1).flatten(1) for v in tensors], 1)
    return values.mean(1), values.var(1, correction=0)


def compensation_error(layer: CBN2d, iterations: list[list[Call]]) -> str:
    """CBN's mean is that of the last ``window`` iterations' inputs, convolved anew with the present
    weight: the compensation of the mean is exact. Returns what is wrong."""
    now = iterations[-1][-1]
    if now.made is None or layer.conv is None:
        return "no convolution made its input" if layer.needs_conv else ""
    _, present, kwargs = now.made
    present_weight = present[0].detach()
    entries, naive = [moments([now.y])[0]], [moments([now.y])[0]]
    for calls in iterations[-layer.window : -1]:
        again = []
        for call in calls:
            if call.made is None:
                return "no convolution made its input"
            x, others, kwargs = call.made
            bias = [o.detach() if torch.is_tensor(o) else o for o in present[1:2]]
            again.append(conv2d(x, present_weight, *bias, *others[2:], **kwargs).detach())
        # every forward of an iteration counts the same, whatever its size
        entries.append(sum(moments([y])[0] for y in again) / len(again))
        naive.append(sum(moments([call.y])[0] for call in calls) / len(calls))
    mean, deviation = normalised_with(layer, now)
    alive = moments([now.y])[1].sqrt() > 1e-3  # else the line is not to be read off
    scale = deviation.abs().clamp(min=1e-6)
    error = ((mean - sum(entries) / len(entries)).abs() / scale)[alive]
    if error.numel() and error.max() > 0.01:
        off = ((mean - sum(naive) / len(naive)).abs() / scale)[alive].max()
        return f"mean off by {error.max():.3f} sd ({off:.3f} from the naive one)"
    return ""


def standing_still_error(layer: SmallBatchNorm2d, calls: list[Call]) -> str:
    """With the same images and weights in all iterations, memory holds what the mini-batch says:
    the statistics are those of BatchNorm, of groups in BGN."""
    mean, deviation = normalised_with(layer, calls[-1])
    true_mean, true_var = moments([calls[-1].y])
    if isinstance(layer, BGN2d):
        groups = layer.groups_used
        group_mean = true_mean.view(groups, -1).mean(1, keepdim=True)
        spread = (true_mean.view(groups, -1) - group_mean).square()
        group_var = (true_var.view(groups, -1) + spread).mean(1, keepdim=True)
        true_mean = group_mean.expand(groups, len(mean) // groups).flatten()
        true_var = group_var.expand(groups, len(mean) // groups).flatten()
    true = (true_var + layer.eps).sqrt()
    alive = moments([calls[-1].y])[1].sqrt() > 1e-2
    off = torch.maximum(((mean - true_mean) / true).abs(), (deviation.abs() / true).log().abs())
    off = off[alive]
    return f"off by {off.max():.3f} at rest" if off.numel() and off.max() > 0.02 else ""


def fails_with_batchnorm(case: Case) -> bool:
    """Whether a training step and an evaluation raise with BatchNorm, too."""
    model = _prepared(case, "BN")
    try:
        _step(case, model, _optimizer(model, 0.05))
        with torch.no_grad():
            model.eval()(_unlabelled(case.batch()))
    except Exception:
        return True
    return False


def run(case: Case, norm: str) -> Outcome:
    """Takes one configuration through everything.

    Raises:
        Exception: what the model raises; the caller reports it.
    """
    outcome = Outcome()
    model = _prepared(case, norm)
    layers = ours(model)
    outcome.layers = len(layers)
    lists = {name.rsplit(".", 1)[0] for name in layers}  # levels' norms that were taken apart
    missing = {n for n in case.batchnorms - layers.keys() if n not in lists}
    plain = {n for n, m in model.named_modules() if n in missing and isinstance(m, nn.BatchNorm2d)}
    for names, said in ((missing - plain, "norms are not built"), (plain, "are plain BatchNorm")):
        if names:
            outcome.problems.append(f"{len(names)} {said}: {min(names)}, ...")
    if not layers:
        return outcome
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _rest(case, copy.deepcopy(model), outcome)
        _train(case, model, outcome)
        _checkpoint(case, norm, model, outcome)
    kinds = ("CBN", "KN", "MBN", "BGN", "BRN", "cbn_det")
    told = {str(w.message).splitlines()[0] for w in caught}
    outcome.notes += sorted(text for text in told if any(kind in text for kind in kinds))
    _deploy(case, model, outcome)
    return outcome


def _step(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    seed()
    optimizer.zero_grad()
    loss = loss_of(model(case.batch()))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)


def _prepared(case: Case, norm: str) -> nn.Module:
    seed()
    model = case.build(norm).train()
    resolve_burn_in(model, 100)
    return model


def _train(case: Case, model: nn.Module, outcome: Outcome) -> None:
    optimizer, second = _optimizer(model, 0.05), DoubleForward(model)
    layers = ours(model)
    iterations: dict[str, list[list[Call]]] = {name: [] for name in layers}
    passes = 0
    for _ in range(STEPS):
        with calls_of(layers) as calls:
            outcome.losses.append(_step(case, model, optimizer))
        for name, of_layer in calls.items():
            if of_layer:
                iterations[name].append(of_layer)
        passes += second.refresh()
    second.remove()
    if not np.isfinite(outcome.losses).all():
        outcome.problems.append(f"losses {outcome.losses}")
    silent = [name for name, seen in iterations.items() if not seen]
    if silent:
        outcome.notes.append(f"{len(silent)} layers were never called: {silent[0]}")
    if any(isinstance(layer, MBN2d) for layer in layers.values()) and passes != STEPS:
        outcome.problems.append(f"{passes} second passes in {STEPS} steps")
    if any(isinstance(layer, KN2d) for layer in layers.values()):
        predicted = sum(bool(layer.diagnostics) for layer in layers.values())
        outcome.notes.append(f"{predicted} predicted")
    # the weights have moved since the last forward: one more, which is judged
    wrong = {}
    with calls_of(layers) as calls:
        seed()
        loss_of(model(case.batch()))
    for name, layer in layers.items():
        if isinstance(layer, CBN2d) and calls[name] and iterations[name]:
            said = compensation_error(layer, [*iterations[name], calls[name][:1]])
            if said:
                wrong[name] = said
    if wrong:
        name, said = next(iter(wrong.items()))
        outcome.problems.append(f"compensation of {len(wrong)} layers: {name}: {said}")


def _rest(case: Case, model: nn.Module, outcome: Outcome) -> None:
    """A learning rate of 0."""
    layers = ours(model)
    optimizer, second = _optimizer(model, 0.0), DoubleForward(model)
    calls: dict[str, list[Call]] = {}
    for _ in range(3):
        before = calls
        with calls_of(layers) as calls:
            _step(case, model, optimizer)
        second.refresh()
    second.remove()
    wrong = {}
    for name, layer in layers.items():
        if not isinstance(layer, (CBN2d, MBN2d, BGN2d)) or len(calls[name]) != 1:
            continue
        # rounding decides between two RoIs now and then: the images are no longer the same
        if len(before[name]) == 1 and torch.allclose(before[name][0].y, calls[name][0].y, 0, 1e-5):
            said = standing_still_error(layer, calls[name])
            if said:
                wrong[name] = said
    if wrong:
        name, said = next(iter(wrong.items()))
        outcome.problems.append(f"{len(wrong)} layers at rest: {name}: {said}")


def _checkpoint(case: Case, norm: str, model: nn.Module, outcome: Outcome) -> None:
    """State and memory go through a file into a model built anew; both then do the same."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "norms": memory_state_dict(model)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = _prepared(case, norm)
    again.load_state_dict(saved["model"])
    load_memory_state_dict(again, saved["norms"])
    outputs = []
    for one in (copy.deepcopy(model), again):
        with calls_of(ours(one)) as calls:
            seed()
            loss_of(one.train()(case.batch()))
        outputs.append(calls)
    different = [
        name
        for name in outputs[0]
        for a, b in zip(outputs[0][name], outputs[1][name], strict=True)
        if not torch.equal(a.output, b.output)
    ]
    if different:
        outcome.problems.append(
            f"{len(different)} layers differ after a checkpoint: {different[0]}"
        )


@torch.no_grad()
def _deploy(case: Case, model: nn.Module, outcome: Outcome) -> None:
    """Evaluation; then with BatchNorm in place of ours; then folded."""
    model.eval()
    names = list(ours(model))
    expected = _evaluated(model, names, case.batch)
    if not all(torch.isfinite(v).all() for values in expected.values() for v in values):
        outcome.problems.append("evaluation is not finite")
    deployed = copy.deepcopy(model)
    to_batchnorm(deployed)
    found = _evaluated(deployed, names, case.batch)
    changed = [
        name
        for name in names
        if len(expected[name]) != len(found[name])
        or any(not torch.equal(a, b) for a, b in zip(expected[name], found[name], strict=True))
    ]
    if ours(deployed) or changed:
        outcome.problems.append(f"{len(changed)} layers differ as BatchNorm: {changed[:1]}")
    try:
        folded = fold(deployed)
        outcome.folded = f"folded {len(folded.folded)}"
        seed()
        deployed(_unlabelled(case.batch()))
    except ValueError as error:
        outcome.folded = "not folded"
        outcome.notes.append(str(error).splitlines()[-1])


def _unlabelled(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a test set's loader gives."""
    kept = ("image", "height", "width", "image_id", "file_name")
    return [{key: value for key, value in one.items() if key in kept} for one in batch]


def _evaluated(model: nn.Module, names: list[str], batch: Callable) -> dict[str, list[Tensor]]:
    with calls_of({name: model.get_submodule(name) for name in names}) as calls:
        seed()
        model(_unlabelled(batch()))
    return {name: [call.output for call in of_layer] for name, of_layer in calls.items()}
