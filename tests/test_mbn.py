"""MBN and Double Forward against their equations in plain autograd."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_det.norms import (
    DoubleForward,
    MBN2d,
    SmallBatchNorm2d,
    build_norm,
    load_memory_state_dict,
    memory_state_dict,
    norm_diagnostics,
    norm_rows,
    resolve_burn_in,
)
from cbn_det.norms.remembering import RememberingNorm2d


class PaperMBN:
    """Entries newest first; ``statistics`` of a mini-batch with them, differentiable."""

    def __init__(self, window, decay):
        self.window, self.decay, self.entries = window, decay, []

    def combine(self, entries):
        etas = [self.decay**i for i in range(len(entries))]
        etas = [eta / sum(etas) for eta in etas]
        mean = sum(eta * mu for eta, (mu, _) in zip(etas, entries, strict=True))
        second = sum(eta * (var + mu**2) for eta, (mu, var) in zip(etas, entries, strict=True))
        return mean, second - mean**2

    def statistics(self, y):
        now = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        return self.combine([now, *self.entries[: self.window - 1]])

    def __call__(self, y, norm):
        mean, var = (v.view(1, -1, 1, 1) for v in self.statistics(y))
        weight, bias = (v.view(1, -1, 1, 1) for v in (norm.weight, norm.bias))
        return (y - mean) / (var + norm.eps).sqrt() * weight + bias

    def push(self, ys):
        """The pooled moments of an iteration's forwards."""
        y = torch.cat(ys).detach()
        self.entries.insert(0, (y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)))
        del self.entries[self.window :]


def images(seed, n=2, c=3, size=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, size, size, generator=generator, dtype=dtype) + seed % 3 / 2


def tick():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0).step()


def loss_of(out):
    return (out - torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).pow(2).mean()


def gradients(out, leaves):
    probe = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((probe * out + out**2 * probe.flip(0) / 3).sum(), leaves)


def layer(c=3, **options):
    torch.manual_seed(0)
    norm = MBN2d(c, **{"window": 3, "burn_in": 0, **options}).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return norm


def net(spec="MBN(window=3, decay=0.6, burn_in=0)", width=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        build_norm(spec, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        build_norm(spec, width),
        nn.ReLU(),
        nn.Conv2d(width, 2, 1),
    ).double()


def sgd(model, lr=0.1, fused=False):
    return torch.optim.SGD(model.parameters(), lr=lr, fused=fused)


def mbns(model):
    return [m for m in model.modules() if isinstance(m, MBN2d)]


def snapshot(model):
    return copy.deepcopy((model.state_dict(), memory_state_dict(model)))


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)
    else:
        assert a == b


# ---- the layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("window, decay", [(1, 0.5), (2, 1.0), (3, 0.5), (5, 0.9)])
def test_output_gradients_and_statistics_equal_the_equations(window, decay):
    norm, paper = layer(window=window, decay=decay), PaperMBN(window, decay)
    for t in range(8):  # filling, then full
        x = images(t).requires_grad_()
        got, expected = norm(x), paper(x, norm)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        leaves = [x, norm.weight, norm.bias]
        for g, e in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-9)
        if window > 1:  # evaluation has the very statistics of this forward
            mean, var = paper.statistics(x.detach())
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=1e-12)
            evaluated = copy.deepcopy(norm).eval()(x)
            torch.testing.assert_close(evaluated, got, rtol=1e-10, atol=1e-10)
        paper.push([x])
        tick()


def test_the_gradient_has_its_projections_multiplied_by_the_newest_weight():
    norm = layer(window=3, decay=0.5)
    for t in range(3):
        norm(images(t))
        tick()
    x = images(5).requires_grad_()
    out = norm(x)
    g = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, g)
    weight, bias, std = (
        v.detach().view(1, -1, 1, 1)
        for v in (norm.weight, norm.bias, (norm.running_var + norm.eps).sqrt())
    )
    x_hat, g = (out.detach() - bias) / weight, g * weight
    mean = lambda t: t.mean((0, 2, 3), keepdim=True)  # noqa: E731
    eta = 1 / (1 + 0.5 + 0.25)
    expected = (g - eta * mean(g) - eta * x_hat * mean(g * x_hat)) / std
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_equal_weights_are_batchnorm_over_the_batches_of_the_window():
    norm = layer(window=3, decay=1.0)
    xs = [images(t) for t in range(4)]
    for x in xs[:3]:
        norm(x)
        tick()
    joined = torch.cat(xs[1:])
    expected = F.batch_norm(joined, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(norm(xs[3]), expected[-2:], rtol=1e-10, atol=1e-10)


def test_burn_in_ends_and_the_window_fills_from_one():
    norm, paper, plain = layer(burn_in=3), PaperMBN(3, 0.8), nn.BatchNorm2d(3).double()
    for t in range(8):
        x = images(t)
        got = norm(x)
        expected = paper(x, norm) if t >= 3 else None
        if t < 3:
            expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        if t >= 3:
            paper.push([x])
        plain(x)
        tick()
    assert norm.num_batches_tracked == plain.num_batches_tracked == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_entry_before_takes_the_place_of_a_broken_one(bad):
    """In its channel; the others are as they were."""
    norm = layer(window=4, decay=0.5)
    xs = [images(t) for t in range(4)]
    xs[1][0, 1, 0, 0] = bad
    for x in xs:
        out = norm(x)
        assert bool(norm.running_mean[1].isfinite()) == (x is not xs[1])
        assert norm.running_var[[0, 2]].isfinite().all()
        tick()
    assert out.isfinite().all()
    for channel, batches in ((0, (0, 1, 2, 3)), (1, (0, 0, 2, 3)), (2, (0, 1, 2, 3))):
        paper = PaperMBN(4, 0.5)
        for t in batches:
            values = xs[t][:, channel : channel + 1]
            expected = paper.statistics(values)
            paper.push([values])
        got = norm.running_mean[channel, None], norm.running_var[channel, None]
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("burn_in", [0, 2])
def test_a_broken_entry_that_none_was_before(burn_in):
    """Nor does it reach what comes after."""
    norm = layer(window=4, burn_in=burn_in)
    for t in range(burn_in + 3):
        x = images(t)
        if t == burn_in:
            x[0, 1, 0, 0] = float("inf")
        x.requires_grad_()
        out = norm(x)
        out.square().sum().backward()
        if t != burn_in:
            assert out.isfinite().all() and x.grad.isfinite().all()
            assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()
        tick()


def test_options():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), build_norm("MBN(window=4, burn_in=0.25)", 5))
    resolve_burn_in(model, 400)
    assert model[1].burn_in_steps == 100 and norm_rows(model)[0].conv == ""
    assert "window=4, decay=0.8, double_forward=True, burn_in=100" in norm_rows(model)[0].kind
    norm = build_norm("MBN(window=2, decay=0.5, double_forward=False, burn_in=3)", 4)
    assert MBN2d(4, **norm.options()).options() == norm.options()
    fresh = build_norm("MBN", 5)
    with pytest.warns(UserWarning, match=r"burn_in=.* MBN .*2000 optimiser steps"):
        fresh(torch.randn(2, 5, 4, 4))


@pytest.mark.parametrize(
    "text, message",
    [
        ("MBN(window=0)", "window=0"),
        ("MBN(decay=0)", "decay=0"),
        ("MBN(decay=1.1)", "decay=1.1"),
        ("MBN(double_forward=1)", "double_forward=1"),
        ("MBN(burn_in=1.5)", "burn_in=1.5.*MAX_ITER"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ValueError, match=message):
        build_norm(text, 4)


def test_memory_of_another_window_or_width_is_refused():
    norm = layer(window=3)
    for t in range(2):
        norm(images(t))
        tick()
    with pytest.raises(ValueError, match="window=3, this layer has window=4"):
        layer(window=4).load_memory_state_dict(norm.memory_state_dict())
    with pytest.raises(ValueError, match="3 channels, not 5"):
        layer(5).load_memory_state_dict(norm.memory_state_dict())


# ---- Double Forward --------------------------------------------------------------------------


class PaperNet:
    """The equations of both passes for :func:`net`, with the parameters of ``model``."""

    def __init__(self, model, window=3, decay=0.6):
        self.model, self.norms = model, [PaperMBN(window, decay) for _ in range(2)]

    def __call__(self, x):
        self.ys = []
        for k, paper in enumerate(self.norms):
            y = self.model[3 * k](x)
            self.ys.append(y)
            x = F.relu(paper(y, self.model[3 * k + 1]))
        return self.model[6](x)

    def push(self, batches):
        """With the model's present weights: what a second pass over ``batches`` leaves."""
        ys = []
        with torch.no_grad():
            for x in batches:
                self(x)
                ys.append(self.ys)
        for paper, of_layer in zip(self.norms, zip(*ys, strict=True), strict=True):
            paper.push(of_layer)


@pytest.mark.parametrize("parts", [1, 2])
def test_training_equals_the_equations_over_steps(parts):
    """Both passes, every micro-batch of an accumulated step, layers refreshed in order."""
    model = net()
    other = copy.deepcopy(model)
    paper = PaperNet(other)
    optimizers = sgd(model), sgd(other)
    double_forward = DoubleForward(model)
    for t in range(7):
        batches = [images(10 * t + k) for k in range(parts)]
        for run, optimizer in zip((model, paper), optimizers, strict=True):
            optimizer.zero_grad()
            for x in batches:
                (loss_of(run(x)) / parts).backward()
            optimizer.step()
        assert double_forward.refresh() is True
        paper.push(batches)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
        for norm, reference in zip(mbns(model), paper.norms, strict=True):
            mean, var = reference.entries[0]
            torch.testing.assert_close(norm.memory.pending["mean"], mean, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(norm.memory.pending["var"], var, rtol=1e-8, atol=1e-10)
            mean, var = reference.combine(reference.entries)
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(norm.running_var, var, rtol=1e-8, atol=1e-10)
            assert norm.num_batches_tracked == parts * (t + 1)
            assert norm.memory.forwards == parts
    # the entry differs from what the first pass saw, or all this would show nothing
    assert not torch.equal(
        mbns(model)[0].memory.pending["mean"], model[0](images(0)).mean((0, 2, 3))
    )


@pytest.mark.parametrize("parts", [1, 3])
def test_weights_that_did_not_move_leave_all_as_it_was(parts):
    model = net()
    optimizer = sgd(model)
    double_forward = DoubleForward(model)
    for t in range(4):
        for k in range(parts):
            loss_of(model(images(10 * t + k))).backward()
        optimizer.step()
        if t < 3:
            double_forward.refresh()
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if t == 2 else 0.1
    grads = [p.grad.clone() for p in model.parameters()]
    before = snapshot(model)
    assert double_forward.refresh() is True
    after = snapshot(model)
    for state in (before, after):  # but that there was a second pass
        for memory in state[1].values():
            memory.pop("refreshed")
    assert_same(after, before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


class Mixed(nn.Module):
    """Norms of all kinds, dropout, a buffer that counts forwards, and proposals drawn at random."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        specs = [
            "CBN(window=3, burn_in=0)",
            "BRN(burn_in=0, ramp=0)",
            "BGN(groups=2)",
            "KN",
            "GKN(groups=2)",
            "MBN",
        ]
        blocks = [[nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3)]]
        for spec in specs:
            norm = build_norm(spec, 4, **({"burn_in": 0, "window": 3} if spec == "MBN" else {}))
            blocks.append([nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU()])
        self.body = nn.Sequential(*(m for block in blocks for m in block))
        self.middle = build_norm("MBN(window=3, burn_in=0)", 3)
        self.register_buffer("forwards", torch.zeros(()))
        self.drawn, self.tail_calls = [], []
        self.count, self.average = 0, None

    def forward(self, x, *, scale=1.0):
        self.forwards += 1
        self.count += 1
        self.average = 0.9 * (self.average or 100) + 0.1 * float(x.square().mean())
        self.drawn.append(torch.rand(3))
        x = self.body(self.middle(x) * scale)
        self.tail_calls.append(1)  # a list: the second pass leaves numbers as they were
        return x


def test_nothing_else_changes():
    model = Mixed()
    optimizer = sgd(model, 0.05)
    double_forward = DoubleForward(model)
    calls = []
    model.body[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    within = {}  # what the other norms are during the second pass, before anything is put back

    def look(norm, name):
        remembered = norm.memory_state_dict() if isinstance(norm, RememberingNorm2d) else None
        within[name] = copy.deepcopy((norm.state_dict(), remembered))

    for name, norm in model.named_modules():
        if isinstance(norm, SmallBatchNorm2d) and not isinstance(norm, MBN2d):
            norm.register_forward_hook(lambda norm, *_, name=name: look(norm, name))
    for t in range(4):
        optimizer.zero_grad()
        loss_of(model(images(t, dtype=torch.float32), scale=2.0)).backward()
        optimizer.step()
        torch.rand(t)  # a hook draws something
        state, memory = snapshot(model)
        random_state = torch.get_rng_state()
        grads = [p.grad.clone() for p in model.parameters()]
        numbers = model.count, model.average
        within.clear()
        assert double_forward.refresh() is True
        assert torch.equal(torch.get_rng_state(), random_state)
        assert torch.equal(model.drawn[-1], model.drawn[-2])
        assert (model.count, model.average) == numbers and model.count == t + 1
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        ours = [name for name, m in model.named_modules() if isinstance(m, MBN2d)]
        after, memory_after = snapshot(model)
        of_mbn = tuple(f"{name}.running" for name in ours)
        others = [key for key in state if not key.startswith(of_mbn)]
        assert "forwards" in others and len(others) == len(state) - 4
        assert_same({k: after[k] for k in others}, {k: state[k] for k in others})
        assert within.keys() > memory.keys() - set(ours) and len(within) == 4
        for name, (buffers, remembered) in within.items():
            assert_same(buffers, {key: state[f"{name}.{key}"] for key in buffers})
            assert_same(remembered, memory.get(name))
        for name in memory:
            if name not in ours:
                assert_same(memory_after[name], memory[name])
            else:
                # the weights behind it have moved
                same = torch.equal(
                    memory_after[name]["pending"]["mean"], memory[name]["pending"]["mean"]
                )
                assert same == (name == "middle"), "which sees the input alone"
    assert calls == [True, False] * 4
    assert not any(m._unchanged for m in model.modules() if hasattr(m, "_unchanged"))


def test_what_layers_tell_of_their_latest_forward_is_of_the_first_pass():
    """Diagnostics, which are logged after it."""
    model = Mixed()
    optimizer = sgd(model, 0.05)
    double_forward = DoubleForward(model)
    for t in range(3):
        loss_of(model(images(t, dtype=torch.float32))).backward()
        optimizer.step()
        before = norm_diagnostics(model)
        double_forward.refresh()
        assert_same(norm_diagnostics(model), before)
    keys = {"norm/compensation_var", "norm/r_at_limit", "norm/prediction_mean"}
    assert keys < before.keys()


def test_training_goes_on_with_the_random_stream_of_one_without_it():
    drawn = []
    for with_it in (True, False):
        model = Mixed()
        optimizer = sgd(model)
        double_forward = DoubleForward(model)
        torch.manual_seed(5)
        for t in range(3):
            first = len(model.drawn)
            loss_of(model(images(t, dtype=torch.float32))).backward()
            drawn.append(model.drawn[first])
            optimizer.step()
            if with_it:
                double_forward.refresh()
        drawn.append(torch.rand(2))
    assert_same(drawn[:4], drawn[4:])


def test_it_ends_at_the_last_layer_that_has_something_to_refresh():
    model = Mixed()
    optimizer = sgd(model)
    double_forward = DoubleForward(model)
    for t in range(2):
        for k in range(2):
            loss_of(model(images(2 * t + k, dtype=torch.float32))).backward()
        optimizer.step()
        calls = len(model.tail_calls)
        double_forward.refresh()
        assert len(model.tail_calls) == calls  # of no micro-batch


def test_nothing_to_do():
    """No second pass: no such layer, burn-in, frozen, switched off, no step, no forward."""
    calls = []

    def refreshed(model, mode=nn.Module.train, step=True):
        double_forward = DoubleForward(model)
        for t in range(2):
            out = model(images(t))
            if out.requires_grad:
                loss_of(out).backward()
        if step:
            sgd(model).step()
        mode(model)
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        result = double_forward.refresh()
        return result or double_forward.refresh()

    def freeze_norms(model):
        for norm in mbns(model):
            norm.eval()

    assert refreshed(net("CBN(burn_in=0)")) is False
    assert refreshed(net("MBN(burn_in=5)")) is False
    assert refreshed(net("MBN(burn_in=0, window=1)")) is False
    assert refreshed(net("MBN(burn_in=0, double_forward=False)")) is False
    assert refreshed(net(), freeze_norms) is False
    assert refreshed(net(), nn.Module.eval) is False
    assert refreshed(net(), step=False) is False
    assert refreshed(net().eval()) is False
    assert not calls
    assert refreshed(net()) is True and calls == [1, 1]


def test_frozen_layers_are_left_alone():
    model = net()
    double_forward = DoubleForward(model)
    optimizer = sgd(model)
    for t in range(3):
        loss_of(model(images(t))).backward()
        optimizer.step()
        double_forward.refresh()
    model[1].eval()
    before = copy.deepcopy((model[1].state_dict(), model[1].memory.pending))
    first = model[4].memory.pending
    loss_of(model(images(5))).backward()
    optimizer.step()
    assert double_forward.refresh() is True
    assert_same(
        (model[1].state_dict()["running_mean"], model[1].memory.pending),
        (before[0]["running_mean"], before[1]),
    )
    assert not torch.equal(model[4].memory.pending["mean"], first["mean"])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_was_skipped_is_not_refreshed(fused):
    """Its mini-batch belongs to the next iteration, whose second pass runs both."""
    model, other = net(), net()
    optimizer, scaler = sgd(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0)
    double_forward = DoubleForward(model)
    for t in range(5):
        optimizer.zero_grad()
        loss = loss_of(model(images(t)))
        scaler.scale(loss * float("inf") if t == 2 else loss).backward()
        before = snapshot(model)
        scaler.step(optimizer)
        scaler.update()
        assert double_forward.refresh() is (t != 2)
        if t == 2:
            assert_same(snapshot(model), before)
    optimizer, double_forward = sgd(other), DoubleForward(other)
    for batches in ([0], [1], [2, 3], [4]):
        optimizer.zero_grad()
        losses = [loss_of(other(images(t))) for t in batches]
        losses[-1].backward()
        optimizer.step()
        double_forward.refresh()
    for a, b in zip(mbns(model), mbns(other), strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-9, atol=1e-11)
        assert a.steps == b.steps == 3


def test_an_error_inside_leaves_all_as_it_was():
    model = net()
    double_forward = DoubleForward(model)
    optimizer = sgd(model)
    for t in range(3):
        loss_of(model(images(t))).backward()
        optimizer.step()
        if t < 2:
            double_forward.refresh()

    def fail(*_):
        raise RuntimeError("out of memory")

    before, random_state = snapshot(model), torch.get_rng_state()
    handle = model[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        double_forward.refresh()
    handle.remove()
    assert_same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert double_forward.refresh() is False  # forgotten; training goes on as without it
    loss_of(model(images(8))).backward()
    optimizer.step()
    assert double_forward.refresh() is True


def test_layers_that_one_of_the_passes_does_not_reach():
    """A head without RoIs: what it staged, now or earlier, is neither lost nor replaced."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = net()[:3], net()[:3]
            self.takes_head = True

        def forward(self, x):
            y = self.stem(x)
            return y + self.head(x) if self.takes_head else y

    model = Heads().double()
    double_forward = DoubleForward(model)
    optimizer = sgd(model)

    def iterate(t, first, second):
        model.takes_head = first
        loss_of(model(images(t))).backward()
        optimizer.step()
        staged = dict(model.head[1].memory.pending)
        model.takes_head = second
        assert double_forward.refresh() is True
        return staged, model.head[1].memory.pending

    iterate(0, True, True)
    for second in (False, True):
        before, after = iterate(1, True, False)
        assert_same(before, after)
        before, after = iterate(2, False, second)  # still waits to be committed
        assert_same(before, after)
    before, after = iterate(3, True, True)
    assert not torch.equal(before["mean"], after["mean"])


def test_the_second_pass_runs_under_the_autocast_of_the_first():
    model = net().float()
    dtypes = []
    model[1].register_forward_pre_hook(lambda m, args: dtypes.append(args[0].dtype))
    double_forward = DoubleForward(model)
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model(images(0, dtype=torch.float32))
        loss_of(out.float()).backward()
        sgd(model).step()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # what is around refresh does not matter
            assert double_forward.refresh() is True
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_casts_of_the_weights_before_the_step_are_not_used():
    model, other = net().float(), net().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double_forward = DoubleForward(model)
        loss_of(model(images(0, dtype=torch.float32)).float()).backward()
        sgd(model).step()
        double_forward.refresh()
    again = DoubleForward(other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = other(images(0, dtype=torch.float32))
    loss_of(out.float()).backward()
    sgd(other).step()
    again.refresh()
    assert_same(model[1].memory.pending, other[1].memory.pending)


@pytest.mark.parametrize("refreshes", [True, False])
def test_inputs_are_released(refreshes):
    model = net()
    double_forward = DoubleForward(model)
    seen = []
    for t in range(3):
        x = images(t)
        seen.append(weakref.ref(x))
        loss_of(model(x)).backward()
        sgd(model).step()
        del x
        if refreshes:
            double_forward.refresh()
    gc.collect()
    assert [r() is None for r in seen] == [True, True, refreshes]
    double_forward.remove()
    gc.collect()
    assert seen[2]() is None
    model(images(5))
    assert not double_forward._forwards


def test_forwards_without_gradient_are_not_recorded():
    model = net()
    double_forward = DoubleForward(model)
    loss_of(model(images(0))).backward()
    with torch.no_grad():
        model(images(1))
    model.eval()(images(2))
    model.train()
    assert len(double_forward._forwards) == 1


def test_a_number_that_only_the_second_pass_sets_is_taken_away():
    model = net()
    model.switch = True

    def count(model, *_):
        if not torch.is_grad_enabled():
            model.extra, model.late, model.switch = 1, 2.0, False

    model.late = None
    model.register_forward_pre_hook(count)
    double_forward = DoubleForward(model)
    loss_of(model(images(0))).backward()
    sgd(model).step()
    assert double_forward.refresh() is True
    assert not hasattr(model, "extra") and model.late is None
    assert model.switch is False, "numbers only"


class Failing(nn.Module):
    """Two layers with an error or Ctrl-C between them, and a part that its DoubleForward hooks."""

    def __init__(self, error):
        super().__init__()
        self.body, self.error, self.fails, self.calls = net(), error, False, []
        self.proposals = nn.Identity()

    def forward(self, x):
        x = self.proposals(self.body[:3](x))
        self.calls.append(torch.is_grad_enabled())
        if self.fails:
            raise self.error("out of memory")
        return self.body[3:](x)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "before, then", [(0, "forward"), (1, "forward"), (0, "evaluation and forward"), (1, "step")]
)
def test_a_forward_that_raised_is_not_run_again(error, before, then):
    """A loop that catches the error goes on, in the same iteration, as if it had not been."""
    model, other = Failing(error), Failing(error)
    runs = []
    for run in (model, other):
        double_forward, optimizer = DoubleForward(run, run.proposals), sgd(run)
        for t in range(4):
            optimizer.zero_grad()
            for k in range(before):
                loss_of(run(images(10 * t + k))).backward()
            if run is model and t == 2:
                run.fails = True
                with pytest.raises(error):
                    run(10 * images(90, size=9))
                run.fails = False
                # Ctrl-C is noticed later
                assert (not run.proposals._forward_hooks) == (error is RuntimeError)
                if "evaluation" in then:
                    run.eval()(images(91))
                    run.train()
            last = t != 2 or "forward" in then
            if last:
                loss_of(run(images(10 * t + 5))).backward()
            optimizer.step()
            run.calls.clear()
            assert double_forward.refresh() is True
            assert run.calls == [False] * (before + last)
            assert not double_forward._forwards and not run.proposals._forward_hooks
        runs.append(snapshot(run))
    for state, _ in runs:
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]  # the failed forward counts
    for memory in (m for _, memories in runs for m in memories.values()):
        memory.pop("stepped")
    assert_same(*runs)


class Silent(nn.Module):
    """Keeps its output to itself."""

    def __init__(self):
        super().__init__()
        self.body, self.out, self.fails = net(), None, False

    def forward(self, x):
        self.out = self.body(x)
        if self.fails:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("within", ["nothing", "an except block"])
def test_a_forward_that_returns_none_is_run_again(within):
    model, reference = Silent(), net()
    runs = []
    for run in (model, reference):
        double_forward, optimizer = DoubleForward(run), sgd(run)
        for t in range(3):
            optimizer.zero_grad()
            try:
                if within != "nothing":
                    raise KeyError
                out = run(images(t))
            except KeyError:
                if run is model:  # one that fails while another error is handled does not count
                    run.fails = True
                    with pytest.raises(RuntimeError, match="out of memory"):
                        run(images(90))
                    run.fails = False
                out = run(images(t))
            loss_of(run.out if run is model else out).backward()
            optimizer.step()
            assert double_forward.refresh() is True
        body = run.body if run is model else run
        memories = memory_state_dict(body)
        for memory in memories.values():
            memory.pop("stepped")  # steps of the other run, in this process
        runs.append(memories)
    assert_same(*runs)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_forwards_without_gradient_before_an_iteration_do_not_count(checkpointed):
    """PreciseBN in mid-training: the second pass ends where it ends without."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tails = net()[:5], []

        def forward(self, x):
            x = checkpoint(self.body, x, use_reentrant=True) if checkpointed else self.body(x)
            self.tails.append(1)
            return x

    model = Net()
    double_forward, optimizer = DoubleForward(model), sgd(model)
    for t, without in enumerate([0, 1, 2, 5]):
        with torch.no_grad():
            for k in range(without):
                model(images(50 + k))
        optimizer.zero_grad()
        outs = [model(images(10 * t + k).requires_grad_()) for k in range(2)]
        sum(map(loss_of, outs)).backward()  # both are recomputed after both have run
        optimizer.step()
        assert [norm.memory.forwards for norm in mbns(model)] == [2, 2]
        model.tails.clear()
        assert double_forward.refresh() is True and not model.tails
        assert [norm.memory.forwards for norm in mbns(model)] == [2, 2]


def test_a_generator_with_layers_is_told_after_a_forward_without_gradient():
    """One leftover, and one layer call that takes its place."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), net()[1].float())
    double_forward = DoubleForward(model, model[1])
    x = images(0, dtype=torch.float32)
    loss_of(model(x)).backward()
    sgd(model).step()
    with torch.no_grad():
        model(x)
    loss_of(model(x)).backward()
    assert double_forward._forwards[0].proposals._outputs == [None]


def test_copies_of_the_model_are_not_recorded():
    """Nobody would refresh them; but a copy made with its DoubleForward is refreshed by it."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), net().double()).double()
    model[0].requires_grad_(False)
    double_forward = DoubleForward(model)

    def iterate(model, double_forward, ts):
        optimizer = sgd(model)
        for t in ts:
            optimizer.zero_grad()
            loss_of(model(images(t))).backward()
            optimizer.step()
            assert double_forward.refresh() is True
        return snapshot(model)[0]

    def keeps_its_input(model):
        x = images(90)
        seen = weakref.ref(x)
        loss_of(model(x)).backward()
        del x
        gc.collect()
        return seen() is not None

    iterate(model, double_forward, range(3))
    for copied in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        alone = copied(model)
        assert not keeps_its_input(copied(model)) and not keeps_its_input(copied(copied(model)))
        fresh = DoubleForward(alone)
        pairs = [copied((model, double_forward)), copied((double_forward, model))[::-1]]
        states = [iterate(alone, fresh, range(3, 6))]
        for twin, its in pairs:
            assert its.model is twin
            states.append(iterate(twin, its, range(3, 6)))
        for state in states[1:]:
            assert_same(state, states[0])
        assert keeps_its_input(twin)
        its.remove()
        assert not keeps_its_input(twin)
    expected = iterate(model, double_forward, range(3, 6))
    assert_same(states[0], expected)


def test_copies_of_the_model_carry_no_images():
    model = net()
    double_forward = DoubleForward(model)
    loss_of(model(images(0, n=50, size=50))).backward()
    sgd(model).step()
    assert len(pickle.dumps(model)) < 100_000
    average = copy.deepcopy(model).eval()
    assert torch.isfinite(average(images(1))).all()
    assert len(double_forward._forwards) == 1 and double_forward.refresh() is True


@pytest.mark.parametrize("when", ["before the second pass", "after it"])
def test_memory_round_trip(when):
    """Through torch.save, of plain data, into a model built anew that goes on alike."""
    model = net()
    optimizer = sgd(model)
    double_forward = DoubleForward(model)
    for t in range(4):
        optimizer.zero_grad()
        loss_of(model(images(t))).backward()
        optimizer.step()
        if t < 3 or when == "after it":
            double_forward.refresh()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "memory": memory_state_dict(model)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = net()
    other.load_state_dict(loaded["model"])
    load_memory_state_dict(other, loaded["memory"])
    double_forward.remove()
    double_forward = None
    for run in (model, other):
        load_memory_state_dict(run, loaded["memory"])
        again, optimizer = DoubleForward(run), sgd(run)
        for t in range(4, 7):
            optimizer.zero_grad()
            loss_of(run(images(t))).backward()
            optimizer.step()
            again.refresh()
    ours, theirs = snapshot(model), snapshot(other)
    for memory in (*ours[1].values(), *theirs[1].values()):
        memory.pop("stepped")  # steps of the other run, in this process
    assert_same(ours, theirs)
