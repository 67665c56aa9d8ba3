"""KN against sampling, the equations written out in kalman.py, finite differences and BatchNorm."""

import copy
import gc
import pickle

import kalman
import numpy as np
import pytest
import torch
from kalman import Kalman, checkpointed_after_one_iteration_without
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cbn_det.norms import find_chain, kn_chain, reading_memory
from cbn_det.norms.kn import KN2d
from cbn_det.norms.propagation import convolved, rectified, tap_sums
from cbn_det.norms.spec import build_norm


def images(seed, n=2, size=8, channels=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator, dtype=dtype)


def randomise(model):
    """Affine parameters away from their initial values."""
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, (KN2d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


class Chain3(nn.Module):
    """Three convolutions, with stride, dilation, groups, biases and a max pooling."""

    def __init__(self, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm1 = KN2d(4, **options)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.norm2 = KN2d(6, **options)
        self.conv3 = nn.Conv2d(6, 5, 1, stride=2, bias=False)
        self.norm3 = KN2d(5, **options)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2, 1)
        x = F.relu_(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x))

    def reference(self, x, gain):
        norms = [Kalman(norm, gain) for norm in (self.norm1, self.norm2, self.norm3)]
        x = F.max_pool2d(F.relu(norms[0](self.conv1(x), None)), 2, 1)
        for norm, before, conv in ((1, 0, self.conv2), (2, 1, self.conv3)):
            handed = kalman.rectified(*norms[before].handed)
            x = norms[norm](conv(x), kalman.convolved(*handed, conv))
            x = F.relu(x) if norm == 1 else x
        return x


class Residual(nn.Module):
    """Two blocks: one with a projection, one with the identity; and a convolution after them."""

    def __init__(self, **options):
        super().__init__()
        self.convs = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        for name, cin in (("stem", 3), ("proj", 4), ("a1", 4), ("a2", 4), ("b1", 4), ("b2", 4)):
            self.convs[name] = nn.Conv2d(cin, 4, 3, padding=1, bias=False)
            self.norms[name] = KN2d(4, **options)
        self.convs["last"], self.norms["last"] = nn.Conv2d(4, 3, 1), KN2d(3, **options)

    def forward(self, x):
        def branch(name, x):
            return self.norms[name](self.convs[name](x))

        x = F.relu(branch("stem", x))
        x = F.relu(branch("a2", F.relu(branch("a1", x))) + branch("proj", x))
        out = branch("b2", F.relu(branch("b1", x)))
        out += x
        return branch("last", F.relu(out))

    def reference(self, x, gain):
        norms = {name: Kalman(norm, gain) for name, norm in self.norms.items()}

        def branch(name, x, prediction):
            conv = self.convs[name]
            prediction = prediction and kalman.convolved(*prediction, conv)
            return norms[name](conv(x), prediction), norms[name].handed

        relu = kalman.rectified
        x, handed = branch("stem", x, None)
        x, before = F.relu(x), relu(*handed)
        a, handed = branch("a1", x, before)
        a, handed = branch("a2", F.relu(a), relu(*handed))
        b, other = branch("proj", x, before)
        x = F.relu(a + b)
        before = relu(handed[0] + other[0], handed[1] + other[1])
        a, handed = branch("b1", x, before)
        a, handed = branch("b2", F.relu(a), relu(*handed))
        after = relu(handed[0] + before[0], handed[1] + before[1])
        return branch("last", F.relu(a + x), after)[0]


NETS = {"chain": Chain3, "residual": Residual}
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


def gradients(out, leaves):
    probe = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((probe * out + out**3 / 5).sum(), leaves, allow_unused=True)


def assert_grads(ours, theirs, names, **tolerance):
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, msg=name, **tolerance)


# ---- moments in closed form ------------------------------------------------------------------


def test_rectified_moments_equal_sampling():
    torch.manual_seed(0)
    mean = torch.tensor([-3.0, -1.0, -0.1, 0.0, 0.5, 2.0, 6.0])
    var = torch.tensor([1.0, 4.0, 0.01, 1.0, 0.25, 9.0, 1.0])
    draws = F.relu(mean + var.sqrt() * torch.randn(1_000_000, 7))
    first, second = rectified(mean, var)
    torch.testing.assert_close(first, draws.mean(0), rtol=5e-3, atol=2e-4)
    torch.testing.assert_close(second, draws.var(0), rtol=2e-2, atol=2e-4)


def test_rectified_moments_keep_their_digits_far_from_zero():
    """Against float64 integration; single precision, and means far above the deviation."""
    mean, var = torch.tensor([1000.0, 30.0, 5.0, -4.0, -1000.0, 2.0]), torch.ones(6)
    var[5] = 0.0
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)
    density /= density.sum()
    values = F.relu(mean.double()[:, None] + var.double().sqrt()[:, None] * grid)
    expected = (values * density).sum(1)
    spread = ((values - expected[:, None]) ** 2 * density).sum(1)
    first, second = rectified(mean, var)
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(second.double(), spread, rtol=1e-3, atol=1e-6)


def test_rectified_moments_have_finite_gradients():
    mean = torch.tensor([0.0, 0.0, 3.0, -40.0, 1e4], requires_grad=True)
    scale = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], requires_grad=True)
    sum(t.sum() for t in rectified(mean, scale**2)).backward()
    assert mean.grad.isfinite().all() and scale.grad.isfinite().all()
    arguments = [torch.tensor(v, dtype=torch.float64) for v in ([-2.0, 0.3, 1.0], [0.5, 2.0, 1.0])]
    assert torch.autograd.gradcheck(rectified, [a.requires_grad_() for a in arguments])


CONVS = {
    "3x3": {"kernel_size": 3},
    "groups, bias": {"kernel_size": 3, "groups": 2, "bias": True},
    "stride": {"kernel_size": 3, "stride": 2},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "1x1": {"kernel_size": 1},
}


@pytest.mark.parametrize("kind", CONVS)
def test_convolved_moments_equal_sampling_away_from_borders(kind):
    """As the authors' code draws it: independent Gaussians, ReLU, the convolution itself."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **{"bias": False, **CONVS[kind]})
    mean, var = torch.randn(4), torch.rand(4) + 0.2
    with torch.no_grad():
        sample = mean.view(1, 4, 1, 1) + var.sqrt().view(1, 4, 1, 1) * torch.randn(8, 4, 300, 300)
        y = conv(F.relu(sample))
        pair = torch.stack(rectified(mean, var))
        predicted = convolved(pair, tap_sums(conv.weight, pair.dtype), conv.bias)
    std = y.std((0, 2, 3))
    assert float(((predicted[0] - y.mean((0, 2, 3))) / std).abs().max()) < 0.02
    torch.testing.assert_close(predicted[1], y.var((0, 2, 3)), rtol=0.02, atol=0)


def test_how_much_padding_matters():
    """The closed form knows no border: its error is of the order of the border's share."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)
    errors = {}
    for size in (7, 14, 56):
        with torch.no_grad():
            y = conv(F.relu(torch.randn(max(8, 40_000 // size**2), 16, size, size)))
            pair = torch.stack(rectified(torch.zeros(16), torch.ones(16)))
            mean, _ = convolved(pair, tap_sums(conv.weight, pair.dtype))
            errors[size] = float(((mean - y.mean((0, 2, 3))) / y.std((0, 2, 3))).abs().mean())
    assert errors[7] > 1.5 * errors[14] > 4 * errors[56]
    assert errors[7] < 0.25 and errors[56] < 0.03


# ---- the whole network ----------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("gain", [0.3, 0.9])
def test_outputs_and_gradients_equal_the_equations(net, gain):
    """Float64, through every dependence: the input, all weights, all earlier layers."""
    torch.manual_seed(0)
    model = randomise(net(gain=gain).double())
    twin = copy.deepcopy(model)
    x, z = (images(1).requires_grad_() for _ in range(2))
    ours = model(x)
    theirs = twin.reference(z, gain)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    names = ["input", *(n for n, _ in model.named_parameters())]
    a = gradients(ours, [x, *model.parameters()])
    b = gradients(theirs, [z, *twin.parameters()])
    assert_grads(a, b, names, rtol=1e-5, atol=1e-7)


def test_gradcheck():
    torch.manual_seed(0)
    model = randomise(Chain3(gain=0.6).double())
    x = images(1, n=1, size=5).requires_grad_()
    model(x)
    assert torch.autograd.gradcheck(lambda x: model(x), [x], atol=1e-6)
    for name, p in model.named_parameters():
        out = (model(x) ** 2).sum()
        (grad,) = torch.autograd.grad(out, p)
        direction = torch.randn_like(p)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p += step * direction
            values.append((model(x) ** 2).sum().detach())
            with torch.no_grad():
                p -= step * direction
        expected = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(
            (grad * direction).sum(), expected, rtol=1e-5, atol=1e-5, msg=name
        )


def test_consistent_predictions_are_right_where_their_assumptions_hold():
    """Normalised, independent activations: the prediction is what a large batch would show."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1, bias=False), KN2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), KN2d(16)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8)[..., None, None])
    randomise(model)(torch.randn(16, 8, 64, 64))
    errors = model[4].diagnostics
    assert float(errors["prediction_mean"]) < 0.02
    assert float(errors["prediction_var"]) == pytest.approx(1.0, abs=0.02)
    assert float(errors["guarded"]) == 0.0


def test_what_the_authors_code_hands_on_predicts_worse():
    """The posterior of a layer's input, in place of the distribution of its output: the reason to
    depart from their code. Errors of the mean, in standard deviations of the mini-batch."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for width in (3, 16, 16, 16, 16):
        model.extend([nn.Conv2d(width, 16, 3, padding=1), KN2d(16), nn.ReLU()])
    randomise(model.double())
    x = images(1, n=4, size=16)
    model(x)
    errors = {"output": [], "posterior": []}
    before = None
    for conv, norm in zip(model[::3], model[1::3], strict=True):
        y, layer = conv(x), Kalman(norm, 0.2)
        mean, var = kalman.batch_statistics(y)
        prediction = None
        if before is not None:
            handed = {"output": before.handed, "posterior": before.estimate}
            for key, pair in handed.items():
                predicted, _ = kalman.convolved(*kalman.rectified(*pair), conv)
                errors[key].append(float(((predicted - mean).abs() / var.sqrt()).mean().detach()))
            prediction = kalman.convolved(*kalman.rectified(*before.handed), conv)
        x, before = F.relu(layer(y, prediction)), layer
    found = [float(norm.diagnostics["prediction_mean"]) for norm in model[4::3]]
    np.testing.assert_allclose(found, errors["output"], rtol=1e-4)
    assert np.mean(errors["posterior"]) > 2.0 * np.mean(errors["output"])


# ---- degenerate settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gain": 0},
        {"gain": 0, "momentum": None},
        {"gain": 0, "momentum": 0.3, "eps": 1e-3},
        {"gain": 0, "affine": False},
    ],
    ids=str,
)
def test_without_gain_it_is_batchnorm(options):
    taken = {k: v for k, v in options.items() if k in ("momentum", "eps", "affine")}
    ours = Chain3(ema="batch", **options)
    theirs = copy.deepcopy(ours)
    for name in ("norm1", "norm2", "norm3"):
        setattr(theirs, name, nn.BatchNorm2d(getattr(ours, name).num_features, **taken))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, theirs)]
    for t in range(4):
        x = images(t, dtype=torch.float32)
        outs = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            outs.append(model(x))
            outs[-1].pow(3).mean().backward()
            optimizer.step()
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    for (key, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_guard_refuses_what_is_not_finite(value):
    observed = torch.tensor([[0.5, -1.0], [2.0, 3.0]])
    prediction = observed + 0.1
    prediction[:, 1] = value
    mixed = KN2d(2, gain=0.3)._mixed(prediction.requires_grad_(), *observed)
    assert torch.equal(torch.stack((mixed.mean, mixed.var)), observed) and mixed.share == 1.0
    (mixed.mean + mixed.var).sum().backward()
    assert not prediction.grad.any()


@pytest.mark.parametrize("refused", [True, False])
def test_the_guard_refuses_predictions_of_another_scale(refused):
    """Predicted variances of 100 times and more: the layer is BatchNorm, its gradients, too."""
    torch.manual_seed(0)
    model = Chain3(gain=0.9).double()
    with torch.no_grad():
        if refused:
            model.norm1.eps = 1e4  # the output has nearly no variance, and not gamma**2
    plain = copy.deepcopy(model)
    plain.norm2 = nn.BatchNorm2d(6).double()
    plain.norm3 = KN2d(5, gain=0).double()
    model.norm3 = KN2d(5, gain=0).double()
    a, b = (m(images(1)) for m in (model, plain))
    assert float(model.norm2.diagnostics["guarded"]) == float(refused)
    assert torch.allclose(a, b, rtol=1e-7, atol=1e-7) == refused
    grads = [gradients(o, [m.conv1.weight, m.conv2.weight]) for o, m in ((a, model), (b, plain))]
    for g, h in zip(*grads, strict=True):
        assert torch.allclose(g, h, rtol=1e-6, atol=1e-8) == refused


def test_a_dead_channel_is_predicted_as_it_is():
    """Its output is its bias; the prediction of the other channels is believed as before."""
    model = randomise(Chain3(gain=0.6).double())
    with torch.no_grad():
        model.conv2.weight[1] = 0.0
    outs = []
    model.norm2.register_forward_hook(lambda norm, args, out: outs.append(out))
    out = model(images(1))
    torch.testing.assert_close(outs[0][:, 1], model.norm2.bias[1].expand(outs[0][:, 1].shape))
    assert float(model.norm2.diagnostics["guarded"]) == 0.0
    expected = model.reference(images(1), 0.6)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    assert all(grad.isfinite().all() for grad in gradients(out, [*model.parameters()]))


@pytest.mark.parametrize(
    "ratios, refused",
    [
        ([99.0] * 4, False),
        ([101.0] * 4, True),
        ([390.0, 1.01, 1.01, 1.01], False),  # 98 on average: one channel far off is not enough
        ([410.0, 1.01, 1.01, 1.01], True),  # 103: nor is one that is right
    ],
    ids=str,
)
def test_the_guard_is_at_100_times_the_variance_on_average_over_channels(ratios, refused):
    """Identities as convolutions: N(0, 1) is predicted, and of a channel of variance v the first
    layer makes v / (v + eps)."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False), KN2d(4, eps=1.0),
        nn.Conv2d(4, 4, 1, bias=False), KN2d(4, eps=1e-12, gain=0.5),
    ).double()  # fmt: skip
    x = F.batch_norm(images(1, channels=4), None, None, training=True, eps=1e-12)
    x *= (torch.tensor(ratios).double() - 1.0).rsqrt().view(1, 4, 1, 1)
    with torch.no_grad():
        for conv in (model[0], model[2]):
            conv.weight.copy_(torch.eye(4)[..., None, None])
    out = model(x)
    plain = F.batch_norm(x, None, None, training=True, eps=1e-12)
    assert float(model[3].diagnostics["guarded"]) == float(refused)
    assert torch.allclose(out, plain) == refused


# ---- evaluation, running statistics, forwards without gradient -------------------------------


@pytest.mark.parametrize("ema", ["pooled", "batch"])
def test_running_statistics_are_those_of_the_posterior(ema):
    torch.manual_seed(0)
    model = randomise(Chain3(gain=0.5, ema=ema).double())
    first, second = np.zeros(5), np.ones(5)
    mean_only, var_only = np.zeros(5), np.ones(5)
    for t in range(5):
        x = images(t) + t / 3
        model(x)
        norm = Kalman(model.norm3, 0.5)
        handed = [Kalman(n, 0.5) for n in (model.norm1, model.norm2)]
        with torch.no_grad():
            h = F.max_pool2d(F.relu(handed[0](model.conv1(x), None)), 2, 1)
            pair = kalman.convolved(*kalman.rectified(*handed[0].handed), model.conv2)
            h = F.relu(handed[1](model.conv2(h), pair))
            pair = kalman.convolved(*kalman.rectified(*handed[1].handed), model.conv3)
            y = model.conv3(h)
            norm(y, pair)
        mean, var = (v.numpy() for v in norm.estimate)
        count = y.numel() / 5
        first = 0.9 * first + 0.1 * mean
        second = 0.9 * second + 0.1 * (var * 2 * count / (2 * count - 1) + mean**2)
        mean_only = 0.9 * mean_only + 0.1 * mean
        var_only = 0.9 * var_only + 0.1 * var * count / (count - 1)
    expected = (first, second - first**2) if ema == "pooled" else (mean_only, var_only)
    np.testing.assert_allclose(model.norm3.running_mean, expected[0], rtol=1e-7)
    np.testing.assert_allclose(model.norm3.running_var, expected[1], rtol=1e-7)


def test_evaluation_is_batchnorm_and_checkpoints_are_its():
    model = randomise(Chain3(gain=0.5))
    for t in range(3):
        model(images(t, dtype=torch.float32))
    model.eval()
    y = images(9, channels=6, dtype=torch.float32)
    plain = nn.BatchNorm2d(6).eval()
    plain.load_state_dict(model.norm2.state_dict(), strict=True)
    assert torch.equal(model.norm2(y), plain(y))


def test_precise_bn_sees_a_batchnorm():
    model = randomise(Chain3(gain=0.5).double())
    plain = copy.deepcopy(model)
    for name in ("norm1", "norm2", "norm3"):
        norm = nn.BatchNorm2d(getattr(model, name).num_features, momentum=1.0).double()
        norm.load_state_dict(getattr(model, name).state_dict())
        setattr(plain, name, norm)
    model(images(0))
    assert kn_chain(model)[2].follows == "relu(norm2)"
    for name in ("norm1", "norm2", "norm3"):
        getattr(model, name).momentum = 1.0
    with torch.no_grad():
        torch.testing.assert_close(model(images(1)), plain(images(1)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.norm3.running_var, plain.norm3.running_var)


def test_forwards_without_gradient_estimate_as_with_one_where_they_are_told_to():
    """They are BatchNorm's otherwise."""
    model = randomise(Chain3(gain=0.5).double())
    expected = model(images(1)).detach()
    with torch.no_grad():
        assert (model(images(1)) - expected).abs().max() > 1e-3
    with torch.no_grad(), reading_memory(model):
        torch.testing.assert_close(model(images(1)), expected, rtol=1e-12, atol=1e-12)


# ---- memory, copies, modes -------------------------------------------------------------------


def tensors_with_graph():
    gc.collect()
    # by type: isinstance would wake up whatever is imported lazily
    return sum(type(o) is torch.Tensor and o.grad_fn is not None for o in gc.get_objects())


def test_no_graph_outlives_the_backward_pass():
    model = Residual(gain=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = tensors_with_graph()
    for t in range(4):
        optimizer.zero_grad()
        loss = model(images(t, dtype=torch.float32)).pow(2).mean()
        loss.backward()
        optimizer.step()
    del loss
    assert tensors_with_graph() == before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_predict_from_their_own_layers(how):
    model = randomise(Chain3(gain=0.6).double())
    model(images(0))
    twin = how(model)
    own = set(twin.modules())
    for norm in (twin.norm2, twin.norm3):
        assert len(set(norm.chain.modules())) == 2 and own.issuperset(norm.chain.modules())
    with torch.no_grad():
        twin.norm1.bias += 1.0
        model.norm1.bias += 1.0
        assert torch.equal(model(images(1)), twin(images(1)))
        twin.norm1.bias += 1.0
        assert not torch.equal(model(images(1)), twin(images(1)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    with torch.no_grad():
        twin.norm1.bias.copy_(model.norm1.bias)
    for t in range(3):
        outs = [m(images(t)) for m in (model, twin)]
        assert torch.equal(*outs)
        for out, optimizer in zip(outs, optimizers, strict=True):
            out.pow(2).mean().backward()
            optimizer.step()


def test_non_reentrant_checkpointing_changes_nothing():
    model = randomise(Chain3(gain=0.6).double())
    twin = copy.deepcopy(model)
    for t in range(3):
        x, z = (images(t).requires_grad_() for _ in range(2))
        a, b = model(x), checkpoint(twin, z, use_reentrant=False)
        assert torch.equal(a, b)
        ours, theirs = gradients(a, [x, *model.parameters()]), None
        probe = torch.linspace(-1, 2, b.numel(), dtype=b.dtype).view_as(b)
        (probe * b + b**3 / 5).sum().backward()
        theirs = [z.grad, *(p.grad for p in twin.parameters())]
        for g, h in zip(ours, theirs, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-12)
        twin.zero_grad()
    assert torch.equal(model.norm3.running_var, twin.norm3.running_var)


def test_reentrant_checkpointing_is_batchnorm_for_one_iteration_and_the_same_afterwards():
    model = randomise(Chain3(gain=0.6).double())
    twin = checkpointed_after_one_iteration_without(model, images)
    assert twin.norm3.chain is not None


def test_a_chain_found_before_training_is_whole_under_reentrant_checkpoints():
    model = randomise(Chain3(gain=0.6).double())
    twin = copy.deepcopy(model)
    find_chain(twin, images(0))
    first = nn.Sequential(twin.conv1, twin.norm1, nn.ReLU(), nn.MaxPool2d(2, 1))
    second = nn.Sequential(twin.conv2, twin.norm2, nn.ReLU(), twin.conv3, twin.norm3)
    x, z = (images(1).requires_grad_() for _ in range(2))
    a = model(x)
    b = checkpoint(second, checkpoint(first, z, use_reentrant=True), use_reentrant=True)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    a.pow(3).sum().backward()
    b.pow(3).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=name)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-8, atol=1e-10)


def test_autocast_and_channels_last():
    torch.manual_seed(0)
    model = randomise(Chain3(gain=0.5))
    x = images(1, dtype=torch.float32, size=16)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert float((out - expected).norm() / expected.norm()) < 0.05
    out.float().pow(2).mean().backward()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    nhwc = twin(x.to(memory_format=torch.channels_last))
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(nhwc, expected, rtol=1e-4, atol=1e-4)


def test_autocast_finds_the_same_chain():
    model = Chain3(gain=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images(1, dtype=torch.float32))
    assert type(model.norm2.chain).__name__ == "Conv"
    assert model.norm2.chain.weight.now() is model.conv2.weight


def test_few_values_and_none():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), KN2d(4, gain=0.5), nn.ReLU(),
        nn.Conv2d(4, 4, 1), KN2d(4, gain=0.5),
    )  # fmt: skip
    for shape in ((2, 3, 4, 4), (0, 3, 4, 4), (1, 3, 1, 1)):
        out = model(torch.randn(shape))
        out.pow(2).sum().backward()
        assert out.shape[0] == shape[0] and out.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_training_with_a_graph_compiled_in_evaluation():
    """Compiled, evaluated and trained in turn, it is what it is without compilation."""
    torch._dynamo.reset()
    model = randomise(Chain3(gain=0.5).double())
    find_chain(model, images(0))  # which a compiled forward cannot
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    pair = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin)]
    for t in range(3):
        model.eval(), compiled.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(images(t)), model(images(t)))
        model.train(), compiled.train()
        for m, optimizer in zip((model, compiled), pair, strict=True):
            optimizer.zero_grad()
            m(images(t)).pow(3).mean().backward()
            optimizer.step()
    for (key, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=key)
    assert twin.norm3.diagnostics  # something was predicted


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gain": 1.0}, "gain"),
        ({"gain": -0.1}, "gain"),
        ({"gain": True}, "gain"),
        ({"gain": "fixed"}, "gain"),
        ({"gain": "learned"}, "gain"),
        ({"ema": "mean"}, "pooled.*batch"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        KN2d(4, **options)


def test_options_build_the_same_layer_again():
    norm = build_norm("KN(gain=0.3, ema='batch')", 4)
    assert KN2d(4, **norm.options()).options() == norm.options()
    assert norm.options()["gain"] == 0.3 and "gain=0.3" in repr(norm)
