"""Layers whose entries are committed together, against each of them on its own and the paper."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import PaperCBN, carry, derivatives
from torch import Tensor, nn

from cbn_det.norms import CBN2d, MBN2d, build_norm, settle, tick

# three or more of most kinds, some alike in width; convolution, width and window differ
LAYERS: dict[str, tuple[Callable[[], nn.Conv2d], str]] = {
    "a": (lambda: nn.Conv2d(3, 6, 3, padding=1, bias=False), "CBN(window=3, burn_in=0)"),
    "b": (lambda: nn.Conv2d(3, 6, 1), "CBN(window=3, burn_in=0)"),
    "c": (lambda: nn.Conv2d(3, 6, 3, groups=3), "CBN(window=3, burn_in=0)"),
    "wider": (lambda: nn.Conv2d(3, 4, 3), "CBN(window=5, burn_in=0)"),
    "late": (lambda: nn.Conv2d(3, 6, 1), "CBN(window=3, burn_in=4)"),
    "own": (lambda: nn.Conv2d(3, 4, 3), "CBN(window=3, burn_in=0, positions=None)"),
    "own, too": (lambda: nn.Conv2d(3, 7, 1), "CBN(window=3, burn_in=0, positions=None)"),
    "naive": (lambda: nn.Conv2d(3, 4, 3), "CBN(window=3, burn_in=0, compensation='none')"),
    "frozen": (lambda: nn.Conv2d(3, 6, 3).requires_grad_(False), "CBN(window=3, burn_in=0)"),
    "d": (lambda: nn.Conv2d(3, 3, 1), "MBN(window=3, burn_in=0)"),
    "e": (lambda: nn.Conv2d(3, 3, 1), "MBN(window=3, burn_in=0)"),
    "f": (lambda: nn.Conv2d(3, 2, 1), "MBN(window=3, burn_in=0, decay=0.5)"),
    "brn": (lambda: nn.Conv2d(3, 4, 1), "BRN(burn_in=2, ramp=3)"),
    "window 1": (lambda: nn.Conv2d(3, 4, 1), "CBN(window=1, burn_in=0)"),
}
ITERATIONS = 20


def plan(t: int) -> list[str]:
    """Names of the layers in the order in which iteration ``t`` calls them."""
    names = list(LAYERS)
    if t in (3, 9, 10, 11, 17):  # a head without RoIs
        names = [name for name in names if name not in ("b", "own", "e", "late")]
    if t in (2, 5, 8, 11, 17):
        names.reverse()
    if t in (14, 15):  # the others behind the same first one
        names[1:] = names[:0:-1]
    if t == 7:
        names = names[5:] + names[:5]
    return names + ["a", "e"] * (t in (5, 8, 16))  # called twice


def build(names: list[str]) -> dict[str, nn.Sequential]:
    layers = {}
    for name in names:
        torch.manual_seed(list(LAYERS).index(name))
        make, spec = LAYERS[name]
        conv = make()
        layers[name] = nn.Sequential(conv, build_norm(spec, conv.out_channels)).double()
    return layers


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64) + 0.4


def move(model: nn.Sequential, t: int) -> None:
    """What an optimiser's step does."""
    generator = torch.Generator().manual_seed(t)
    for p in model[0].parameters():
        if p.requires_grad:
            p.data += 0.03 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


Record = list[dict[str, Any]]


def train(layers: dict[str, nn.Sequential], start: int = 0, copied: bool = False) -> Record:
    """What each forward left of its layer: output, running statistics, memory."""
    found = []
    for t in range(start, ITERATIONS):
        for k, name in enumerate(plan(t)):
            if name not in layers:
                continue
            norm = layers[name][1]
            output = layers[name](inputs(100 * t + k))
            memory = norm.memory_state_dict()
            del memory["stepped"]
            state = copy.deepcopy(norm.state_dict())
            found.append({"name": name, "t": t, "output": output, **state, "memory": memory})
        tick()
        for model in layers.values():
            move(model, t)
        if copied and t in (6, 11):  # a copy that trains on is nothing to the original
            train(copy.deepcopy(layers), ITERATIONS - 2)
    return found


def compare(got: Any, expected: Any, what: str) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            compare(got[key], expected[key], f"{what}.{key}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(
            got, expected, rtol=1e-11, atol=1e-13, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )
    else:
        assert got == expected, what


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each commit was of."""
    seen: list[int] = []
    for cls in (CBN2d, MBN2d):
        commit = vars(cls)["commit"].__func__

        def spy(cls: type, layers: list[Any], commit: Any = commit) -> None:
            seen.append(len(layers))
            commit(cls, layers)

        monkeypatch.setattr(cls, "commit", classmethod(spy))
    return seen


@pytest.mark.parametrize("copied", [False, True])
def test_layers_together_are_what_each_is_alone(copied: bool, sizes: list[int]) -> None:
    together = train(build(list(LAYERS)), copied=copied)
    assert max(sizes) >= 3
    sizes.clear()
    alone = [train(build([name])) for name in LAYERS]
    assert set(sizes) == {1}
    expected = {(r["name"], i): r for run in alone for i, r in enumerate(run)}
    calls = dict.fromkeys(LAYERS, 0)
    for record in together:
        name = record["name"]
        compare(record, expected.pop((name, calls[name])), f"{name} in iteration {record['t']}")
        calls[name] += 1
    assert not expected


@pytest.mark.parametrize("names", [["a", "b"], ["d", "e"]])
def test_a_layer_of_several_carries_no_memory_of_the_others(names: list[str]) -> None:
    layers = build(names)
    others = {
        f"{i}": nn.Sequential(nn.Conv2d(3, 500, 1), build_norm(LAYERS[names[0]][1], 500))
        for i in range(4)
    }
    sized = []
    for present in (layers, {**layers, **{k: m.double() for k, m in others.items()}}):
        for t in range(4):
            for model in present.values():
                model(inputs(t))
            tick()
        sized.append(len(pickle.dumps(layers[names[0]])))
    assert sized[1] < 1.1 * sized[0]


def test_another_model_is_left_to_its_own_forward() -> None:
    """One that was called earlier in the iteration may be in the middle of a step of its own."""
    first, second = build(["a", "d"]), build(["c", "e"])
    for t in range(3):
        for model in (*first.values(), *second.values()):
            model(inputs(t))
        tick()
    second["c"](inputs(9))
    assert not second["c"][1].memory.stepped and not second["e"][1].memory.stepped
    assert all(model[1].memory.stepped and model[1].memory.pending for model in first.values())


@pytest.mark.parametrize("positions", [None, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_that_was_absent_while_its_weight_moved(positions: int | None, bias: bool) -> None:
    """Momentum and weight decay move a head that had no RoI. Outputs against the paper's rule, with
    entries of the iterations that it took part in; running statistics, taken along from the last of
    these, against autograd; both in evaluation meanwhile, and in training afterwards."""
    torch.manual_seed(0)
    options = {"window": 4, "burn_in": 0, "ema": "batch", "positions": positions}
    stem = nn.Sequential(nn.Conv2d(3, 5, 3), CBN2d(5, **options)).double()
    head = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), CBN2d(6, **options)).double()
    conv, norm = head
    paper = PaperCBN(4, averaged=None if positions is None else 1 - 0.9**8)
    running, then = [torch.zeros(6).double(), torch.ones(6).double()], None

    def check_running(expected: list[Tensor]) -> None:
        torch.testing.assert_close(norm.running_mean, expected[0])
        if positions is None:  # else it follows the averaged derivative
            torch.testing.assert_close(norm.running_var, expected[1])

    for t in range(16):
        stem(inputs(t))
        if t not in (3, 6, 7, 8, 15):
            x = inputs(100 + t)
            y = conv(x)
            torch.testing.assert_close(head(x), paper(y, conv, norm.weight, norm.bias))
            if then is not None:
                carry(running, then, conv)
            then = derivatives(y, conv)
            for buffer, now in zip(running, (y.mean((0, 2, 3)), y.var((0, 2, 3))), strict=True):
                buffer.lerp_(now.detach(), 0.1)
            paper.push(x, conv)
            check_running(running)
        tick()
        move(head, t)
        if t in (7, 15):  # as before an evaluation
            settle(nn.ModuleList([stem, head]))
            evaluated = [value.clone() for value in running]
            carry(evaluated, then, conv)
            check_running(evaluated)


@pytest.mark.parametrize(
    "spec",
    [
        "CBN(window=3, burn_in=0, compensation='none')",
        "MBN(window=3, burn_in=0, double_forward=False)",
    ],
)
def test_what_an_iteration_began_with_is_part_of_what_is_saved(spec: str) -> None:
    """Saved before the commit of a first entry that is not finite in one channel."""
    norm, other = (build_norm(spec, 3) for _ in range(2))
    norm.running_mean.fill_(2.0), norm.running_var.fill_(5.0)
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 0, 0] = torch.inf
    norm(x)
    other.load_state_dict(norm.state_dict())
    other.load_memory_state_dict(norm.memory_state_dict())
    tick()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(other(x), norm(x)) and norm(x).isfinite().all()
    assert other.memory.older[:, 1].tolist() == [2.0, 5.0]


def test_a_copy_of_a_layer_leaves_what_others_have_a_part_of() -> None:
    layers = build(["d", "e"])
    train(layers, ITERATIONS - 2)
    memory = pickle.loads(pickle.dumps(layers["d"][1])).memory
    for part in (memory.rows, memory.older):
        assert part.untyped_storage().nbytes() == part.nbytes
