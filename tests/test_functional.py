"""Moments, mixtures and normalisation: against torch, autograd and finite differences."""

import pytest
import torch
from torch import nn

from cbn_det.norms.functional import (
    Estimate,
    even_mixture,
    mixed_in,
    mixture,
    moments,
    moments_of_groups,
)
from cbn_det.norms.normalization import normalize


@pytest.mark.parametrize("ratio", [0, 1, 100, 1000])
@pytest.mark.parametrize("channels_last", [False, True])
def test_moments_keep_their_digits_when_the_mean_dwarfs_the_deviation(ratio, channels_last):
    torch.manual_seed(0)
    x = (torch.randn(4, 8, 40, 40, dtype=torch.float64) + ratio).float()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    got = moments(x)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
    assert got.count == 4 * 40 * 40 and got.mean.dtype == got.var.dtype == torch.float32
    # torch's channels_last kernel sums in float32: BatchNorm's mean has the same rounding
    torch.testing.assert_close(got.mean.double(), mean, rtol=3e-6, atol=4e-6)
    torch.testing.assert_close(got.var.double(), var, rtol=3e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_16_bit_values_of_ten_thousand(dtype):
    """Squares overflow float16; sums of 1e4 over thousands of positions do too."""
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 64, 64) * 30 + 1e4).to(dtype)
    got = moments(x)
    torch.testing.assert_close(got.mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    expected = x.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(got.var.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [5, 80])  # 80: by the vectorised sums, where contiguous
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_move_running_statistics_as_batchnorm_does(size, layout):
    x = torch.randn(2, 6, size, size) * torch.arange(1.0, 7).view(6, 1, 1) + 0.3
    x[:, 4:] += 100.0
    x = x.to(memory_format=layout)
    norm = nn.BatchNorm2d(6, momentum=0.3)
    norm(x)
    running = torch.zeros(6), torch.ones(6)
    got = moments(x, running, 0.3)
    torch.testing.assert_close(running, (norm.running_mean, norm.running_var))
    torch.testing.assert_close(got.mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(got.var, x.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


# ---- mixtures --------------------------------------------------------------------------------


def parts(sizes):
    """Mini-batches of unlike mean and spread, and what each counts in all their values."""
    torch.manual_seed(0)
    values = [(k + 1.0) * torch.randn(n, 3, dtype=torch.float64) + k for k, n in enumerate(sizes)]
    return values, torch.tensor([n / sum(sizes) for n in sizes], dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (5, 40, 8)])
def test_a_mixture_has_the_moments_of_all_values_together(sizes):
    values, weights = parts(sizes)
    mean = torch.stack([v.mean(0) for v in values])
    var = torch.stack([v.var(0, correction=0) for v in values])
    together = torch.cat(values)
    expected = together.mean(0), together.var(0, correction=0)
    torch.testing.assert_close(mixture(mean, var, weights.unsqueeze(1)), expected)
    if len(set(sizes)) == 1:
        even = even_mixture(torch.stack((mean, var), 1))
        torch.testing.assert_close(even, torch.stack(expected))
    # and of the first beside the others
    rest = mixture(mean[1:], var[1:], weights[1:, None] / weights[1:].sum())
    got = mixed_in(mean[0], var[0], *rest, float(weights[0]))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_of_two_parts_alone_is_itself(share):
    mean, var, other_mean, other_var = torch.rand(4, 5)
    expected = (mean, var) if share else (other_mean, other_var)
    torch.testing.assert_close(mixed_in(mean, var, other_mean, other_var, share), expected)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_of_groups_are_those_of_all_their_values(groups, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64) + torch.arange(6.0).view(6, 1, 1)
    grouped = x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1)
    x = x.to(memory_format=layout)
    got = moments_of_groups(x, groups, 1e-5)
    assert got.count == grouped.shape[1]
    each = 6 // groups
    torch.testing.assert_close(got.mean, grouped.mean(1).repeat_interleave(each))
    torch.testing.assert_close(got.var, grouped.var(1, correction=0).repeat_interleave(each))


# ---- normalisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0, "per channel"])
@pytest.mark.parametrize("affine", [True, False])
def test_normalize_gradcheck(share, affine):
    """Against finite differences of the estimate ``share * moments of x + constants``."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.2, 0.5, 1.0]).double() if share == "per channel" else share
    a = torch.randn(3, dtype=torch.float64, requires_grad=True)
    b = (torch.rand(3, dtype=torch.float64) + 9.0).requires_grad_()
    w = torch.randn(3, dtype=torch.float64, requires_grad=True) if affine else None
    c = torch.randn(3, dtype=torch.float64, requires_grad=True) if affine else None

    def ours(x, a, b, w, c):
        m = moments(x)
        mean = s * m.mean + a
        var = s * (m.var + m.mean**2) + b - mean**2
        return normalize(x, Estimate(mean, var, s), w, c, 1e-5)

    def plain(x, a, b, w, c):
        mean = s * x.mean((0, 2, 3)) + a
        var = s * (x * x).mean((0, 2, 3)) + b - mean**2
        out = (x - mean.view(1, -1, 1, 1)) / (var + 1e-5).sqrt().view(1, -1, 1, 1)
        return out if w is None else out * w.view(1, -1, 1, 1) + c.view(1, -1, 1, 1)

    leaves = [t for t in (x, a, b, w, c) if t is not None]
    torch.testing.assert_close(ours(x, a, b, w, c), plain(x, a, b, w, c))
    out = torch.randn_like(x)
    got = torch.autograd.grad(ours(x, a, b, w, c), leaves, out)
    expected = torch.autograd.grad(plain(x, a, b, w, c), leaves, out)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)
    # finite differences see the moments move with x, which ours() detaches
    assert torch.autograd.gradcheck(lambda x, a, b: ours(x, a, b, w, c), (x, a, b))


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalize_groups_as_autograd_does(share, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    x = x.to(memory_format=layout).requires_grad_()
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    c = torch.randn(6, dtype=torch.float64, requires_grad=True)
    rows = x.unflatten(1, (2, 3))
    mean = share * rows.mean((0, 2, 3, 4)) + 0.3
    second = share * rows.square().mean((0, 2, 3, 4)) + 2.0
    mean, var = (v.repeat_interleave(3) for v in (mean, second - mean.square()))
    out = (x - mean.view(-1, 1, 1)) / (var + 1e-5).sqrt().view(-1, 1, 1)
    expected = out * w.view(-1, 1, 1) + c.view(-1, 1, 1)
    got = normalize(x, Estimate(mean.detach(), var.detach(), share, 2), w, c, 1e-5)
    torch.testing.assert_close(got, expected)
    g = torch.randn_like(expected)
    ours = torch.autograd.grad(got, (x, w, c), g)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (x, w, c), g))


@pytest.mark.parametrize("ratio", [0, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalize_gradient_accuracy(dtype, ratio):
    """As accurate as the dtype of the activations allows, also off-centre and in low precision."""
    torch.manual_seed(0)
    x = (torch.randn(2, 6, 16, 16) + ratio).to(dtype)
    g = (1e-3 * (torch.randn(2, 6, 16, 16) + (x.float() - ratio) + 1)).to(dtype)

    def gradient(x, g):
        x = x.clone().requires_grad_()
        m = moments(x)
        w = torch.full_like(m.mean, 2.0)
        normalize(x, Estimate(m.mean, m.var, 0.25), w, None, 1e-5).backward(g)
        return x.grad

    got, expected = gradient(x, g), gradient(x.double(), g.double())
    assert got.dtype == dtype
    error = float((got.double() - expected).norm() / expected.norm())
    assert error < {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 2e-5}[dtype]


@pytest.mark.parametrize("size", [12, 120])  # in parts, and by a batch norm of its terms
@pytest.mark.parametrize("share", [0.0, 0.3, "per channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_normalize_has_the_same_gradient_on_small_and_large_maps(dtype, share, size):
    torch.manual_seed(0)
    x, g = (torch.randn(2, 3, size, size, dtype=torch.float64) for _ in range(2))
    x, g = x.to(dtype), g.to(dtype)
    of_statistics = torch.float64 if dtype == torch.float64 else torch.float32
    mean, w = (torch.randn(3).to(of_statistics) for _ in range(2))
    var = torch.rand(3).to(of_statistics) + 0.5
    share = torch.tensor([0.0, 0.4, 1.0]).to(of_statistics) if share == "per channel" else share
    leaf = x.clone().requires_grad_()
    normalize(leaf, Estimate(mean, var, share), w, None, 1e-5).backward(g)
    m, v, gain, part = (
        torch.as_tensor(t, dtype=torch.float64).view(-1, 1, 1) for t in (mean, var, w, share)
    )
    hat = (x.double() - m) / (v + 1e-5).sqrt()
    projected = [(t * g.double()).mean((0, 2, 3), keepdim=True) for t in (1.0, hat)]
    expected = (g.double() - part * (projected[0] + hat * projected[1])) * gain
    expected = expected / (v + 1e-5).sqrt()
    error = (leaf.grad.double() - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalize_keeps_dtype_and_memory_format(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4).to(dtype)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for grad_format in (torch.contiguous_format, torch.channels_last):
            leaf = x.to(memory_format=memory_format).detach().requires_grad_()
            m = moments(leaf)
            out = normalize(leaf, Estimate(m.mean, m.var, 0.5), None, None, 1e-5)
            assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
            torch.manual_seed(1)
            out.backward(torch.randn(out.shape).to(dtype).to(memory_format=grad_format))
            assert leaf.grad.dtype == dtype
            assert leaf.grad.is_contiguous(memory_format=memory_format)
            results.append((out.detach().float(), leaf.grad.float()))
    for out, grad in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-2, atol=1e-2)


def test_normalize_takes_expanded_and_sliced_gradients():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    m = moments(x)
    (got,) = torch.autograd.grad(
        normalize(x, Estimate(m.mean, m.var, 0.25), None, None, 1e-5).sum(), x
    )
    # sum of the gradient: (1 - share) / std for every position
    expected = (0.75 / (m.var + 1e-5).sqrt()).view(1, -1, 1, 1).expand_as(x)
    torch.testing.assert_close(got, expected)
    out = normalize(x, Estimate(m.mean, m.var, 0.25), None, None, 1e-5)
    (part,) = torch.autograd.grad(out[:, :, ::2, 1:].square().sum(), x, retain_graph=True)
    mask = torch.zeros_like(x)
    mask[:, :, ::2, 1:] = 1
    (whole,) = torch.autograd.grad((out.square() * mask).sum(), x)
    torch.testing.assert_close(part, whole)
