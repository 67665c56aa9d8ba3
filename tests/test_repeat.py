"""Double Forward's shortcuts: what they leave out changes nothing, bit for bit."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
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


class Frozen(nn.Module):
    """A frozen stage that counts how often it is computed."""

    def __init__(self, c_in=3, c_out=4):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm = nn.BatchNorm2d(c_out).eval()
        self.requires_grad_(False)
        self.calls = []  # a list, since plain attributes could be looked at

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        return F.relu(self.norm(self.conv(x)))

    def train(self, mode=True):
        return super().train(False)


class Net(nn.Module):
    """Frozen stages, two trained blocks with MBN, dropout, and a tail that nothing depends on."""

    def __init__(self, first=None, checkpointing=None):
        super().__init__()
        self.first = first or Frozen()
        self.stages = nn.ModuleList([Frozen(4, 4), block(4, 4)])
        self.head = nn.Sequential(nn.Dropout(0.4), block(4, 5))
        self.tail = nn.Conv2d(5, 2, 1)
        self.checkpointing = checkpointing
        self.tails = []  # a list: the second pass leaves numbers as they were

    def forward(self, x):
        x = (x - 0.3) / 1.7  # a new tensor each time, as a detector's preprocessing gives
        x = self._run(self.stages[0], self.first(x))
        x = self._run(self.head, self._run(self.stages[1], x))
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
        layer._in_second_pass = True
        layer._staged, layer._staged_forwards, layer._after_refresh = {}, 0, lambda: None
    with torch.no_grad():
        for x, state in forwards:
            torch.set_rng_state(state)
            model(x)
    torch.set_rng_state(now)
    for layer in layers:
        layer._in_second_pass, layer._after_refresh = False, None
    for (module, key), value in kept.items():
        if module not in layers or key == "num_batches_tracked":
            module._buffers[key].copy_(value)


def train(model, steps=5, parts=1, shortcuts=True, between=None, forwards_first=False):
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
        if between and t > 1:  # a part has been reused by then
            with torch.no_grad():
                between(model)
        if shortcuts:
            assert double_forward.refresh() is True
            assert not double_forward._frozen._kept and not double_forward._frozen._handles
        else:
            full_second_pass(model, forwards)
        snapshots.append(copy.deepcopy((model.state_dict(), memory_state_dict(model))))
    if double_forward:
        double_forward.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    return snapshots


def compare(model, **how):
    """Trains two copies, with shortcuts and without, and returns both after finding them equal."""
    other = copy.deepcopy(model)
    ours, theirs = train(model, **how), train(other, shortcuts=False, **how)
    for (state, memory), (expected, expected_memory) in zip(ours, theirs, strict=True):
        assert_same(state, expected)
        for layer in (*memory.values(), *expected_memory.values()):
            layer.pop("stepped")  # steps of the other run, in this process
        assert_same(memory, expected_memory)
    return model, other


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_frozen_stages_and_what_follows_the_last_norm_are_left_out(checkpointing, parts):
    torch.manual_seed(0)
    model, other = compare(Net(checkpointing=checkpointing), parts=parts, steps=5)
    first, second = model.first.calls, other.first.calls
    assert len(second) == 5 * 2 * parts
    # computed in first passes, in second passes of all but the latest mini-batch, and once to see
    # that it repeats itself
    assert len(first) == len(second) - 4
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


def test_a_stage_gets_what_the_one_before_kept():
    torch.manual_seed(0)
    model = Net()
    train(model, steps=4)
    assert len(model.first.calls) == len(model.stages[0].calls) == 4 + 1


class InPlaceAfter(Net):
    def forward(self, x):
        x = self.first(x * 1.0)
        x.mul_(0.5)
        return self.tail(self.head(self.stages[1](x)))


class MarkedAfter(Net):
    """As re-entrant checkpoints want their input."""

    def forward(self, x):
        x = self.first(x * 1.0).requires_grad_()
        x = checkpoint(self.stages[1], x, use_reentrant=True)
        return self.tail(self.head(x))


class TrainedBefore(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.tail(self.head(self.stages[1](self.first(x * self.scale))))


class CalledTwice(Net):
    def forward(self, x):
        x = self.first(x * 1.0) + self.first(x.flip(3))
        return self.tail(self.head(self.stages[1](x)))


class OtherInput(Net):
    def forward(self, x):
        x = self.first(x + random.random())  # augments by a generator that nobody restores
        return self.tail(self.head(self.stages[1](x)))


class OtherLayout(Net):
    """The same numbers, in another layout in the second pass."""

    def forward(self, x):
        layout = torch.contiguous_format if torch.is_grad_enabled() else torch.channels_last
        x = self.first((x * 1.0).contiguous(memory_format=layout))
        return self.tail(self.head(self.stages[1](x)))


class Draws(Frozen):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


class CountsInBuffer(Frozen):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x):
        x = super().forward(x) * self.seen
        self.seen += 1
        return x


class CountsUnseen(Frozen):
    def forward(self, x):
        return super().forward(x) * len(self.calls)


class TakesAnObject(Frozen):
    def forward(self, x):
        return super().forward(x.tensor)


class ImageList:
    def __init__(self, tensor):
        self.tensor = tensor


class WrapsInput(Net):
    def forward(self, x):
        return self.tail(self.head(self.stages[1](self.first(ImageList(x)))))


class ChangesItsInput(Frozen):
    def forward(self, x):
        return super().forward(x.mul_(1.1))


class RemembersInside(Frozen):
    def __init__(self):
        super().__init__()
        self.norm = build_norm(MBN, 4)
        self.requires_grad_(False)

    def train(self, mode=True):
        return nn.Module.train(self, mode)


class BatchStatistics(Frozen):
    """A BatchNorm whose statistics go on, with frozen parameters."""

    def train(self, mode=True):
        return nn.Module.train(self, mode)


class NoGrad(Frozen):
    def __call__(self, x):
        with torch.no_grad():
            return super().__call__(x)


def double(module, args, output):
    return output * 2


@pytest.mark.parametrize(
    "make",
    [
        InPlaceAfter,
        MarkedAfter,
        TrainedBefore,
        CalledTwice,
        OtherInput,
        OtherLayout,
        lambda: Net(Draws()),
        lambda: Net(CountsInBuffer()),
        lambda: Net(CountsUnseen()),
        lambda: WrapsInput(TakesAnObject()),
        lambda: Net(ChangesItsInput()),
        lambda: Net(RemembersInside()),
        lambda: Net(BatchStatistics()),
        lambda: Net(NoGrad()),
    ],
    ids=lambda make: getattr(make, "__name__", "") if isinstance(make, type) else None,
)
def test_what_cannot_be_left_out_is_computed(make):
    torch.manual_seed(0)
    model, other = compare(make().train())
    assert len(model.first.calls) == len(other.first.calls) > 0


@pytest.mark.parametrize("where", ["", "conv"])
def test_parts_with_hooks_are_computed(where):
    torch.manual_seed(0)
    model = Net()
    model.first.get_submodule(where).register_forward_hook(double)
    model, other = compare(model)
    assert len(model.first.calls) == len(other.first.calls)


def test_a_changed_parameter_or_buffer_is_noticed():
    """Between the passes: in place, and by exchange of the data."""
    changes = [
        lambda m: m.first.conv.weight.mul_(1.1),
        lambda m: setattr(m.first.conv.weight, "data", m.first.conv.weight.data * 1.1),
        lambda m: m.first.norm.running_mean.add_(0.1),
        lambda m: nn.Module.train(m.first, not m.first.training),
    ]
    for change in changes:
        torch.manual_seed(0)
        model, other = compare(Net(), between=change)
        assert len(model.first.calls) == len(other.first.calls) - 1


def test_unfreezing_is_noticed():
    torch.manual_seed(0)
    model = Net()
    train(model, steps=2)
    calls = len(model.first.calls)
    model.first.requires_grad_(True)
    model, other = compare(model, steps=3)
    assert len(model.first.calls) == len(other.first.calls) == calls + 6


def test_keeping_ends_with_the_forward_and_is_of_the_latest_only():
    model = Net()
    double_forward = DoubleForward(model)
    kept = double_forward._frozen
    for t in range(3):
        model(images(t, n=t + 1))
        assert {call.output.shape[0] for call in kept._kept.values()} == {t + 1}
    with torch.no_grad():
        model(images(5, n=9))
    assert {call.output.shape[0] for call in kept._kept.values()} == {3}
    twin = copy.deepcopy(model)
    assert not any("forward" in vars(m) for m in twin.modules())
    double_forward.remove()
    assert not kept._kept and not model._forward_hooks and not model._forward_pre_hooks


def test_an_error_in_the_first_pass_leaves_no_hooks():
    model = Net()
    DoubleForward(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, 4, 4))
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_an_error_in_the_second_pass_puts_the_parts_back():
    model = Net()
    double_forward = DoubleForward(model)
    model(images(0)).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.stages[1][0].weight.data = torch.zeros(4, 7, 3, 3)
    with pytest.raises(RuntimeError):
        double_forward.refresh()
    assert not any("forward" in vars(m) for m in model.modules())
