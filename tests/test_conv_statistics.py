"""Derivatives of convolution statistics: against numpy, autograd and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import conv_moments, conv_patches
from torch import nn

from cbn_det.norms import conv_statistics
from cbn_det.norms.conv_statistics import (
    ConvGeometry,
    choose_crops,
    mean_patch,
    sampled_variance_gradient,
    variance_gradient,
)
from cbn_det.norms.functional import moments

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
    """The derivative from the crops alone."""
    y, patch, _ = closed_form(conv, x)
    return sampled_variance_gradient(
        x, y, y.mean((0, 2, 3)), patch, ConvGeometry.of(conv), conv.weight.shape, crops
    )


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


@pytest.mark.parametrize("images", [2, 12])  # many maps are summed first
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["stride (3, 2)", "dilation, stride", "circular same even", "1x1"])
def test_the_mean_patch_is_that_of_patches_cut_by_hand(kind, dtype, images):
    conv = CONVS[kind]()
    x = (torch.randn(images, 4, 11, 9) + 3.0).to(dtype)
    out_size = tuple(conv(x.float()).shape[2:])
    expected = conv_patches(x.double().numpy(), conv).mean((1, 2, 3))
    got = mean_patch(x, ConvGeometry.of(conv), out_size)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(got.numpy(), expected, rtol=rtol, atol=rtol)


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
    monkeypatch.setattr(conv_statistics, "_MOST_CROPS", most)
    monkeypatch.setattr(conv_statistics, "_CROP_POSITIONS", 8)
    conv, x = case
    x = torch.randn(5, 4, 22, 23, dtype=torch.float64) + 1.0
    y, patch, _ = closed_form(conv, x)
    patches = torch.from_numpy(conv_patches(x.numpy(), conv))
    centred = y - y.mean((0, 2, 3)).view(1, -1, 1, 1)
    for turn in range(25):
        crops = choose_crops(tuple(y.shape), 30, turn)
        assert len(crops) <= most
        gradients = []
        for crop in crops:
            box = (crop.images, slice(crop.i0, crop.i1), slice(crop.j0, crop.j1))
            cut = patches[(slice(None), *box)] - patch.view(conv.groups, 1, 1, 1, -1)
            out = centred[box[0], :, box[1], box[2]].unflatten(1, (conv.groups, -1))
            size = cut[0, ..., 0].numel()
            gradients.append(2 * torch.einsum("gnijd,ngoij->god", cut, out).flatten(0, 1) / size)
        expected = torch.stack(gradients).mean(0)
        torch.testing.assert_close(estimated(conv, x, crops), expected, rtol=1e-9, atol=1e-10)


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


# ---- 16 bits, and numbers that are not finite ------------------------------------------------


@pytest.mark.parametrize("positions", [20, None])
def test_an_overflow_is_seen_and_stays_in_its_channels(positions):
    """Of the output, within the crop or not, and of the input, in a convolution of two groups."""
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    y = conv(x).detach()
    crops = choose_crops(tuple(y.shape), positions, 0)
    geometry, before = ConvGeometry.of(conv), estimated(conv, x, crops)

    def finite_channels(x, y):
        patch, mean = mean_patch(x, geometry, (9, 8)), moments(y).mean
        got = sampled_variance_gradient(x, y, mean, patch, geometry, conv.weight.shape, crops)
        finite = got.isfinite().all(1)
        torch.testing.assert_close(got[finite], before[finite], rtol=1e-9, atol=1e-12)
        return finite.tolist()

    broken = y.clone()
    broken[1, 2, 3, 3] = float("inf")
    assert finite_channels(x, broken) == [True, True, False, True, True, True]
    x[0, 1, 4, 4] = float("inf")
    assert finite_channels(x, conv(x).detach()) == [False] * 3 + [True] * 3


@pytest.mark.parametrize("positions", [100, None])
def test_the_gradient_of_bf16_activations_is_close_to_that_of_the_same_values(positions):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False).to(torch.bfloat16)
    x = (F.relu(torch.randn(2, 8, 20, 20)) + 1.0).to(torch.bfloat16)
    geometry, found = ConvGeometry.of(conv), []
    for inputs, outputs in ((x, conv(x)), (x.double(), conv(x).double())):
        patch, mean = mean_patch(inputs, geometry, (20, 20)), moments(outputs).mean
        crops = choose_crops(tuple(outputs.shape), positions, 3)
        found.append(
            sampled_variance_gradient(
                inputs, outputs, mean, patch, geometry, conv.weight.shape, crops
            )
        )
        assert patch.dtype == found[-1].dtype == mean.dtype
    got, exact = found
    assert got.dtype == torch.float32 and (crops is None) == (positions is None)
    assert float((got.double() - exact).norm() / exact.norm()) < 0.01
