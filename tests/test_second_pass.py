"""Where Double Forward's second pass ends: what it leaves out changes nothing, bit for bit."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_det.norms import DoubleForward, SmallBatchNorm2d, build_norm, memory_state_dict

MBN = "MBN(window=3, decay=0.6, burn_in=0)"


def images(seed, n=2, size=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator) + seed % 3 / 2


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def block(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), build_norm(MBN, c_out), nn.ReLU())


class Net(nn.Module):
    """Blocks with MBN, dropout, and a tail that nothing depends on."""

    def __init__(self, checkpointing=None):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).requires_grad_(False)
        self.body = block(4, 4)
        self.head = nn.Sequential(nn.Dropout(0.4), block(4, 5))
        self.tail = nn.Conv2d(5, 2, 1)
        self.checkpointing = checkpointing
        self.tails = []  # a list: the second pass leaves numbers as they were

    def forward(self, x):
        x = (x - 0.3) / 1.7  # a new tensor each time, as a detector's preprocessing gives
        x = self._run(self.head, self._run(self.body, self.first(x)))
        self.tails.append(1)
        return self.tail(x)

    def _run(self, part, x):
        if self.checkpointing is None or self.checkpointing and not x.requires_grad:
            return part(x)  # a re-entrant checkpoint of such an x would have no gradient
        return checkpoint(part, x, use_reentrant=self.checkpointing)


def full_second_pass(model, forwards):
    """The second pass as it is defined: every recorded mini-batch, from end to end."""
    layers = [m for m in model.modules() if isinstance(m, SmallBatchNorm2d)]
    kept = {(m, k): b.clone() for m in model.modules() for k, b in m._buffers.items()}
    now = torch.get_rng_state()
    for layer in layers:
        layer._unchanged = True
        layer.memory.pending, layer.memory.forwards, layer._after_refresh = {}, 0, lambda: None
    with torch.no_grad():
        for x, state in forwards:
            torch.set_rng_state(state)
            model(x)
    torch.set_rng_state(now)
    for layer in layers:
        layer._unchanged, layer._after_refresh = False, None
    for (module, key), value in kept.items():
        if module not in layers or key == "num_batches_tracked":
            module._buffers[key].copy_(value)


def train(model, steps=5, parts=1, shortcuts=True, forwards_first=False):
    """Trains; returns a snapshot of weights, buffers and memory after each step."""
    torch.manual_seed(3)
    random.seed(3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    double_forward = DoubleForward(model) if shortcuts else None
    snapshots = []
    for t in range(steps):
        optimizer.zero_grad()
        forwards, losses = [], []
        for k in range(parts):
            x = images(10 * t + k)
            forwards.append((x, torch.get_rng_state()))
            losses.append((model(x) - 0.5).pow(2).mean())
            if not forwards_first:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        optimizer.step()
        if shortcuts:
            assert double_forward.refresh() is True
        else:
            full_second_pass(model, forwards)
        snapshots.append(copy.deepcopy((model.state_dict(), memory_state_dict(model))))
    if double_forward:
        double_forward.remove()
    return snapshots


def compare(model, **how):
    """Trains two copies, with shortcuts and without, and returns both after finding them equal."""
    other = copy.deepcopy(model)
    ours, theirs = train(model, **how), train(other, shortcuts=False, **how)
    for (state, memory), (expected, expected_memory) in zip(ours, theirs, strict=True):
        assert_same(state, expected)
        for layer in (*memory.values(), *expected_memory.values()):
            layer.pop("stepped")  # steps of the other run, in this process
            del layer["refreshed"], layer["refreshed_entries"]  # the oracle counts none
        assert_same(memory, expected_memory)
    return model, other


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_what_follows_the_last_norm_is_left_out(checkpointing, parts):
    torch.manual_seed(0)
    model, other = compare(Net(checkpointing=checkpointing), parts=parts, steps=5)
    assert len(model.tails) == 5 * parts and len(other.tails) == 2 * 5 * parts


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_forwards_before_all_backwards(checkpointing):
    """What a re-entrant checkpoint stages comes in the backward pass of an earlier forward."""
    torch.manual_seed(0)
    compare(Net(checkpointing=checkpointing), parts=2, forwards_first=True)


class Planned(nn.Module):
    """Calls its two layers as often, one after the other, as a plan says for each forward."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan
        self.body, self.head = block(3, 3), block(3, 3)

    def forward(self, x):
        bodies, heads = self.plan.pop(0)
        for _ in range(bodies):
            x = self.body(x)
        for _ in range(heads):
            x = self.head(x)
        return x


@pytest.mark.parametrize(
    "first, second",
    [
        ([(1, 1), (1, 0)], [(1, 1), (1, 1)]),  # a head without RoIs, which has some now
        ([(1, 0), (1, 1)], [(1, 1), (1, 1)]),
        ([(1, 1), (1, 1)], [(1, 0), (1, 1)]),
        ([(1, 1)], [(3, 1)]),
        ([(2, 2)], [(2, 2)]),
    ],
)
def test_a_second_pass_that_calls_other_layers_than_the_first(first, second):
    torch.manual_seed(0)
    model = Planned((first + second) * 4)
    compare(model, steps=4, parts=len(first))
    assert not model.plan
