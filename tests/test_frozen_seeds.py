"""Predictions behind frozen parts, against draws and integrals that share nothing with the package,
and what the one forward that is traced for them leaves behind."""

from __future__ import annotations

import copy
import pickle

import kalman
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cbn_det.norms import DoubleForward, clock, find_chain, find_chain_at_call, kn_chain
from cbn_det.norms.prediction import evaluated
from cbn_det.norms.spec import build_norm

WIDTH = 6


class FrozenBatchNorm(nn.Module):
    """As detectron2 and torchvision have it: four buffers; another operation with a gradient."""

    def __init__(self, width, eps):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def frozen_norm(kind):
    # eps so large that it counts
    if kind == "frozen":
        return FrozenBatchNorm(WIDTH, eps=0.1)
    if kind == "torchvision":
        return pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(WIDTH, eps=0.1)
    return nn.BatchNorm2d(WIDTH, eps=0.1).eval().requires_grad_(False)


KINDS = ("frozen", "torchvision", "evaluation")


class Net(nn.Module):
    """A frozen stem and residual branch, then trained layers."""

    def __init__(self, kind="frozen", norm="KN(gain=0.5)"):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, WIDTH, 3, padding=1), frozen_norm(kind)
        self.conv2, self.norm2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), frozen_norm(kind)
        self.conv3, self.norm3 = nn.Conv2d(WIDTH, 4, 3, bias=False), build_norm(norm, 4)
        self.conv4, self.norm4 = nn.Conv2d(4, 4, 3), build_norm(norm, 4)
        self.dropout = nn.Dropout(0.5)
        self.drawn = 0
        for frozen in (self.norm1, self.norm2):
            with torch.no_grad():
                for name, low, high in (
                    ("weight", 0.5, 1.5),
                    ("bias", -0.5, 0.5),
                    ("running_mean", -1, 1),
                    ("running_var", 0.3, 2),
                ):
                    getattr(frozen, name).uniform_(low, high)
        for part in (self.conv1, self.conv2):
            part.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for frozen in (self.norm1, self.norm2):
            frozen.eval()
        return self

    def forward(self, x):
        x = F.relu_(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x)) + x), 2, 1)
        return self.norm4(self.conv4(F.relu(self.norm3(self.conv3(x)))))


FOLLOWS = ["relu(norm2 + relu(norm1))", "relu(norm3)"]


def x(seed=1, dtype=torch.float32):
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rectified_by_integration(mean, var):
    """Of Gaussians, by the trapezoid rule, numpy in double precision."""
    grid = np.linspace(-12, 12, 200_001)
    density = np.exp(-(grid**2) / 2)
    density /= density.sum()
    values = np.maximum(mean[:, None] + np.sqrt(var)[:, None] * grid, 0.0)
    first = values @ density
    return first, ((values - first[:, None]) ** 2) @ density


def put_out(norm):
    """By a frozen norm, for inputs N(running_mean, running_var)."""
    mean, var, weight, bias = (
        getattr(norm, name).double().numpy()
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    return bias + 0 * mean, weight**2 * var / (var + norm.eps)


def expected_seed(model):
    pairs = [put_out(norm) for norm in (model.norm1, model.norm2)]
    short = rectified_by_integration(*pairs[0])
    mean, var = rectified_by_integration(pairs[1][0] + short[0], pairs[1][1] + short[1])
    weight = model.conv3.weight.detach().double().numpy()
    return np.einsum("oiab,i->o", weight, mean), np.einsum("oiab,i->o", weight**2, var)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["KN(gain=0.5)", "GKN(groups=2, gain=0.5)"])
def test_the_seed_is_what_frozen_norms_put_out(kind, norm):
    model = Net(kind, norm).double()
    find_chain_at_call(model)
    out = model(x(dtype=torch.float64))
    assert [row.follows for row in kn_chain(model)] == FOLLOWS
    like = torch.empty(0, dtype=torch.float64)
    mean, var = expected_seed(model)
    found = [value.detach().numpy() for value in evaluated(model.norm3.chain, like)]
    np.testing.assert_allclose(found[0], mean, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found[1], var, rtol=1e-6, atol=1e-9)
    # and the output of the very first forward is the equations' with it
    with torch.no_grad():
        y = F.relu(model.norm1(model.conv1(x(dtype=torch.float64))))
        y = model.conv3(F.max_pool2d(F.relu(model.norm2(model.conv2(y)) + y), 2, 1))
        layer = kalman.Kalman(model.norm3, 0.5, 2 if norm.startswith("GKN") else None)
        y = F.relu(layer(y, (torch.from_numpy(mean), torch.from_numpy(var))))
        after = kalman.convolved(*kalman.rectified(*layer.handed), model.conv4)
        last = kalman.Kalman(model.norm4, 0.5, layer.groups)
        torch.testing.assert_close(out, last(model.conv4(y), after), rtol=1e-6, atol=1e-6)


def test_the_seed_is_right_for_inputs_as_the_statistics_say():
    """Draws of N(running_mean, running_var), through the modules themselves."""
    model = Net()
    find_chain(model, x())
    torch.manual_seed(0)
    with torch.no_grad():
        shape = (8, WIDTH, 200, 200)
        drawn = []
        for norm in (model.norm1, model.norm2):
            mean, var = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
            drawn.append(norm(mean + var.sqrt() * torch.randn(shape)))
        y = model.conv3(F.relu(drawn[1] + F.relu(drawn[0])))
        mean, var = evaluated(model.norm3.chain, torch.empty(0))
    # the second rectification takes the sum of a Gaussian and a rectified one for a Gaussian
    assert float(((mean - y.mean((0, 2, 3))) / y.std((0, 2, 3))).abs().max()) < 0.1
    torch.testing.assert_close(var, y.var((0, 2, 3)), rtol=0.1, atol=0)


# ---- the traced forward ----------------------------------------------------------------------


def count_forwards(model):
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(model.training))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_once_and_leaves_no_trace(kind):
    model = nn.Sequential(Net(kind), nn.Dropout(0.5), nn.BatchNorm2d(4))
    find_chain_at_call(model)
    calls = count_forwards(model[0])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    seen, ticks = [], clock.now()
    frozen = model[0].norm1.register_forward_hook(
        lambda m, a, out: seen.append(({n: v.training for n, v in model.named_modules()}, out))
    )
    torch.manual_seed(5)
    states = [torch.get_rng_state()]
    model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    model(x())
    # the training forward found modes, random state and what is trained as without the other
    assert len(seen) == 2 and seen[1][0] == modes and not seen[1][1].requires_grad
    assert torch.equal(*states) and ticks == clock.now()
    assert trained == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed and all(k.startswith(("0.norm3", "0.norm4", "2.")) for k in changed)
    counters = {k: int(v) for k, v in model.state_dict().items() if "num_batches" in k}
    assert {counters[k] for k in ("0.norm3.num_batches_tracked", "2.num_batches_tracked")} == {1}
    frozen.remove()
    for _ in range(2):
        model(x()).sum().backward()
    assert calls == [False, True, True, True]


def test_the_same_losses_as_with_a_chain_known_before():
    """Double Forward, memory and gradients are as if there had been no other forward."""

    def losses(known):
        model = nn.Sequential(Net(), nn.ReLU(), nn.Conv2d(4, 4, 1))
        model.append(build_norm("MBN(burn_in=0, window=2)", 4))
        model.append(nn.Dropout(0.3))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        double_forward = DoubleForward(model)
        if known:
            find_chain(model, x())
        else:
            find_chain_at_call(model)
        torch.manual_seed(1)
        for t in range(3):
            optimizer.zero_grad()
            loss = model(x(t)).pow(3).mean()
            loss.backward()
            optimizer.step()
            assert double_forward.refresh()
            yield float(loss.detach())
        yield from (float(p.detach().sum()) for p in model.parameters())

    assert list(losses(False)) == list(losses(True))


def test_without_anything_frozen_there_is_none():
    model = Net("evaluation")
    for norm in (model.norm1, model.norm2):
        norm.requires_grad_(True)
    model.requires_grad_(True)
    find_chain_at_call(model)
    calls = count_forwards(model)
    model(x())
    assert calls == [True] and kn_chain(model)[0].follows == FOLLOWS[0]


def test_a_forward_that_cannot_be_repeated_falls_back_with_a_warning():
    class Picky(Net):
        def forward(self, x, *, scale):
            if not self.training:
                raise ValueError("no evaluation")
            return super().forward(x * scale)

    model, plain = Picky(), Net(norm="KN(gain=0)")
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    find_chain_at_call(model)
    with pytest.warns(UserWarning, match="frozen parts.*find_chain"):
        out = model(x(), scale=1.0)
    assert model.training and trained == {n: p.requires_grad for n, p in model.named_parameters()}
    assert [r.follows for r in kn_chain(model)] == ["- (a model input, or frozen)", "relu(norm3)"]
    model.norm4.gain = 0.0
    torch.testing.assert_close(model(x(), scale=1.0), plain(x()))  # no second warning
    assert out.isfinite().all()


def test_norms_without_statistics_end_the_chain():
    model = Net()
    model.norm2.running_mean.zero_()
    model.norm2.running_var.fill_(1.0 - 1e-5)
    find_chain(model, x())
    assert kn_chain(model)[0].follows == "- (a frozen norm without statistics)"
    model(x())
    assert kn_chain(model)[0].follows == "- (a frozen norm without statistics)"
    model.load_state_dict(Net().state_dict())
    assert kn_chain(model)[0].follows == "?"
    find_chain(model, x())
    model(x())
    assert [row.follows for row in kn_chain(model)] == FOLLOWS


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_seeded_by_their_own_frozen_norms(how):
    model = Net()
    find_chain(model, x())
    twin = how(model)
    with torch.no_grad():
        for norm in (twin.norm1, twin.norm2):
            norm.bias += 1.0
    fresh = Net()
    fresh.load_state_dict(twin.state_dict())
    find_chain(fresh, x())
    assert torch.equal(twin(x(2)), fresh(x(2)))
    assert not torch.allclose(twin(x(2)), model(x(2)), atol=1e-3)
    assert [row.follows for row in kn_chain(twin)] == FOLLOWS


def test_moved_reloaded_and_changed_in_place():
    """Constants are computed once; not when what they are made of has changed since."""
    model = Net().double()
    y = x(dtype=torch.float64)
    find_chain(model, y)
    model(y)

    def check(changed):
        fresh = Net().double()
        fresh.load_state_dict(changed.state_dict())
        fresh.to(next(changed.parameters()).dtype)
        inputs = y.to(next(changed.parameters()).dtype)
        find_chain(fresh, inputs)
        torch.testing.assert_close(changed(inputs), fresh(inputs), rtol=1e-4, atol=1e-4)
        mean, var = expected_seed(changed)
        like = torch.empty(0, dtype=torch.float64)
        predicted = changed.norm3._predict(inputs, like)[0].detach().numpy()
        np.testing.assert_allclose(predicted, mean, rtol=1e-5)

    with torch.no_grad():
        model.norm2.bias.add_(1.0)
    check(model)
    model.load_state_dict(Net().double().state_dict())
    find_chain(model, y)
    check(model)
    model.norm1.bias = model.norm1.bias + 1.0
    check(model)
    with torch.no_grad():
        model.norm1.running_var.mul_(0.1)
    check(model)
    check(model.float())


def test_gkn_evaluates_as_it_was_trained_behind_frozen_norms():
    model = Net(norm="GKN(groups=2, gain=0.5)")
    find_chain(model, x())
    expected = model(x()).detach()
    fresh = Net(norm="GKN(groups=2, gain=0.5)")
    fresh.load_state_dict(model.state_dict())
    find_chain(fresh, x())
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x()), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.eval()(x()), fresh(x()))
    assert kn_chain(fresh) == kn_chain(model)


def test_frozen_under_autocast():
    model = Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        find_chain(model, x())
        out = model(x())
    out.float().pow(2).mean().backward()
    assert [row.follows for row in kn_chain(model)] == FOLLOWS
    assert model.conv3.weight.grad.isfinite().all() and model.conv1.weight.grad is None


def test_casts_that_autocast_has_cached_hide_nothing():
    model = Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            model.eval()(x())  # casts of trained weights without a graph
        find_chain(model, x())
    assert [row.follows for row in kn_chain(model)] == FOLLOWS


def test_layers_that_no_evaluation_reaches_do_not_have_it_repeated():
    class WithHead(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(4, 4, 1), build_norm("KN(gain=0.5)", 4))
            self.at_work = False

        def forward(self, x):
            x = super().forward(x)
            return self.head(x) if self.at_work and self.training else x

    model = WithHead()
    find_chain_at_call(model)
    calls = count_forwards(model)
    for _ in range(3):
        model(x())
    assert calls == [False, True, True, True] and kn_chain(model)[2].follows == "?"
    model.at_work = True
    model(x())
    assert calls[-2:] == [True, True] and kn_chain(model)[2].follows == "norm4"


def test_a_resumed_run_goes_on_bit_for_bit():
    model, fresh = Net(), Net()
    find_chain_at_call(model)
    find_chain_at_call(fresh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for t in range(2):
        optimizer.zero_grad()
        model(x(t)).pow(3).mean().backward()
        optimizer.step()
    fresh.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    outs = [m(x(5)) for m in (model, fresh)]
    for out in outs:
        out.pow(2).mean().backward()
    assert torch.equal(*outs)
    assert torch.equal(model.conv3.weight.grad, fresh.conv3.weight.grad)


def test_under_distributed_data_parallel(tmp_path):
    model, plain = Net(), Net()
    for each in (model, plain):
        find_chain_at_call(each)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for t in range(2):
            outs = [m(x(t)) for m in (parallel, plain)]
            assert torch.equal(*outs)
            for out in outs:
                out.pow(2).mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert [row.follows for row in kn_chain(model)] == FOLLOWS
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_checkpointed_parts_are_followed():
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, plain = Checkpointed(), Net()
    for each in (model, plain):
        find_chain_at_call(each)
    for t in range(2):
        outs = [m(x(t).requires_grad_()) for m in (model, plain)]
        assert torch.equal(*outs)
        for out in outs:
            out.pow(2).mean().backward()
    assert torch.equal(model.conv3.weight.grad, plain.conv3.weight.grad)
