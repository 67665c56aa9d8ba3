"""CBN against the paper's equations written out in oracles.py, finite differences and BatchNorm."""

import copy

import numpy as np
import pytest
import torch
from oracles import (
    MixtureEMA,
    PaperCBN,
    PaperNet,
    batch_norm,
    carry,
    conv_moments,
    conv_patches,
    derivatives,
)
from torch import nn

from cbn_det.norms import CBN2d, build_norm, compensation

CONVS = {
    "3x3": lambda: nn.Conv2d(3, 5, 3, padding=1, bias=False),
    "bias": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
    "dilation": lambda: nn.Conv2d(3, 5, 3, padding=2, dilation=2, bias=False),
    "groups, bias": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
    "1x1": lambda: nn.Conv2d(3, 5, 1, bias=False),
    "5x5 same": lambda: nn.Conv2d(3, 5, 5, padding="same", bias=False),
    "circular": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False),
    "asymmetric": lambda: nn.Conv2d(3, 5, (2, 3), padding="same", bias=False),
}
RULES = {"taylor": "max", "none": "none"}


def layer(conv, dtype=torch.float64, **options):
    """By default to the letter of the paper: each entry with its own derivative."""
    options = {"burn_in": 0, "ema": "batch", "positions": None, **options}
    return nn.Sequential(conv, CBN2d(conv.out_channels, **options)).to(dtype)


def tick(model=None):
    """An optimiser step that changes nothing."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0).step()


def perturb(conv, size, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter += size * torch.randn_like(parameter)


def images(conv, seed, n=2, size=(7, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, conv.in_channels, *size, generator=generator, dtype=dtype) + 0.4


def weights_of(out, parameters):
    """Gradients of a fixed, uneven function of the output."""
    probe = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((probe * out + (out**2) * probe.flip(0) / 3).sum(), parameters)


# ---- one entry, one step ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("mode", RULES)
def test_output_and_gradients_equal_the_paper_over_steps(kind, mode):
    """Random walk of the weights; window 3, so entries of two ages and a full ring."""
    torch.manual_seed(3)
    model = layer(CONVS[kind](), window=3, compensation=mode)
    conv, norm = model
    paper = PaperCBN(3, RULES[mode])
    leaves = [*model.parameters()]
    for t in range(6):
        x = images(conv, t).requires_grad_()
        got, expected = model(x), paper(conv(x), conv, norm.weight, norm.bias)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        for g, e in zip(
            weights_of(got, [x, *leaves]), weights_of(expected, [x, *leaves]), strict=True
        ):
            torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-8)
        paper.push(x, conv)
        tick()
        perturb(model, 0.03, seed=t)


def test_the_max_rule_at_work():
    """Weights that jump: where the linear second moment falls below the squared mean."""
    torch.manual_seed(0)
    model = layer(nn.Conv2d(3, 8, 3, bias=False), window=4)
    conv, norm = model
    paper, clamped = PaperCBN(4, "max"), 0.0
    for t in range(8):
        x = images(conv, t)
        got, expected = model(x), paper(conv(x), conv, norm.weight, norm.bias)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
        if paper.entries:
            clamped += float(norm.diagnostics["clamped"]) * 8 * len(paper.entries)
        paper.push(x, conv)
        tick()
        perturb(conv, 0.5, seed=t)
    assert paper.affected > 10 and round(clamped) == paper.affected


@pytest.mark.parametrize("kind", CONVS)
def test_a_remembered_mean_is_that_of_the_old_input_under_the_new_weight(kind):
    """Brute force in numpy, without the reference class, and with a large change of the weight."""
    model = layer(CONVS[kind](), window=2)
    conv, norm = model
    old = images(conv, 0)
    model(old)
    tick()
    perturb(conv, 0.5)
    model(images(conv, 1))  # commits
    mean, _ = conv_moments(conv_patches(old.numpy(), conv), conv.weight.detach().numpy())
    np.testing.assert_allclose(norm.memory.older[0], mean, rtol=1e-9, atol=1e-12)


def test_error_in_the_change_of_the_weight():
    """Compensated, the mean is exact, and the variance off by the second order: the linear estimate
    of the second moment is too small. As it is, an entry is off by the first order."""
    errors = {}
    for mode in RULES:
        for scale in (0.02, 0.01):
            torch.manual_seed(0)
            model = layer(nn.Conv2d(3, 16, 3, bias=False), window=2, compensation=mode)
            conv, norm = model
            old = images(conv, 0, n=4) + 1.0
            model(old)
            tick()
            torch.manual_seed(5)
            with torch.no_grad():
                conv.weight += scale * torch.randn_like(conv.weight)
            model(images(conv, 1))  # commits
            mean, var = norm.memory.older
            true_mean, true_var = conv_moments(
                conv_patches(old.numpy(), conv), conv.weight.detach().numpy()
            )
            if mode != "none":
                np.testing.assert_allclose(mean.numpy(), true_mean, atol=1e-10)
            errors[mode, scale] = true_var - var.numpy()
    for mode, order in (("taylor", 2), ("none", 1)):
        ratio = np.linalg.norm(errors[mode, 0.02]) / np.linalg.norm(errors[mode, 0.01])
        assert ratio == pytest.approx(2**order, rel=0.1)
    assert (errors["taylor", 0.02] >= -1e-12).all()


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("kind", ["bias", "groups, bias", "1x1"])
def test_gradcheck_with_the_memory_held_constant(mode, kind):
    """Finite differences through conv weight, conv bias, affine parameters and input.

    The compensation of remembered entries sees the weight as a constant, so the finite difference
    may not move it: it runs on a convolution whose weight the norm is not looking at."""
    torch.manual_seed(0)
    model = layer(CONVS[kind](), window=3, compensation=mode)
    conv, norm = model
    for t in range(2):
        model(images(conv, t))
        tick()
        perturb(conv, 0.05, t)
    model(images(conv, 5))  # commits; what it staged itself is not read before another step
    x = images(conv, 6, n=1, size=(3, 4)).requires_grad_()
    weight = conv.weight.detach().clone().requires_grad_()
    scale = torch.rand(conv.out_channels, dtype=torch.float64).add(0.5).requires_grad_()
    shift = torch.randn(conv.out_channels, dtype=torch.float64).requires_grad_()
    bias = None if conv.bias is None else conv.bias.detach().clone().requires_grad_()

    def forward(x, weight, scale, shift, bias=None):
        from cbn_det.norms.functional import moments
        from cbn_det.norms.normalization import normalize

        y = conv._conv_forward(x, weight, bias)
        if bias is not None:
            conv.__dict__["_parameters"]["bias"] = bias  # entries follow the present bias
        return normalize(y, norm.estimate(moments(y)), scale, shift, norm.eps)

    leaves = [x, weight, scale, shift] + ([] if bias is None else [bias])
    assert torch.autograd.gradcheck(forward, leaves, atol=1e-6)


def test_the_gradient_has_its_projections_divided_by_the_number_of_entries():
    """The closed form of the backward pass, written out (oracle 4)."""
    torch.manual_seed(0)
    model = layer(nn.Conv2d(3, 5, 3, bias=False), window=4)
    for t in range(3):
        model(images(model[0], t))
        tick()
    y = model[0](images(model[0], 9)).detach()
    x_hat = None
    seen = y.clone().requires_grad_()
    model[1]._keep_input(model[0], (images(model[0], 9),))
    out = model[1](seen)
    g = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, seen, g)
    x_hat = out.detach()  # affine is the identity at the start
    std = ((y[0, :, 0, 0] - y[0, :, 0, 1]) / (x_hat[0, :, 0, 0] - x_hat[0, :, 0, 1])).view(
        1, -1, 1, 1
    )
    mean = lambda t: t.mean((0, 2, 3), keepdim=True)  # noqa: E731
    expected = (g - mean(g) / 4 - x_hat * mean(g * x_hat) / 4) / std
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# ---- unchanged weights, and burn-in ----------------------------------------------------------


@pytest.mark.parametrize("mode", RULES)
def test_unchanged_weights_give_the_concatenated_batches(mode):
    """Oracle 5: statistics of BatchNorm over the batches of the window, gradient with 1/k."""
    torch.manual_seed(0)
    model = layer(nn.Conv2d(3, 5, 3, padding=1), window=4, compensation=mode)
    conv, norm = model
    xs = [images(conv, t) for t in range(4)]
    for x in xs[:3]:
        model(x)
        tick()
    got = model(xs[3])
    joined = nn.BatchNorm2d(5).double()(conv(torch.cat(xs)))
    torch.testing.assert_close(got, joined[-2:], rtol=1e-9, atol=1e-9)
    # d/dx of the last batch: BatchNorm over everything, the gradient at the other batches being 0
    leaf = xs[3].clone().requires_grad_()
    torch.manual_seed(1)
    probe = torch.randn_like(got)
    (ours,) = torch.autograd.grad((model(leaf) * probe).sum(), leaf)
    leaf = xs[3].clone().requires_grad_()
    out = nn.BatchNorm2d(5).double()(conv(torch.cat([*xs[:3], leaf])))
    (theirs,) = torch.autograd.grad((out[-2:] * probe).sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_burn_in_counts_optimiser_steps_and_the_window_fills_from_one():
    model = layer(nn.Conv2d(3, 5, 1), window=3, burn_in=2)
    norm = model[1]
    entries = []
    for t in range(6):
        for part in range(2):  # accumulation: two forwards an iteration
            model(images(model[0], 2 * t + part))
        entries.append(len(norm.memory))
        tick()
    assert entries == [0, 0, 0, 1, 2, 2] and norm.steps == 5


def test_burn_in_is_resolved_against_the_schedule():
    norm = CBN2d(4, burn_in=0.25)
    norm.resolve_burn_in(1000)
    assert norm.burn_in_steps == 250
    whole = CBN2d(4, burn_in=30)
    whole.resolve_burn_in(1000)
    assert whole.burn_in_steps == 30
    unresolved = layer(nn.Conv2d(3, 4, 1), burn_in=0.25)
    with pytest.warns(UserWarning, match="resolve_burn_in"):
        unresolved(images(unresolved[0], 0))
    assert unresolved[1].burn_in_steps == 750  # of a schedule of 3000


@pytest.mark.parametrize("momentum", [1.0, None])  # of fvcore's PreciseBN, of torch's update_bn
@pytest.mark.parametrize("spec", ["CBN", "MBN", "BRN"])
def test_statistics_can_be_computed_anew_without_a_schedule(spec, momentum, recwarn):
    """Burn-in has no part in it: nothing to warn about, and nothing is decided."""
    norm = build_norm(f"{spec}(burn_in=0.25)", 4)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), norm), torch.randn(2, 3, 5, 5)
    own, norm.momentum = norm.momentum, momentum
    with torch.no_grad():
        y = model[0](x)
        model(x)
    torch.testing.assert_close(norm.running_mean, y.mean((0, 2, 3)))
    assert not recwarn and all(getattr(norm, f"{name}_steps") is None for name in norm.timed)
    norm.momentum = own
    resolved = copy.deepcopy(model)
    resolved[1].resolve_burn_in(100)
    resolved(x)
    assert not recwarn and resolved[1].burn_in_steps == 25
    with pytest.warns(UserWarning, match="resolve_burn_in"):
        model(x)
    assert norm.burn_in_steps == 750


# ---- whole trajectories ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("burn_in", [0, 3])
def test_training_trajectory_equals_the_paper(mode, burn_in):
    """SGD on a stack of convolutions, in float64: parameters stay the same for 12 steps."""
    torch.manual_seed(0)
    options = {
        "window": 3,
        "burn_in": burn_in,
        "ema": "batch",
        "compensation": mode,
        "positions": None,
    }
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        CBN2d(6, **options),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2),
        CBN2d(6, **options),
        nn.Conv2d(6, 4, 1, bias=False),
        CBN2d(4, **options),
    ).double()
    other = copy.deepcopy(net)
    paper = PaperNet(other, window=3, rule=RULES[mode])
    start = net[0].weight.detach().clone()
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
        for m in (net, other)
    ]
    for t in range(12):
        x = images(net[0], t)
        target = images(net[4], 100 + t, size=(4, 4))[:, :4]
        h = x
        for k in (0, 2, 4):
            h = torch.relu(net[k + 1](net[k](h)))
        if t == burn_in:
            assert all(not r.entries for r in paper.norms)
        losses = []
        for out, optimizer in ((h, optimizers[0]), (paper(x), optimizers[1])):
            loss = (out - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-7)
        if t >= burn_in:
            paper.push()  # with the weights of this iteration
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert (net[0].weight - start).norm() > 0.3 * start.norm()


# ---- the authors' drop rule ------------------------------------------------------------------


def drop_and_ours(size, steps=10):
    torch.manual_seed(0)
    model = layer(nn.Conv2d(3, 16, 3, bias=False), window=4, momentum=0.1)
    conv, norm = model
    authors, paper = PaperCBN(4, "drop", eps_outside=True), PaperCBN(4)
    running = [torch.zeros(16).double(), torch.ones(16).double()]
    then = None
    for t in range(steps):
        x = images(conv, t)
        y = conv(x)
        if t:
            carry(running, then, conv)
        then = derivatives(y, conv)
        mean, var, count = authors.statistics(y, conv)
        for buffer, now in zip(running, (y.mean((0, 2, 3)), y.var((0, 2, 3))), strict=True):
            buffer.mul_(0.9).add_(0.1 * now.detach())
        out = model(x)
        yield t, y, out, norm, mean, var, count, authors, running, paper.statistics(y, conv)
        authors.push(x, conv)
        paper.push(x, conv)
        tick()
        perturb(conv, size, seed=t)


def test_parity_with_the_authors_where_nothing_is_dropped():
    """Drop rule, eps outside the root, unbiased running variance, equal weights of entries, window
    counted from 1 (oracle 9). Statistics are equal, and outputs up to where eps stands."""
    for t, y, out, norm, mean, var, count, authors, running, _ in drop_and_ours(0.02):
        assert (count == min(t + 1, 4)).all()
        expected = batch_norm(y, mean, var)
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
        outside = authors(y, norm.conv, norm.weight, norm.bias)
        torch.testing.assert_close(out, outside, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(norm.running_mean, running[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(norm.running_var, running[1], rtol=1e-9, atol=1e-10)
    assert authors.affected == 0


def test_where_the_authors_drop_an_entry_the_paper_keeps_its_mean():
    """The relation: on channels without such an entry both agree; on the others ours is the mixture
    of all entries, in which this one counts with variance 0."""
    dropped = clamped = 0
    for t, y, out, norm, mean, var, count, _, _, paper in drop_and_ours(0.25):
        whole = count == min(t + 1, 4)
        theirs, ours = batch_norm(y, mean, var), batch_norm(y, *paper[:2])
        torch.testing.assert_close(out[:, whole], theirs[:, whole], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(out, ours, rtol=1e-7, atol=1e-7)
        assert ((out - theirs)[:, ~whole].abs().amax((0, 2, 3)) > 1e-3).all()
        dropped += int((min(t + 1, 4) - count).sum())
        if t:
            clamped += float(norm.diagnostics["clamped"]) * 16 * min(t, 3)
    assert dropped > 5 and round(clamped) == dropped


# ---- the derivative averaged over iterations -------------------------------------------------

NEWEST = 1 - 0.9**8  # weight of an estimate: of eight iterations that count 0.1 each


@pytest.mark.parametrize("kind, burn_in", [*((kind, 0) for kind in CONVS), ("bias", 3)])
def test_the_averaged_derivative_equals_the_rule_written_out(kind, burn_in):
    """Of all positions, against autograd's derivatives and the sum over all steps of the weight;
    with three estimates."""
    torch.manual_seed(3)
    model = layer(CONVS[kind](), window=4, burn_in=burn_in, positions=10**6)
    conv, norm = model
    for t in range(burn_in):
        model(images(conv, 100 + t))
        tick()
    paper = PaperCBN(4, averaged=NEWEST, step=burn_in)
    for t in range(19):
        x = images(conv, t).requires_grad_()
        got, expected = model(x), paper(conv(x), conv, norm.weight, norm.bias)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
        leaves = [x, *model.parameters()]
        for g, e in zip(weights_of(got, leaves), weights_of(expected, leaves), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-8)
        paper.push(x, conv)
        tick()
        perturb(model, 0.03, seed=t)


def test_as_many_positions_as_there_are_equal_all():
    """Eight times those of an iteration are taken in one of eight."""
    outs = []
    for positions in (2 * 7 * 8 // 8, 10**6, 2 * 7 * 8 // 8 - 1):
        torch.manual_seed(0)
        model = layer(CONVS["3x3"](), window=3, positions=positions)
        for t in range(4):
            out = model(images(model[0], t))
            tick()
            perturb(model[0], 0.05, t)
        outs.append(out)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_crops_move_on_with_the_iterations_and_draw_no_random_numbers():
    torch.manual_seed(0)
    model = layer(nn.Conv2d(8, 16, 3, padding=1, bias=False), window=4, positions=4)
    x, before = images(model[0], 0, size=(24, 24)), torch.get_rng_state()
    estimates = []
    for t in range(18):
        model(x)
        estimate = model[1].memory.pending.get("gradient")
        assert (estimate is not None) == (t in (0, 8, 16))
        if estimate is not None:
            estimates.append(estimate)
        tick()
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = estimates  # of the same input at the same weight
    assert not (torch.equal(a, b) or torch.equal(b, c) or torch.equal(a, c))
    expected = NEWEST * c + (1 - NEWEST) * (NEWEST * b + (1 - NEWEST) * a)
    torch.testing.assert_close(model[1].memory.kept["gradient"], expected)
    patches = model[1].memory.stacked["patch"]
    assert torch.equal(patches[0], patches[1])


def test_the_default_is_close_to_all_positions_of_each_mini_batch():
    """Weights that move by 5 % an iteration leave the variance off by less than 1 %, where two
    images of a detection set leave 20 to 40 %."""
    found = []
    for positions in (None, build_norm("CBN", 16).positions):
        torch.manual_seed(0)
        model = layer(nn.Conv2d(8, 16, 3, padding=1, bias=False), window=4, positions=positions)
        for t in range(4):
            model(images(model[0], t, size=(64, 64)))
            tick()
            perturb(model[0], 0.003, t)
        found.append(model[1].memory.older)
    assert 8 * model[1].positions < 2 * 64 * 64
    (mean, var), (averaged_mean, averaged_var) = found
    assert torch.equal(mean, averaged_mean)
    assert 0 < float((averaged_var - var).norm() / var.norm()) < 0.01


def test_the_average_has_less_noise_than_one_estimate_and_follows_the_weight():
    """Its distance from the derivative over many images at the present weight, while that moves."""
    torch.manual_seed(0)
    model = layer(nn.Conv2d(8, 16, 3, padding=1, bias=False), window=2, positions=4)
    conv, norm = model
    single, average = [], []
    for t in range(170):
        model(images(conv, t, size=(24, 24)))
        estimate = norm.memory.pending.get("gradient")
        if estimate is not None and t:
            weight = conv.weight.detach().clone().requires_grad_()
            many = conv._conv_forward(images(conv, 999, n=40, size=(24, 24)), weight, None)
            (truth,) = torch.autograd.grad(many.var((0, 2, 3), unbiased=False).sum(), weight)
            tick()
            norm.advance()
            truth, kept = truth.flatten(1), norm.memory.kept["gradient"]
            single.append(float((estimate - truth).norm() / truth.norm()))
            average.append(float((kept - truth).norm() / truth.norm()))
        else:
            tick()
        perturb(conv, 0.002, t)
    assert len(single) == 21 and np.mean(average) < 0.8 * np.mean(single)


def memory_of(norm):
    memory = norm.memory
    tensors = [*memory.kept.values(), *memory.stacked.values(), memory.rows, *memory.older]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("window", [4, 16])
def test_memory_beside_that_of_the_authors_layer(window):
    """Theirs keeps two derivatives and the weight of each iteration, in float32."""
    found = {}
    for positions in (None, 64):
        conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        model = layer(conv, torch.float32, window=window, positions=positions)
        for t in range(window + 1):
            model(images(conv, t, size=(12, 12), dtype=torch.float32))
            tick()
        assert len(model[1].memory) == window - 1
        found[positions] = memory_of(model[1])
    theirs = (window - 1) * (3 * 4 * conv.weight.numel() + 2 * 4 * 64)
    assert found[None] <= theirs / 3 * 1.03
    assert found[64] <= theirs / 3 / (window - 1) * 1.4  # one derivative; mean patches beside it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_an_unchanged_weight_derivatives_change_nothing(dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    model = layer(conv, dtype, window=4, positions=16)
    for t in range(14):
        model(images(conv, t, size=(12, 12), dtype=dtype))
        tick()
    model[1].advance()
    diagnostics = model[1].diagnostics
    bound = 2e-7 if dtype == torch.float32 else 1e-15
    assert max(diagnostics[f"compensation_{of}"] for of in ("mean", "var")) < bound


def test_under_autocast_an_unchanged_weight_changes_next_to_nothing():
    """There the output, which anchors are taken from, is rounded to 8 bits; the derivatives are
    not."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    model = layer(conv, torch.float32, window=4, positions=64)
    for t in range(14):
        with torch.autocast("cpu", torch.bfloat16):
            model(images(conv, t, size=(12, 12), dtype=torch.float32))
        tick()
    model[1].advance()
    assert float(model[1].diagnostics["compensation_var"]) < 2e-7


@pytest.mark.parametrize("positions", [None, 16])
def test_noise_of_a_derivative_multiplies_the_small_change_of_the_weight_only(positions):
    """The anchored form: at an unchanged weight nothing changes, and the error shrinks with the
    change; the means are exact throughout."""
    errors = []
    for scale in (0.0, 0.02, 0.01):
        pair = []
        for taken in (None, positions):
            torch.manual_seed(0)
            conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
            model = layer(conv, window=2, positions=taken)
            norm = model[1]
            model(images(conv, 0, size=(24, 24)))
            tick()
            torch.manual_seed(1)
            with torch.no_grad():
                conv.weight += scale * torch.randn_like(conv.weight)
            model(images(conv, 1, size=(24, 24)))
            pair.append(norm.memory.older)
        torch.testing.assert_close(pair[0][0], pair[1][0], rtol=1e-12, atol=1e-12)
        errors.append(float((pair[0][1] - pair[1][1]).norm() / pair[0][1].norm()))
    if positions is None:
        assert errors == [0.0, 0.0, 0.0]
    else:
        assert errors[0] < 1e-14
        assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("kind", ["3x3", "bias", "groups, bias", "depthwise", "circular"])
def test_forwards_of_one_iteration_are_pooled_with_their_derivative(kind):
    """Three forwards of unlike mean: the derivative staged is that of the variance of all their
    values, by autograd, and its product with the weight goes with it."""
    torch.manual_seed(0)
    conv = CONVS[kind]()
    model = layer(conv, window=3, positions=10**6)
    xs = [images(conv, t) + t for t in range(3)]
    for x in xs:
        model(x)
    norm = model[1]
    weight = conv.weight.detach().clone().requires_grad_()
    y = conv._conv_forward(torch.cat(xs), weight, None)
    (truth,) = torch.autograd.grad(y.var((0, 2, 3), unbiased=False).sum(), weight)
    entry = norm.memory.pending
    torch.testing.assert_close(entry["gradient"], truth.flatten(1), rtol=1e-9, atol=1e-10)
    anchor = (truth * weight).sum((1, 2, 3)).detach()
    torch.testing.assert_close(entry["gradient_anchor"], anchor)
    torch.testing.assert_close(entry["var"], y.detach().var((0, 2, 3), unbiased=False))


def test_further_forwards_of_an_iteration_take_fewer_positions(monkeypatch):
    """So that accumulating gradients over many mini-batches costs little more than one."""
    taken, sampled = [], compensation.sampled_variance_gradient

    def spy(x, y, mean, patch, geometry, shape, crops):
        boxes = [y[c.images, :1, c.i0 : c.i1, c.j0 : c.j1] for c in crops]
        taken.append(sum(box.numel() for box in boxes))
        return sampled(x, y, mean, patch, geometry, shape, crops)

    monkeypatch.setattr(compensation, "sampled_variance_gradient", spy)
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    model = layer(conv, window=3, positions=8)
    for t in range(16):
        model(images(conv, t, size=(24, 24)))
    assert 50 < taken[0] < 90 and len(taken) == 16 and sum(taken) < 5 * taken[0]


@pytest.mark.parametrize("broken_at", [0, 3, 6])  # the first entry; later ones, without an estimate
@pytest.mark.parametrize("where", ["input", "output"])  # and with one
@pytest.mark.parametrize("positions", [None, 10**6])
def test_an_entry_that_is_not_finite(broken_at, where, positions):
    """In its channels, what was remembered until then takes its place, or the running statistics.
    Its mean follows the weight if its input is finite, its variance does not, and the iteration has
    no part in the averaged derivative."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3)
    model = layer(conv, window=4, burn_in=2, positions=positions)
    norm = model[1]
    for t in range(2):
        model(images(conv, 100 + t))
        tick()
    paper = PaperCBN(4, averaged=None if positions is None else NEWEST, step=2)
    broken = torch.ones(5, dtype=torch.bool)
    if where == "output":
        broken[[0, 1, 3, 4]] = False
    for t in range(12):
        x = images(conv, t)
        seen = x.clone()
        if t == broken_at and where == "input":
            seen[0, 1, 2, 2] = float("inf")
        running = norm.running_mean.clone(), norm.running_var.clone()
        y = conv(seen)
        if t == broken_at and where == "output":
            y.detach()[1, broken, 3, 3] = float("inf")
        got, expected = norm(y), paper(conv(x), conv, norm.weight, norm.bias)
        if t != broken_at:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
            paper.push(x, conv)
        else:
            torch.testing.assert_close(got[:, ~broken], expected[:, ~broken])
            mean, var = of_entries(paper, conv) or running
            average = paper.average
            paper.push(x, conv)
            entry, mean = paper.entries[0], mean - conv.bias.detach()
            entry["mu"][broken], entry["nu"][broken] = mean[broken], (var + mean**2)[broken]
            if where == "input":
                entry["dmu"][broken] = 0.0
            moves = 2.0 * mean.view(-1, 1, 1, 1) * entry["dmu"]
            entry["dnu"][broken] = moves[broken]
            if positions is not None:
                paper.average[broken] = 0.0 if t == 0 else average[broken]
        tick()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(t)
            shape, dtype = conv.weight.shape, conv.weight.dtype
            conv.weight += 0.03 * torch.randn(shape, generator=generator, dtype=dtype)


def of_entries(paper, conv):
    """Mean and variance of what is remembered, the mini-batch left out; None: nothing is."""
    count = len(paper.entries)
    if not count:
        return None
    mean, var, _ = paper.statistics(torch.zeros(1, 5, 1, 1).double(), conv)
    all_mean = mean * (count + 1) / count
    second = (var + mean**2) * (count + 1) / count
    return all_mean.detach(), (second - all_mean**2).detach()


KINDS = {
    "averaged": {"positions": 64},
    "own": {"positions": None},
    "none": {"compensation": "none"},
}


def with_memory(conv, staged, **options):
    model = layer(conv, window=3, **options)
    for t in range(3):
        model(images(conv, t))
        tick()
    if staged:
        model(images(conv, 3))
    return model


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("loading", KINDS)
def test_memory_of_another_kind_is_refused(saved, loading, staged):
    state = with_memory(CONVS["3x3"](), staged, **KINDS[saved])[1].memory_state_dict()
    model = layer(CONVS["3x3"](), window=3, **KINDS[loading])
    if loading == saved:
        model[1].load_memory_state_dict(state)
        for t in range(4, 8):
            assert model(images(model[0], t)).isfinite().all()
            tick()
    else:
        with pytest.raises(ValueError, match="another kind than that of compensation="):
            model[1].load_memory_state_dict(state)
        assert (
            len(model[1].memory) == 0 and not model[1].memory.kept and not model[1].memory.pending
        )


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("loading", KINDS)
def test_memory_that_has_the_bias_in_it_is_refused(loading, staged):
    """Naive entries, by a layer that would add it to them once more. One whose convolution is
    frozen has such entries, without it."""
    state = with_memory(CONVS["bias"](), staged, **KINDS["none"])[1].memory_state_dict()
    model = layer(CONVS["bias"](), window=3, **KINDS[loading])
    if loading == "none":
        model[1].load_memory_state_dict(state)
        return
    with pytest.raises(ValueError, match="another kind than that of compensation='taylor'"):
        model[1].load_memory_state_dict(state)
    assert len(model[1].memory) == 0 and not model[1].memory.pending
    frozen = CONVS["bias"]()
    frozen.weight.requires_grad_(False)
    saved = with_memory(frozen, staged, **KINDS[loading])
    resumed = layer(copy.deepcopy(frozen), window=3, **KINDS[loading])
    resumed[1].load_memory_state_dict(saved[1].memory_state_dict())
    assert torch.equal(resumed(images(frozen, 5)), saved(images(frozen, 5)))


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_behind_a_frozen_convolution_memory_tells_whether_the_bias_is_in_it(kind, staged):
    """Its entries are a mean and a variance, as those of compensation='none'."""
    frozen = CONVS["bias"]()
    frozen.weight.requires_grad_(False)
    nn.init.constant_(frozen.bias, 10.0)
    naive = with_memory(copy.deepcopy(frozen), staged, **KINDS["none"])
    following = with_memory(copy.deepcopy(frozen), staged, **KINDS[kind])
    for saved, options, message in (
        (naive, KINDS[kind], "another kind than that of compensation='taylor'"),
        (following, KINDS["none"], "another kind than that of compensation='none'"),
    ):
        model = layer(copy.deepcopy(frozen), window=3, **options)
        state = saved[1].memory_state_dict()
        parts = [{}, {"pending": {}}] if staged else [{}]
        for part in parts:
            with pytest.raises(ValueError, match=message):
                model[1].load_memory_state_dict({**state, **part})
        assert len(model[1].memory) == 0 and not model[1].memory.pending
    # a layer that is bound later cannot tell, and is not refused what is its own
    unbound = CBN2d(5, window=3, burn_in=0, ema="batch", **KINDS[kind])
    unbound.load_memory_state_dict(following[1].memory_state_dict())
    # without entries there is no bias to be wrong about
    empty = layer(copy.deepcopy(frozen), window=3, **KINDS["none"])[1].memory_state_dict()
    layer(copy.deepcopy(frozen), window=3, **KINDS[kind])[1].load_memory_state_dict(empty)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_memory_of_another_convolution_is_refused(kind):
    state = with_memory(nn.Conv2d(3, 5, 3, padding=1), False, **KINDS[kind])[1].memory_state_dict()
    model = with_memory(nn.Conv2d(3, 5, 5, padding=2), False, **KINDS[kind])
    with pytest.raises(ValueError, match="a convolution of another shape"):
        model[1].load_memory_state_dict(state)


@pytest.mark.parametrize("bias", [False, True])
def test_running_statistics_average_mini_batches_at_the_present_weight(bias):
    """After burn-in; as raw moments in numpy, carried over by derivatives of autograd."""
    torch.manual_seed(0)
    model = layer(nn.Conv2d(3, 5, 3, bias=bias), window=3, burn_in=4, ema="pooled", positions=None)
    conv, norm = model
    numbers, then = MixtureEMA(5), None
    for t in range(10):
        x = images(conv, t) + t / 3  # batches differ in mean
        y = conv(x)
        if t > 4:
            running = [torch.from_numpy(v) for v in (numbers.first, numbers.var)]
            carry(running, then, conv)
            numbers.first, var = (v.numpy() for v in running)
            numbers.second = var + numbers.first**2
        then = derivatives(y, conv)
        batch = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        numbers.update(*(v.detach().numpy() for v in batch), y.numel() / 5)
        model(x)
        np.testing.assert_allclose(norm.running_mean, numbers.first, rtol=1e-9)
        np.testing.assert_allclose(norm.running_var, numbers.var, rtol=1e-8)
        tick()
        perturb(conv, 0.02, t)
    assert norm.num_batches_tracked == 10


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [64, None])
def test_running_statistics_do_not_lag_behind_a_weight_that_drifts(positions, bias):
    """The truth: the same average of the same mini-batches, all at the last weight. BatchNorm's is
    of the weights of the time (fine-tuned at a constant rate, such a layer predicted badly)."""
    torch.manual_seed(0)
    model = layer(nn.Conv2d(3, 8, 3, bias=bias), window=4, ema="pooled", positions=positions)
    conv, norm = model
    plain = nn.BatchNorm2d(8).double()
    drift = 0.02 * torch.randn_like(conv.weight)
    for t in range(40):
        x = images(conv, t, size=(24, 24)) + 1.0
        plain(conv(x))
        model(x)
        if t < 39:  # what is compared is of the last forward's weight
            tick()
            with torch.no_grad():
                conv.weight += drift
                if bias:
                    conv.bias += 0.05
    truth = MixtureEMA(8)
    for t in range(40):
        y = conv(images(conv, t, size=(24, 24)) + 1.0).detach().numpy()
        truth.update(y.mean((0, 2, 3)), y.var((0, 2, 3)), y.size / 8)
    scale = truth.var**0.5

    def errors(running_mean, running_var):
        mean = np.abs(np.asarray(running_mean) - truth.first) / scale
        return mean.mean(), np.abs(np.log(np.asarray(running_var) / truth.var)).mean()

    ours, batchnorms = (errors(n.running_mean, n.running_var) for n in (norm, plain))
    assert ours[0] < 0.1 * batchnorms[0] and ours[1] < 0.4 * batchnorms[1]


def test_one_image_pooled_statistics_have_the_variance_between_images():
    """What 'batch' lacks: images of constant value have no variance each, and much together."""
    got = {}
    for ema in ("pooled", "batch"):
        norm = CBN2d(2, window=1, burn_in=0, ema=ema, momentum=0.02)
        generator = torch.Generator().manual_seed(0)
        for _ in range(1000):
            norm(torch.randn(1, 2, 1, 1, generator=generator) + 0.1 * torch.randn(1, 2, 4, 4))
        got[ema] = float(norm.running_var.mean())
    assert got["batch"] == pytest.approx(0.01, rel=0.1)
    assert got["pooled"] == pytest.approx(1.01, rel=0.35)


def test_a_frozen_convolution_is_averaged_as_it_is():
    """Its weight does not move, so plain averaging is exact; a bias that moves is followed."""
    torch.manual_seed(0)
    model = layer(nn.Conv2d(3, 5, 3), window=3)
    conv = model[0]
    conv.weight.requires_grad_(False)
    xs = [images(conv, t) for t in range(3)]
    for x in xs:
        out = model(x)
        assert "gradient" not in model[1].memory.pending
        tick()
        with torch.no_grad():
            conv.bias += 3.0
    with torch.no_grad():
        conv.bias -= 3.0
    joined = nn.BatchNorm2d(5).double()(conv(torch.cat(xs)))
    torch.testing.assert_close(out, joined[-2:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", [None, 64])
def test_requires_grad_toggled_in_mid_run(positions):
    torch.manual_seed(0)
    model = layer(nn.Conv2d(3, 5, 3), window=4, positions=positions)
    conv, norm = model
    sizes = []
    for t in range(12):
        conv.weight.requires_grad_(not 4 <= t < 8)
        out = model(images(conv, t))
        assert out.isfinite().all()
        sizes.append(len(norm.memory))
        tick()
        if conv.weight.requires_grad:
            perturb(conv, 0.05, t)
    # entries of another kind start the window anew (t = 5, t = 9)
    assert sizes == [0, 1, 2, 3, 3, 1, 2, 3, 3, 1, 2, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, "window"),
        ({"window": 2.5}, "window"),
        ({"window": True}, "window"),
        ({"burn_in": -1}, "burn_in"),
        ({"burn_in": 1.0}, "burn_in"),
        ({"burn_in": True}, "burn_in"),
        ({"compensation": "exact"}, "taylor.*none"),
        ({"positions": 0}, "positions"),
        ({"ema": "mean"}, "pooled.*batch"),
        ({"momentum": 2.0}, "momentum"),
        ({"eps": -1.0}, "eps"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CBN2d(4, **options)


def test_options_build_the_same_layer_again():
    norm = build_norm(
        "CBN(window=6, burn_in=7, compensation='none', positions=99, ema='batch', momentum=0.2,"
        " eps=1e-3, affine=False)",
        4,
    )
    assert CBN2d(4, **norm.options()).options() == norm.options()
    assert norm.options() == {
        "window": 6,
        "burn_in": 7,
        "compensation": "none",
        "positions": 99,
        "freeze": 1.0,
        "ema": "batch",
        "momentum": 0.2,
        "eps": 1e-3,
        "affine": False,
    }
    assert "window=6" in repr(norm)
