"""Moments, normalisation, convolution statistics: against numpy, autograd, finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import conv_moments, conv_patches
from torch import nn

from cbn_det.norms import functional
from cbn_det.norms.functional import (
    ConvGeometry,
    choose_crops,
    mean_patch,
    moments,
    normalize,
    patch_covariance,
    variance_gradient,
    variance_gradient_factors,
)

CONVS = {
    "3x3": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "no padding": lambda: nn.Conv2d(4, 6, 3),
    "stride 2": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "stride (3, 2)": lambda: nn.Conv2d(4, 6, 3, stride=(3, 2), padding=(2, 0)),
    "dilation 2": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "dilation, stride": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), dilation=(1, 2), stride=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depthwise multiplier": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, stride=2),
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "1x1 stride 2": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "5x5": lambda: nn.Conv2d(4, 6, 5, padding=2),
    "1x3 kernel": lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "same, even kernel": lambda: nn.Conv2d(4, 6, (2, 4), padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "circular same even": lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
    "reflect stride": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect", stride=2),
    "replicate groups": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate", groups=2),
    "no bias": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
}


@pytest.fixture(params=CONVS, ids=str)
def case(request):
    torch.manual_seed(1)
    conv = CONVS[request.param]().double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64) + 0.7  # post-ReLU like: not centred
    return conv, x


def closed_form(conv, x):
    y = conv(x).detach()
    geometry = ConvGeometry.of(conv)
    patch = mean_patch(x, geometry, tuple(y.shape[2:]))
    gradient = variance_gradient(x, y, y.mean((0, 2, 3)), geometry, conv.weight.shape)
    return y, patch, gradient


def estimated(conv, x, crops):
    """The derivative from its factors."""
    y, patch, _ = closed_form(conv, x)
    mean = y.mean((0, 2, 3))
    left, right, product = variance_gradient_factors(
        x, y, mean, patch, ConvGeometry.of(conv), crops
    )
    gradient = (left @ right).flatten(0, 1)
    expected = (gradient * conv.weight.detach().flatten(1)).sum(1)
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-11)
    return gradient


def per_channel(patch, conv):
    """[groups, d] -> [C_out, d]"""
    return patch.repeat_interleave(conv.out_channels // conv.groups, 0)


# ---- closed forms of the derivatives (oracles 1 and 2) ---------------------------------------


def test_derivatives_equal_autograd(case):
    conv, x = case
    y, patch, gradient = closed_form(conv, x)
    y = conv._conv_forward(x, conv.weight, None)
    (dmu,) = torch.autograd.grad(y.mean((0, 2, 3)).sum(), conv.weight, retain_graph=True)
    (dvar,) = torch.autograd.grad(
        y.var((0, 2, 3), unbiased=False).sum(), conv.weight, retain_graph=True
    )
    (dnu,) = torch.autograd.grad((y * y).mean((0, 2, 3)).sum(), conv.weight)
    torch.testing.assert_close(per_channel(patch, conv), dmu.flatten(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, dvar.flatten(1), rtol=1e-10, atol=1e-12)
    second = gradient + 2 * y.mean((0, 2, 3)).view(-1, 1) * per_channel(patch, conv)
    torch.testing.assert_close(second, dnu.flatten(1), rtol=1e-10, atol=1e-12)


def test_derivatives_equal_finite_differences_of_patches_cut_by_hand(case):
    conv, x = case
    _, patch, gradient = closed_form(conv, x)
    patches, weight = conv_patches(x.numpy(), conv), conv.weight.detach().numpy()
    rng = np.random.default_rng(0)
    for _ in range(3):
        step = rng.standard_normal(weight.shape)
        mean, var = (
            (plus - minus) / 2e-5
            for plus, minus in zip(
                conv_moments(patches, weight + 1e-5 * step),
                conv_moments(patches, weight - 1e-5 * step),
                strict=True,
            )
        )
        flat = step.reshape(len(step), -1)
        np.testing.assert_allclose(
            (per_channel(patch, conv).numpy() * flat).sum(1), mean, rtol=1e-7, atol=1e-8
        )
        np.testing.assert_allclose((gradient.numpy() * flat).sum(1), var, rtol=1e-7, atol=1e-8)


def test_euler_identities(case):
    conv, x = case
    _, patch, gradient = closed_form(conv, x)
    y = conv._conv_forward(x, conv.weight, None).detach()
    weight = conv.weight.detach().flatten(1)
    torch.testing.assert_close((per_channel(patch, conv) * weight).sum(1), y.mean((0, 2, 3)))
    torch.testing.assert_close((gradient * weight).sum(1), 2 * y.var((0, 2, 3), unbiased=False))


# ---- compensation of one entry (oracle 3) ----------------------------------------------------


def test_linear_terms_against_the_recomputed_statistics(case):
    """The mean is exact, the variance lacks Var(delta * x), the second moment E[(delta * x)**2]."""
    conv, x = case
    y, patch, gradient = closed_form(conv, x)
    y = conv._conv_forward(x, conv.weight, None).detach()
    patches, weight = conv_patches(x.numpy(), conv), conv.weight.detach().numpy()
    delta = 0.3 * np.random.default_rng(0).standard_normal(weight.shape)
    errors = []
    for scale in (1.0, 0.5):
        flat = torch.from_numpy((scale * delta).reshape(len(delta), -1))
        mean, var = conv_moments(patches, weight + scale * delta)
        change_mean, change_var = conv_moments(patches, scale * delta)
        mu = y.mean((0, 2, 3)) + (per_channel(patch, conv) * flat).sum(1)
        sigma2 = y.var((0, 2, 3), unbiased=False) + (gradient * flat).sum(1)
        np.testing.assert_allclose(mu, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(var - sigma2.numpy(), change_var, rtol=1e-9, atol=1e-12)
        # the paper's second moment, of which the layer keeps nu - mu**2
        nu = (y * y).mean((0, 2, 3)) + (
            (gradient + 2 * y.mean((0, 2, 3)).view(-1, 1) * per_channel(patch, conv)) * flat
        ).sum(1)
        error = var + mean**2 - nu.numpy()
        np.testing.assert_allclose(error, change_var + change_mean**2, rtol=1e-8, atol=1e-12)
        assert (error >= -1e-12).all()  # the linear estimate is never above the truth
        errors.append(error)
    np.testing.assert_allclose(errors[1], errors[0] / 4, rtol=1e-7)  # second order


def test_patch_covariance_gives_the_variance_of_any_weight(case):
    conv, x = case
    y = conv(x)
    geometry = ConvGeometry.of(conv)
    patch = mean_patch(x, geometry, tuple(y.shape[2:]))
    covariance = patch_covariance(x, y, patch, geometry, None)
    weight = torch.randn_like(conv.weight)
    grouped = weight.reshape(conv.groups, -1, patch.shape[1])
    var = torch.einsum("gdk,gok,god->go", covariance, grouped, grouped).flatten()
    _, expected = conv_moments(conv_patches(x.numpy(), conv), weight.numpy())
    np.testing.assert_allclose(var, expected, rtol=1e-9)


# ---- crops -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, positions",
    [
        ((1, 3, 40, 50), 400),  # an image
        ((2, 3, 33, 27), 600),
        ((50, 3, 7, 7), 300),  # RoIs
        ((3, 3, 30, 1), 40),
        ((7, 3, 14, 14), 500),
        ((1, 3, 20, 20), 20),
    ],
)
def test_every_position_is_taken_equally_often(shape, positions):
    n, _, height, width = shape
    seen, taken = np.zeros((n, height, width)), []
    turns = 20000
    for turn in range(turns):
        crops = choose_crops(shape, positions, turn)
        boxes = [seen[c.images, c.i0 : c.i1, c.j0 : c.j1] for c in crops]
        for box in boxes:
            box += 1 / (box.size * len(crops))
        taken.append(sum(box.size for box in boxes))
    seen *= seen.size / turns
    assert abs(seen - 1).max() < 0.05, "the estimate would be biased towards some positions"
    assert 0.4 * positions <= np.mean(taken) <= 2.3 * positions


def test_crop_estimates_average_to_the_gradient_over_all_positions(case):
    """With a trend over the map, which an uneven coverage of the borders would show."""
    conv, x = case
    x = torch.randn(3, 4, 22, 23, dtype=torch.float64)
    x = x + torch.linspace(0, 3, 22, dtype=x.dtype).view(-1, 1) ** 2
    y, patch, full = closed_form(conv, x)
    total, turns, cache = torch.zeros_like(full), 4000, {}
    for turn in range(turns):
        crops = choose_crops(tuple(y.shape), 20, turn)
        if crops not in cache:
            cache[crops] = [estimated(conv, x, crops), 0]
        cache[crops][1] += 1
    for value, times in cache.values():
        total += value * times / turns
    assert len(cache) >= 9
    scale = full.abs().mean()
    assert float((total - full).abs().max() / scale) < 0.15
    single = torch.stack([value for value, _ in cache.values()])
    noise = (single - full).square().mean().sqrt()
    assert float((total - full).square().mean().sqrt()) < 0.05 * float(noise)


@pytest.mark.parametrize("most", [1, 3])
def test_crops_are_the_weight_gradients_of_the_cropped_positions(case, most, monkeypatch):
    """The average of those of each crop."""
    monkeypatch.setattr(functional, "_MOST_CROPS", most)
    monkeypatch.setattr(functional, "_CROP_POSITIONS", 8)
    conv, x = case
    x = torch.randn(5, 4, 22, 23, dtype=torch.float64) + 1.0
    y, patch, _ = closed_form(conv, x)
    patches = torch.from_numpy(conv_patches(x.numpy(), conv))
    centred = y - y.mean((0, 2, 3)).view(1, -1, 1, 1)
    for turn in range(25):
        crops = choose_crops(tuple(y.shape), 30, turn)
        assert len(crops) <= most
        gradients, covariances = [], []
        for crop in crops:
            box = (crop.images, slice(crop.i0, crop.i1), slice(crop.j0, crop.j1))
            cut = patches[(slice(None), *box)] - patch.view(conv.groups, 1, 1, 1, -1)
            out = centred[box[0], :, box[1], box[2]].unflatten(1, (conv.groups, -1))
            size = cut[0, ..., 0].numel()
            gradients.append(2 * torch.einsum("gnijd,ngoij->god", cut, out).flatten(0, 1) / size)
            flat = cut.flatten(1, 3)
            covariances.append(flat.transpose(1, 2) @ flat / size)
        expected = torch.stack(gradients).mean(0)
        got = estimated(conv, x, crops)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        covariance = patch_covariance(x, y, patch, ConvGeometry.of(conv), crops)
        expected = torch.stack(covariances).mean(0)
        torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-10)


def test_a_large_map_gives_several_crops_and_many_maps_every_so_manieth():
    crops = choose_crops((2, 8, 100, 100), 512, 5)
    assert len(set(crops)) == 4 and {(c.n0, c.step) for c in crops} == {(0, 1)}
    assert {(c.i1 - c.i0) * (c.j1 - c.j0) for c in crops} <= set(range(49, 82))
    assert not set(crops) & set(choose_crops((2, 8, 100, 100), 512, 6))  # it goes on from there
    (crop,) = choose_crops((128, 8, 7, 7), 512, 5)
    assert crop.step == 12 and (crop.i0, crop.i1, crop.j0, crop.j1) == (0, 7, 0, 7)
    assert {choose_crops((128, 8, 7, 7), 512, turn)[0].n0 for turn in range(100)} == set(range(12))


def test_enough_positions_are_all_positions():
    assert choose_crops((2, 8, 10, 10), None, 3) is None
    assert choose_crops((2, 8, 10, 10), 200, 3) is None
    assert choose_crops((2, 8, 10, 10), 10**9, 3) is None
    assert choose_crops((2, 8, 10, 10), 199, 3) is not None


# ---- moments and normalisation ---------------------------------------------------------------


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
        return normalize(x, mean, var, w, c, s, 1e-5)

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
        normalize(x, m.mean, m.var, w, None, 0.25, 1e-5).backward(g)
        return x.grad

    got, expected = gradient(x, g), gradient(x.double(), g.double())
    assert got.dtype == dtype
    error = float((got.double() - expected).norm() / expected.norm())
    assert error < {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 2e-5}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalize_keeps_dtype_and_memory_format(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4).to(dtype)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for grad_format in (torch.contiguous_format, torch.channels_last):
            leaf = x.to(memory_format=memory_format).detach().requires_grad_()
            m = moments(leaf)
            out = normalize(leaf, m.mean, m.var, None, None, 0.5, 1e-5)
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
    (got,) = torch.autograd.grad(normalize(x, m.mean, m.var, None, None, 0.25, 1e-5).sum(), x)
    # sum of the gradient: (1 - share) / std for every position
    expected = (0.75 / (m.var + 1e-5).sqrt()).view(1, -1, 1, 1).expand_as(x)
    torch.testing.assert_close(got, expected)
    out = normalize(x, m.mean, m.var, None, None, 0.25, 1e-5)
    (part,) = torch.autograd.grad(out[:, :, ::2, 1:].square().sum(), x, retain_graph=True)
    mask = torch.zeros_like(x)
    mask[:, :, ::2, 1:] = 1
    (whole,) = torch.autograd.grad((out.square() * mask).sum(), x)
    torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("crops", [None, choose_crops((2, 8, 20, 20), 100, 3)])
def test_factors_of_bf16_activations_are_close_to_those_of_the_same_values(crops):
    """Float32 products of values that have 8 bits; the product with the weight is that of the
    rounded output, which a long sum of products is not."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False).to(torch.bfloat16)
    x = (F.relu(torch.randn(2, 8, 20, 20)) + 1.0).to(torch.bfloat16)
    geometry = ConvGeometry.of(conv)
    found = []
    for inputs, outputs in ((x, conv(x)), (x.double(), conv(x).double())):
        patch = mean_patch(inputs, geometry, (20, 20))
        mean = moments(outputs).mean
        left, right, product = variance_gradient_factors(
            inputs, outputs, mean, patch, geometry, crops
        )
        assert left.dtype == right.dtype == product.dtype == mean.dtype
        weight = conv.weight.detach().flatten(1).to(mean.dtype)
        found.append(((left @ right).flatten(0, 1), product, weight))
    (got, product, _), (exact, _, weight) = found
    assert float((got.double() - exact).norm() / exact.norm()) < 1e-5
    assert float((product - (exact * weight).sum(1)).norm() / product.norm()) < 0.01


@pytest.mark.parametrize("where", ["input", "output"])
def test_factors_are_finite_after_an_overflow(where):
    """What is averaged over iterations must survive the one that a GradScaler skips."""
    conv = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 9, 8)
    if where == "input":
        x[0, 1, 4, 4] = float("inf")
    y = conv(x)
    if where == "output":
        y[1, 2, 3, 3] = float("inf")
    geometry = ConvGeometry.of(conv)
    patch = mean_patch(x, geometry, (9, 8))
    left, right, product = variance_gradient_factors(
        x, y, moments(y).mean, patch, geometry, choose_crops(tuple(y.shape), 20, 0)
    )
    assert all(tensor.isfinite().all() for tensor in (left @ right, product))
    if where == "output":  # the other channels are as they were
        assert not left[0, 2].any() and left[0, 3].any()


def test_bf16_gradient_of_variance_is_close():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    x = F.relu(torch.randn(2, 8, 20, 20)) + 1.0
    exact = closed_form(conv.double(), x.double())[2]
    conv = conv.to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    y = conv(x)
    geometry = ConvGeometry.of(conv)
    patch = mean_patch(x, geometry, (20, 20))
    assert patch.dtype == torch.float32
    got = variance_gradient(x, y, moments(y).mean, geometry, conv.weight.shape)
    assert got.dtype == torch.float32
    assert float((got.double() - exact).norm() / exact.norm()) < 0.02
