"""BRN against its equations in plain autograd."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cbn_det.norms import BRN2d, build_norm, norm_diagnostics, norm_rows, resolve_burn_in


class PaperBRN:
    """The paper's equations with running variances averaged as BatchNorm does; steps by hand."""

    def __init__(self, channels, r_max, d_max, momentum=0.01, eps=1e-5):
        self.mean, self.var = torch.zeros(channels).double(), torch.ones(channels).double()
        self.r_max, self.d_max, self.momentum, self.eps = r_max, d_max, momentum, eps

    def __call__(self, x, weight, bias):
        column = (1, -1, 1, 1)
        mu, second = x.mean((0, 2, 3)), ((x - x.mean((0, 2, 3), keepdim=True)) ** 2)
        sigma = (second.mean((0, 2, 3)) + self.eps) ** 0.5
        running = (self.var + self.eps) ** 0.5
        r = torch.minimum(torch.maximum(sigma / running, 1 / self.r_max), self.r_max).detach()
        d = ((mu - self.mean) / running).clamp(-self.d_max, self.d_max).detach()
        x_hat = (x - mu.view(column)) / sigma.view(column) * r.view(column) + d.view(column)
        self.now = mu.detach(), x.detach().var((0, 2, 3))
        return x_hat * weight.view(column) + bias.view(column)

    def update(self):
        mean, var = self.now
        self.mean = (1 - self.momentum) * self.mean + self.momentum * mean
        self.var = (1 - self.momentum) * self.var + self.momentum * var


def inputs(seed, n=2, c=5, size=6):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(1, c, 1, 1, generator=generator, dtype=torch.float64) * 6
    return torch.randn(n, c, size, size, generator=generator, dtype=torch.float64) * spread + (
        spread.flip(1) * 2
    )


def tick():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0).step()


def gradients(out, leaves):
    probe = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((probe * out + out**2 * probe.flip(0) / 3).sum(), leaves)


def layer(**options):
    torch.manual_seed(0)
    norm = BRN2d(5, **{"burn_in": 0, "ramp": 0, "ema": "batch", **options}).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("r_max, d_max", [(3, 5), (1.5, 0.5), (1, 5), (3, 0), (1e9, 1e9)])
def test_output_gradients_and_buffers_equal_the_paper(r_max, d_max):
    norm = layer(r_max=r_max, d_max=d_max, momentum=0.3)
    paper = PaperBRN(5, torch.tensor(float(r_max)).double(), d_max, momentum=0.3)
    for t in range(5):
        x = inputs(t).requires_grad_()
        got, expected = norm(x), paper(x, norm.weight, norm.bias)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        leaves = [x, norm.weight, norm.bias]
        for g, e in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-8)
        paper.update()
        torch.testing.assert_close(norm.running_mean, paper.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(norm.running_var, paper.var, rtol=1e-9, atol=1e-12)
        tick()


def test_without_limits_it_normalises_by_the_running_statistics():
    norm = layer(r_max=1e9, d_max=1e9)
    for t in range(3):
        norm(inputs(t))
        tick()
    x = inputs(7)
    evaluated = copy.deepcopy(norm).eval()(x)
    torch.testing.assert_close(norm(x), evaluated, rtol=1e-9, atol=1e-9)


def test_limits_grow_by_optimiser_steps():
    norm = layer(r_max=3.0, d_max=5.0, burn_in=2, ramp=4)
    seen = []
    for t in range(8):
        for part in range(2):  # accumulated forwards are one iteration
            norm(inputs(10 * t + part))
        seen.append(norm.limits())
        tick()
    progress = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert seen == [(1 + 2 * p, 5 * p) for p in progress]


def test_burn_in_and_ramp_are_resolved_against_the_schedule():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), build_norm("BRN(burn_in=0.1, ramp=0.25)", 5))
    resolve_burn_in(model, 400)
    assert (model[1].burn_in_steps, model[1].ramp_steps) == (40, 100)
    assert "burn_in=40, ramp=100" in norm_rows(model)[0].kind
    fresh = build_norm("BRN", 5)
    with pytest.warns(UserWarning, match=r"burn_in=0.1 .* BRN .*300 optimiser steps.*max_iter"):
        fresh(torch.randn(2, 5, 4, 4))
    assert fresh.burn_in_steps == 300 and fresh.ramp_steps == 900


def test_the_reference_is_held_for_an_iteration():
    """Running statistics move with every forward; r and d of an accumulated batch must not."""
    norm = layer()
    for t in range(3):
        norm(inputs(t))
        tick()
    reference = norm.running_mean.clone(), norm.running_var.clone()
    first = norm(inputs(10))
    norm(inputs(11))
    assert not torch.equal(norm.running_mean, reference[0])
    assert torch.equal(norm(inputs(10)), first)
    paper = PaperBRN(5, torch.tensor(3.0).double(), 5.0)
    paper.mean, paper.var = reference
    torch.testing.assert_close(norm(inputs(12)), paper(inputs(12), norm.weight, norm.bias))
    tick()
    paper.mean, paper.var = norm.running_mean.clone(), norm.running_var.clone()
    torch.testing.assert_close(norm(inputs(13)), paper(inputs(13), norm.weight, norm.bias))


def test_the_reference_is_part_of_the_memory():
    """Saved between the forwards of an accumulated batch."""
    norm = layer(momentum=0.3)
    norm(inputs(0))
    tick()
    norm(inputs(1))
    other = layer(momentum=0.3)
    other.load_state_dict(norm.state_dict())
    other.load_memory_state_dict(norm.memory_state_dict())
    assert torch.equal(other(inputs(2)), norm(inputs(2)))
    tick()
    assert torch.equal(other(inputs(3)), norm(inputs(3)))
    with pytest.raises(ValueError, match="5 channels, not 4"):
        BRN2d(4).load_memory_state_dict(norm.memory_state_dict())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradient_at_the_start_of_an_iteration(mode):
    norm = layer(momentum=0.3, ema="batch")
    norm(inputs(0))
    tick()
    plain = nn.BatchNorm2d(norm.num_features, momentum=0.3).double()
    plain.load_state_dict(norm.state_dict())
    with mode():
        torch.testing.assert_close(norm(inputs(1)), plain(inputs(1)))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    x = inputs(2).requires_grad_()
    paper = PaperBRN(5, torch.tensor(3.0).double(), 5.0)  # they are the reference from now on
    paper.mean, paper.var = norm.running_mean.clone(), norm.running_var.clone()
    out = norm(x)
    torch.testing.assert_close(out, paper(x, norm.weight, norm.bias))
    out.sum().backward()  # what was held can be differentiated through
    tick()
    norm(x).sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("iteration", ["burn-in", "later"])
@pytest.mark.parametrize("then", ["next", "skipped", "eval", "first"])
def test_running_statistics_that_are_not_finite_are_put_back(bad, iteration, then):
    """By the next iteration's forward, of all layers; by evaluation after a step that a GradScaler
    skips, which ends no iteration; and where no iteration was before."""
    norms = nn.ModuleList([layer(), layer()])
    for norm in norms:
        norm.burn_in_steps = 9 if iteration == "burn-in" else 0
    before = [norm.running_mean.clone() for norm in norms]
    for t in range(0 if then == "first" else 2):
        before = [norm.running_mean.clone() for norm in norms]
        if t:
            tick()
        for norm in norms:
            norm(inputs(t))
    if then != "first":
        tick()
        before = [norm.running_mean.clone() for norm in norms]
    x = inputs(2)
    x[0, 2, 0, 0] = bad
    for norm in norms:
        norm(x)
        assert not norm.running_mean[2].isfinite()
    if then == "eval":
        norms.eval()
    else:
        for t in range(2):
            if then != "skipped" or t:
                tick()
            for norm in norms:
                norm(inputs(3))
    for norm, old in zip(norms, before, strict=True):
        assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()
        if then == "eval":
            moved = norm.running_mean != old
            assert moved.tolist() == [True, True, False, True, True]
            assert norm(inputs(3)).isfinite().all()


def test_no_variance():
    norm = layer()
    for t in range(4):
        x = inputs(t)
        x[:, 1] = 7.0
        x.requires_grad_()
        out = norm(x)
        out.pow(2).sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
        tick()


def test_diagnostics():
    norm = layer(r_max=1.01, d_max=0.01, momentum=0.1)
    assert norm_diagnostics(norm) == {}
    norm(inputs(0))
    values = norm_diagnostics(norm)
    assert values["norm/r_at_limit"] > 0.5 and 0.5 < values["norm/d_at_limit_worst"] <= 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("BRN(r_max=0.5)", "r_max=0.5"),
        ("BRN(d_max=-1)", "d_max=-1"),
        ("BRN(ramp=1.5)", "ramp=1.5.*MAX_ITER"),
        ("BRN(burn_in=-1)", "burn_in=-1"),
        ("BRN(ramp=True)", "ramp=True"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ValueError, match=message):
        build_norm(text, 4)


def test_options_build_the_same_layer_again():
    norm = build_norm("BRN(r_max=2, d_max=1.5, burn_in=3, ramp=0.4, momentum=0.2)", 4)
    assert BRN2d(4, **norm.options()).options() == norm.options()
    assert np.isclose(norm.options()["ramp"], 0.4)
