"""BGN against its equations written out on reshaped tensors, finite differences and GroupNorm."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import MixtureEMA
from torch import nn

from cbn_det.norms import BGN2d, build_norm, format_norm_table, norm_rows
from cbn_det.norms.base import unchanged
from cbn_det.norms.functional import Estimate
from cbn_det.norms.normalization import normalize


def paper_bgn(x, groups, weight, bias, eps=1e-5):
    """The paper's equations: merge, cut into groups, one mean and variance a group, affine."""
    n, c = x.shape[:2]
    merged = x.reshape(n, groups, -1)
    mean = merged.mean((0, 2), keepdim=True)
    var = ((merged - mean) ** 2).mean((0, 2), keepdim=True)
    x_hat = ((merged - mean) / (var + eps).sqrt()).reshape(x.shape)
    return x_hat * weight.view(1, c, 1, 1) + bias.view(1, c, 1, 1)


def inputs(seed, n=3, c=12, size=(5, 7), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(1, c, 1, 1, generator=generator, dtype=dtype) * 3
    return torch.randn(n, c, *size, generator=generator, dtype=dtype) * spread + spread.flip(1)


def layer(c=12, dtype=torch.float64, **options):
    torch.manual_seed(0)
    norm = BGN2d(c, **options).to(dtype)
    nn.init.uniform_(norm.weight, 0.2, 2)
    nn.init.normal_(norm.bias)
    return norm


def gradients(out, leaves):
    probe = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((probe * out + out**2 * probe.flip(0) / 3).sum(), leaves)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("images", [1, 3])
def test_output_and_gradients_equal_the_paper(groups, channels_last, images):
    norm = layer(groups=groups)
    x = inputs(1, n=images)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    out = norm(x)
    expected = paper_bgn(x, groups, norm.weight, norm.bias)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    leaves = [x, norm.weight, norm.bias]
    got = gradients(out, leaves)
    for g, e in zip(got, gradients(expected, leaves), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8)
    if channels_last:
        for t in (out, got[0]):
            assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck_without_affine_parameters(groups):
    norm = BGN2d(4, groups=groups, affine=False).double()
    x = inputs(2, n=2, c=4, size=(2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(norm, x, atol=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.3, "by channel"])
def test_normalize_takes_a_share_of_groups(share):
    """Moments of groups that a constant takes part in: autograd of the same in plain terms."""
    torch.manual_seed(0)
    x = inputs(3, c=6).requires_grad_()
    weight, bias = torch.rand(6).double(), torch.randn(6).double()
    if share == "by channel":  # what has a group in common has its share in common
        share = torch.tensor([0.2, 0.7]).double().repeat_interleave(3)
    merged = x.view(3, 2, -1)
    now = (merged.mean((0, 2)), (merged**2).mean((0, 2)))
    own, seconds = (m.repeat_interleave(3) for m in now)
    mean = share * own + (1 - share) * 0.3
    var = share * seconds + (1 - share) * 5.0 - mean**2
    column = (1, 6, 1, 1)
    x_hat = (x - mean.view(column)) / (var + 1e-5).sqrt().view(column)
    expected = x_hat * weight.view(column) + bias.view(column)
    got = normalize(x, Estimate(mean.detach(), var.detach(), share, 2), weight, bias, 1e-5)
    torch.testing.assert_close(got, expected)
    (a,), (b,) = gradients(got, [x]), gradients(expected, [x])
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_image_is_group_normalization():
    x = inputs(4, n=1)
    norm = layer(groups=3)
    expected = F.group_norm(x, 3, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_one_image_is_trained_by_group_normalizations_kernels(size):
    """And is otherwise as one of several: its second pass and checkpoints leave the layer alone."""
    x = inputs(5, n=1, size=size).requires_grad_()
    norm = layer(groups=3)
    out = norm(x)
    assert out.grad_fn.name() == "NativeGroupNormBackward0"
    before = [buffer.clone() for buffer in norm.buffers()]
    with unchanged([norm]):
        norm(x)
    torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False).sum().backward()
    assert int(norm.num_batches_tracked) == int(before[2]) + 1  # of the checkpoint's first forward
    norm(x.to(torch.bfloat16))  # what torch's kernel does not take: as several images


@pytest.mark.parametrize("images", [1, 2])
def test_precision_of_groups_whose_channels_lie_far_apart(images):
    """The variance between the channels of a group, in float32, at mean / std = 1000."""
    x = torch.randn(images, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 1000.0
    x[:, 1] += 3.0
    out = BGN2d(4, groups=2)(x)
    expected = paper_bgn(x.double(), 2, torch.ones(4), torch.zeros(4))
    assert float((out - expected).abs().max().detach()) < 1e-3


@pytest.mark.parametrize("rule", ["pooled", "batch"])
@pytest.mark.parametrize("images", [1, 3])
def test_running_statistics_are_those_of_the_groups(rule, images):
    norm = BGN2d(6, groups=2, ema=rule)
    pooled, plain = MixtureEMA(2), [np.zeros(2), np.ones(2)]
    for t in range(5):
        x = inputs(t, n=images, c=6, dtype=torch.float32) + t
        norm(x)
        merged = x.double().view(images, 2, -1).transpose(0, 1).flatten(1).numpy()
        mean, var, count = merged.mean(1), merged.var(1), merged.shape[1]
        pooled.update(mean, var, count)
        plain = [0.9 * plain[0] + 0.1 * mean, 0.9 * plain[1] + 0.1 * merged.var(1, ddof=1)]
    expected = (pooled.first, pooled.var) if rule == "pooled" else plain
    for buffer, value in zip((norm.running_mean, norm.running_var), expected, strict=True):
        np.testing.assert_allclose(buffer, np.repeat(value, 3), rtol=1e-4)


def test_evaluation_folds_into_the_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), BGN2d(6, groups=2))
    for t in range(5):
        model(inputs(t, c=3, dtype=torch.float32))
    model.eval()
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(*copy.deepcopy(model))
    x = inputs(9, c=3, dtype=torch.float32)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels, groups, used", [(12, 8, 4), (12, 5, 1), (16, 8, 8), (8, 8, 8)])
def test_groups_that_do_not_divide_the_channels(channels, groups, used):
    norm = layer(channels, groups=groups)
    assert norm.groups_used == used
    x = inputs(5, c=channels)
    expected = paper_bgn(x, used, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-10)
    assert f"groups={used}," in repr(norm) and norm.options()["groups"] == groups
    assert f"BGN(groups={used}," in format_norm_table(norm_rows(nn.Sequential(norm)))
    assert type(norm)(channels, **norm.options()).options() == norm.options()


@pytest.mark.parametrize("channels, used", [(256, 32), (48, 16), (32, 32), (16, 16), (6, 6)])
def test_the_default_fits_every_layer(channels, used):
    norm = layer(channels)
    assert norm.groups_used == used and norm.options()["groups"] is None
    x = inputs(6, c=channels)
    expected = paper_bgn(x, used, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-10)
    assert type(build_norm("BGN(groups=None)", channels)) is BGN2d
    assert f"groups={used}," in repr(norm)
    assert f"BGN(groups={used}," in format_norm_table(norm_rows(nn.Sequential(norm)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("BGN(groups=8)", "groups=8 at a layer of 4 channels.*slab.*at most 4"),
        ("BGN(groups=0)", "groups=0.*1 or more"),
        ("BGN(groups=2.0)", "groups=2.0"),
        ("BGN(groups=True)", "groups=True"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ValueError, match=message):
        build_norm(text, 4)
