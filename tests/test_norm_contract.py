"""The contract of SmallBatchNorm2d, and of GKN where it applies: what holds for every method. A new
method joins SPECS and DEGENERATE, and what does not hold for it, EXCEPTIONS."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from oracles import MixtureEMA
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_det.norms import (
    build_norm,
    find_chain,
    load_memory_state_dict,
    memory_state_dict,
    norm_diagnostics,
    resolve_burn_in,
    sync_running_stats,
)

SPECS = {
    "CBN": "CBN(window=3, burn_in=0)",
    "CBN batch": "CBN(window=3, burn_in=0, ema='batch')",
    "CBN crop": "CBN(window=3, burn_in=0, positions=5)",
    "CBN all positions": "CBN(window=3, burn_in=0, positions=None)",
    "CBN none": "CBN(window=3, burn_in=0, compensation='none')",
    "CBN window 1": "CBN(window=1, burn_in=0)",
    "CBN burn-in": "CBN(window=3, burn_in=2)",
    "BN": "BN",
    "BN pooled": "BN(ema='pooled')",
    "BGN": "BGN(groups=2)",
    "BGN one group batch": "BGN(groups=1, ema='batch')",
    "BRN": "BRN(burn_in=0, ramp=2)",
    "BRN batch": "BRN(burn_in=1, ramp=0, ema='batch')",
    "MBN": "MBN(window=3, burn_in=0)",
    "MBN burn-in": "MBN(window=3, decay=0.5, burn_in=2)",
    "MBN window 1": "MBN(window=1, burn_in=0)",
    "KN": "KN(gain=0.3)",
    "GKN": "GKN(groups=2, gain=0.3)",
    "GKN groups of one": "GKN(groups=4, gain=0.3)",
}

_FORGETS = "it remembers nothing"
_A_GROUPNORM = "it is a GroupNorm, with no statistics, memory or clock: test_gkn.py"

# What does not hold, and for which norm (its name, or a key of SPECS): {test: {norm: why}}
EXCEPTIONS = {
    **{
        test: {"GKN": _A_GROUPNORM}
        for test in (
            "test_evaluation_is_batchnorm_and_checkpoints_are_its",
            "test_memory_is_in_no_state_dict_parameter_or_buffer",
            "test_precise_bn_computes_population_statistics",
            "test_statistics_found_by_channel_become_the_layers",
            "test_momentum_of_one_keeps_the_batch_itself_in_a_forward_without_gradient",
        )
    },
    **{
        test: {"GKN": _A_GROUPNORM, "BN": _FORGETS, "BGN": _FORGETS, "KN": _FORGETS}
        for test in (
            "test_an_iteration_with_empty_input_only_is_none",
            "test_checkpointed_forwards_whose_backward_comes_later_are_staged_once_each",
            "test_one_step_of_any_optimiser_is_one_iteration",
            "test_two_optimisers_stepping_together_are_one_iteration",
            "test_a_skipped_step_is_no_iteration",
        )
    },
    "test_running_statistics_average_mini_batches": {
        "GKN": _A_GROUPNORM,
        "MBN": "they are the memory's combined statistics: test_mbn.py",
        "MBN window 1": None,  # remembers nothing, so that it holds
    },
    "test_accumulated_forwards_pool_to_one_of_the_whole_batch": {
        "GKN": _A_GROUPNORM,
        "CBN": "its derivative is of few positions of each forward: test_cbn.py",
        "CBN all positions": None,
        "CBN none": None,
        "CBN window 1": None,
    },
    "test_forwards_without_gradient_never_write": {
        "BRN": "the running statistics, which such forwards move, take part in training"
    },
    "test_forwards_without_gradient_may_come_first_after_a_step": {"BRN": "likewise"},
    "test_off_centre_activations_keep_their_variance": {
        "GKN groups of one": "the first of a chain is torch's, inexact on CPU in channels_last"
    },
    "test_reentrant_activation_checkpointing_changes_nothing_in_training": {
        "KN": "its first pass has no graph to find the chain in: that iteration is BatchNorm",
        "GKN": "likewise GroupNorm: test_gkn.py; test_backbones.py finds the chain before",
    },
    "test_reentrant_activation_checkpointing_changes_no_running_statistics": {
        "KN": "its first pass has no graph to find the chain in: that iteration is BatchNorm",
        "GKN": _A_GROUPNORM,
    },
    "test_gradcheck_with_the_memory_held_constant": {
        "CBN": "its entries follow the weight, as a constant for the gradient: test_cbn.py",
        "CBN window 1": None,
    },
    "test_update_bn_of_torch_gives_the_mean_over_batches": {
        "GKN": _A_GROUPNORM,
    },
    "test_the_output_of_a_new_layer_is_standardised": {
        "BRN": "by its limits r_max and d_max only as far as they allow"
    },
}


def exception(test, key):
    """Why a contract does not hold for a key of SPECS; None if it does."""
    of_test = EXCEPTIONS.get(test, {})
    return of_test.get(key, of_test.get(key.split()[0]))


def every_norm(test):
    specs = {k: spec for k, spec in SPECS.items() if exception(test.__name__, k) is None}
    return pytest.mark.parametrize("spec", specs.values(), ids=specs)(test)


def test_exceptions_name_tests_and_norms():
    for test, of_test in EXCEPTIONS.items():
        assert test in globals() and of_test.keys() <= SPECS.keys()


def block(spec, bias=True, cin=3, channels=4, **options):
    return nn.Sequential(
        nn.Conv2d(cin, channels, 3, padding=1, bias=bias), build_norm(spec, channels, **options)
    )


def stack(spec, **options):
    """Two blocks, so that one norm sees inputs that need gradient and the other does not."""
    return nn.Sequential(*block(spec, **options), nn.ReLU(), *block(spec, cin=4, **options))


def images(seed, n=2, size=9, **kwargs):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), **kwargs)


def loss_of(out):
    return (out - torch.linspace(-1, 2, out.numel()).view(out.shape)).square().mean()


def sgd(model, lr=0.05, fused=False):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=fused)


def tick():
    """An optimiser step that changes nothing."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0).step()


def train(model, optimizer, seeds, forward=None):
    outs = []
    for seed in seeds:
        optimizer.zero_grad()
        outs.append((forward or model)(images(seed)))
        loss_of(outs[-1]).backward()
        optimizer.step()
    return [out.detach() for out in outs]


def norms(model):
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]


def variances(norm):
    """Of the running statistics; none of a GroupNorm."""
    return getattr(norm, "running_var", torch.zeros(0))


def memory(model):
    """A snapshot that later training does not touch."""
    return copy.deepcopy(memory_state_dict(model))


def remembered(model):
    """The memory, whether or not some optimiser has stepped since."""
    return {name: {**state, "stepped": None} for name, state in memory(model).items()}


def assert_same(a, b, **tolerance):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], **tolerance)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))
    else:
        assert a == b


# ---- 1: evaluation and state -----------------------------------------------------------------


@every_norm
def test_evaluation_is_batchnorm_and_checkpoints_are_its(spec):
    model = block(spec)
    train(model, sgd(model), range(5))
    assert isinstance(model[1], nn.BatchNorm2d)
    plain = nn.BatchNorm2d(4)
    assert model[1].state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model[1].state_dict(), strict=True)
    model.eval(), plain.eval()
    y = model[0](images(7))
    assert torch.equal(model[1](y), plain(y))
    again = build_norm(spec, 4)
    again.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(again.eval()(y), plain(y))
    assert not torch.equal(plain.running_mean, torch.zeros(4))


@every_norm
def test_memory_is_in_no_state_dict_parameter_or_buffer(spec):
    model = stack(spec)
    train(model, sgd(model), range(4))
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    norm = model[1]
    assert set(norm.state_dict()) == names
    assert {n for n, _ in norm.named_parameters()} | {n for n, _ in norm.named_buffers()} == names
    assert not list(norm.children()) and norm.extra_repr()
    assert [n for n, _ in model.named_modules()] == ["", "0", "1", "2", "3", "4"]


def of_groups(norm, mean, var):
    """Per-channel moments as the layer takes them, [C] each (numpy); and channels a group."""
    groups = getattr(norm, "groups_used", len(mean))
    mean, second = (v.reshape(groups, -1).mean(1) for v in (mean, var + mean**2))
    size = norm.num_features // groups
    return np.repeat(mean, size), np.repeat(second - mean**2, size), size


@every_norm
def test_running_statistics_average_mini_batches(spec):
    model = block(spec)
    norm, ys = model[1], []
    norm.momentum = 0.1
    for t in range(6):
        ys.append(model[0](images(t) + t / 4).detach().double().numpy())
        model(images(t) + t / 4)
        tick()
    assert_average_of(ys, norm)


def assert_average_of(ys, norm):
    """Its running statistics are those of mini-batches [N, C, H, W] (numpy), one after another."""
    pooled, plain = MixtureEMA(4), [np.zeros(4), np.ones(4)]
    for y in ys:
        mean, var, size = of_groups(norm, y.mean((0, 2, 3)), y.var((0, 2, 3)))
        count = size * y.size / 4
        pooled.update(mean, var, count)
        plain = [0.9 * plain[0] + 0.1 * mean, 0.9 * plain[1] + 0.1 * var * count / (count - 1)]
    expected = (pooled.first, pooled.var) if norm.ema == "pooled" else plain
    np.testing.assert_allclose(norm.running_mean, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.running_var, expected[1], rtol=1e-4)
    assert norm.num_batches_tracked == len(ys)


# ---- 2: degenerate settings ------------------------------------------------------------------

DEGENERATE = [  # GKN's are GroupNorm: test_gkn.py
    "CBN(window=1, burn_in=0)",
    "CBN(window=1, burn_in=0, compensation='none')",
    "CBN(window=4, burn_in=100)",
    "CBN(window=4, burn_in=0.5)",
    "MBN(window=1, burn_in=0)",
    "MBN(window=4, burn_in=100)",
    "MBN(window=4, burn_in=0.5)",
    "BGN(groups=4)",
    "BRN(r_max=1, d_max=0, burn_in=0, ramp=0)",
    "BRN(burn_in=100)",
    "BRN(burn_in=0.5)",
    "KN(gain=0)",
]


@pytest.mark.parametrize("spec", DEGENERATE)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.1},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-3},
        {"momentum": 0.1, "affine": False},
    ],
    ids=str,
)
def test_degenerate_settings_are_batchnorm(spec, options):
    """With ``ema='batch'``: outputs, gradients, buffers and evaluation over steps of training."""
    ours = stack(spec, ema="batch", **options).double()
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **options), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **options),
    ).double()  # fmt: skip
    plain.load_state_dict(ours.state_dict())
    resolve_burn_in(ours, 100)
    pair = [sgd(model) for model in (ours, plain)]
    for t in range(6):
        x, z = (images(t).double().requires_grad_() for _ in range(2))
        a, b = ours(x), plain(z)
        torch.testing.assert_close(a, b)
        for optimizer, loss in zip(pair, (loss_of(a), loss_of(b)), strict=True):
            optimizer.zero_grad()
            loss.backward()
        torch.testing.assert_close(x.grad, z.grad)
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for optimizer in pair:
            optimizer.step()
    assert_same(ours.state_dict(), plain.state_dict(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


# ---- 3: the gradient -------------------------------------------------------------------------


@every_norm
def test_gradcheck_with_the_memory_held_constant(spec):
    check_gradient(spec)


def check_gradient(spec):
    """Finite differences by the input and all parameters, those of earlier layers included."""
    model = stack(spec).double()
    for norm in norms(model):
        for parameter in norm.parameters():  # away from what they start as
            nn.init.uniform_(parameter, 0.5, 1.5)
    for t in range(4):
        model(images(t).double())
        tick()
    for norm in norms(model):
        if isinstance(norm, nn.BatchNorm2d):
            # only BRN looks at them: its r and d, constants for the gradient, are at their limits
            norm.running_mean.fill_(1e3)
            norm.running_var.fill_(1e-6)
    x = images(9, size=3).double().requires_grad_()
    # the forwards of one step read the same memory
    forward = lambda x, *parameters: model(x)  # noqa: E731
    assert torch.autograd.gradcheck(forward, [x, *model.parameters()], atol=1e-7)


# ---- 4: empty and odd input ------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 9, 9), (0, 3, 4, 7)])
def test_empty_input(spec, affine, shape):
    model = block(spec)
    if not affine:
        model[1] = type(model[1])(4, **{**model[1].options(), "affine": False})
    optimizer = sgd(model)
    train(model, optimizer, range(4))
    model(images(4))  # commits, and stages
    optimizer.zero_grad()
    before, state = memory(model), copy.deepcopy(model.state_dict())
    x = torch.zeros(shape, requires_grad=True)
    out = model(x)
    assert out.shape == (0, 4, *shape[2:]) and out.dtype == x.dtype
    out.sum().backward()
    for p in model.parameters():
        assert p.grad is not None and not p.grad.any()
    assert_same(memory(model), before)
    assert_same(model.state_dict(), state)
    assert model.eval()(x).shape == out.shape


@every_norm
def test_an_iteration_with_empty_input_only_is_none(spec):
    model = block(spec)
    optimizer = sgd(model)
    train(model, optimizer, range(3))
    model(images(3))
    steps = model[1].steps
    optimizer.step()
    for _ in range(3):
        model(torch.zeros(0, 3, 9, 9)).sum().backward()
        optimizer.step()
    model(images(4))
    assert model[1].steps == steps + 1  # of the forward before, once


@every_norm
def test_one_value_per_channel(spec):
    """A single RoI of 1x1: BatchNorm raises; here it counts, with variance 0."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), build_norm(spec, 4))
    for t in range(5):
        x = images(t, n=1, size=1).requires_grad_()
        out = model(x)
        loss_of(out).backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
        sgd(model).step()
    assert variances(model[1]).isfinite().all() and (variances(model[1]) >= 0).all()


@every_norm
@pytest.mark.parametrize("value", [0.0, 1000.0])
def test_constant_and_dead_channels(spec, value):
    """In the first norm and behind it, where KN and GKN have something to predict from."""
    model = stack(spec)
    optimizer = sgd(model, 1e-3)
    for t in range(5):
        x = images(t)
        with torch.no_grad():
            model[0].weight[2] = 0.0  # dead: its output is the bias
            model[3].weight[1] = 0.0
        out = model(x * 0 + value if t % 2 else x)
        optimizer.zero_grad()
        loss_of(out).backward()
        assert out.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert all((variances(norm) >= 0).all() for norm in norms(model))


@every_norm
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bad_batch_that_was_skipped_poisons_nothing_remembered(spec, bad, bias):
    """As a GradScaler does it: forward, backward, no step; another batch runs in its place."""
    model = block(spec, bias=bias)
    optimizer = sgd(model)
    train(model, optimizer, range(3))
    poisoned = images(3)
    poisoned[0, 0, 0, 0] = bad
    loss_of(model(poisoned)).backward()
    for t in range(4, 10):
        optimizer.zero_grad()
        out = model(images(t))
        assert out.isfinite().all()
        loss_of(out).backward()
        for name, p in model.named_parameters():
            assert p.grad.isfinite().all(), name
        optimizer.step()


@every_norm
def test_wrong_number_of_dimensions(spec):
    with pytest.raises(ValueError, match="4D"):
        build_norm(spec, 4)(torch.zeros(4, 4))


# ---- 5: memory -------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("when", ["after the step", "before the step"])
def test_memory_round_trip_is_bit_for_bit(spec, when):
    """Through torch.save and a load that allows plain data only, into a model built anew."""
    torch.manual_seed(0)
    model = stack(spec)
    optimizer = sgd(model)
    train(model, optimizer, range(5))
    if when == "before the step":
        optimizer.zero_grad()
        loss_of(model(images(5))).backward()
    file = io.BytesIO()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "norm_memory": memory_state_dict(model),
    }
    torch.save(saved, file)
    file.seek(0)
    grads = [p.grad.clone() for p in model.parameters()]

    def go_on(model, optimizer):
        if when == "before the step":
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        return train(model, optimizer, range(6, 12))

    ours = go_on(model, optimizer)
    # only now, or the steps above would count for the loaded model, too
    loaded = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    other = stack(spec)
    other_optimizer = sgd(other)
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    load_memory_state_dict(other, loaded["norm_memory"])
    theirs = go_on(other, other_optimizer)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert_same(memory(model), memory(other))
    assert_same(model.state_dict(), other.state_dict())


def test_memory_of_another_model_is_refused():
    model, other = stack(SPECS["CBN"]), block(SPECS["CBN"])
    with pytest.raises(ValueError, match="another model's.* 4$"):
        load_memory_state_dict(other, memory_state_dict(model))
    longer = stack("CBN(window=5, burn_in=0)")
    with pytest.raises(ValueError, match="^1: .*window=3.*5"):
        load_memory_state_dict(longer, memory_state_dict(model))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _saved(m),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_norm
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("in_mid_step", [False, True])
def test_copies_go_on_alike_and_apart(spec, how, in_mid_step):
    model = stack(spec)
    optimizer = sgd(model)
    train(model, optimizer, range(4))
    if in_mid_step:
        model[0](images(99))  # the norm holds an input that no copy should carry
    other = COPIES[how](model)
    for norm in norms(other):
        conv = getattr(norm, "conv", None)
        assert conv is None or any(conv is m for m in other.modules())
        assert norm.__dict__.get("_conv_input") is None
    assert_same(memory(model), memory(other))
    plain = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, other)]
    ours = train(model, plain[0], range(4, 8))
    theirs = train(other, plain[1], range(4, 8))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    before = remembered(model)
    train(other, plain[1], range(8, 12))  # apart from here
    assert_same(remembered(model), before)


@every_norm
def test_a_model_average_shares_nothing_with_its_source(spec):
    """The usual EMA of weights: a deepcopy, updated from the state dict, evaluated."""
    model = stack(spec)
    optimizer = sgd(model)
    train(model, optimizer, range(3))
    average = copy.deepcopy(model).eval()
    for t in range(3, 7):
        train(model, optimizer, [t])
        with torch.no_grad():
            for a, b in zip(
                average.state_dict().values(), model.state_dict().values(), strict=True
            ):
                a.copy_(0.9 * a + 0.1 * b if a.is_floating_point() else b)
    before = memory(model)
    average(images(20))
    assert_same(memory(model), before)
    assert not any(n.__dict__.get("_conv_input") is not None for n in norms(average))


@every_norm
def test_moving_dtype_and_half(spec):
    model = stack(spec)
    train(model, sgd(model), range(4))
    before = memory(model)
    double = copy.deepcopy(model).double()
    train_out = double(images(5).double())
    assert train_out.dtype == torch.float64
    torch.testing.assert_close(train_out.float(), model(images(5)), rtol=1e-3, atol=1e-4)
    model = copy.deepcopy(model).half()  # weights; statistics do not survive 16 bits
    rows = getattr(getattr(norms(model)[0], "memory", None), "rows", None)
    assert rows is None or rows.dtype == torch.float32
    out = model(images(5).half())
    assert out.dtype == torch.float16 and out.isfinite().all()
    assert model.eval()(images(5).half()).isfinite().all()
    assert before.keys() == memory(model).keys()


# ---- 6: precision and memory format ----------------------------------------------------------


@every_norm
def test_autocast(spec):
    torch.manual_seed(0)
    model = stack(spec)
    exact = copy.deepcopy(model)
    pair = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, exact)]
    for t in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(images(t))
        assert out.dtype == torch.bfloat16
        loss_of(out.float()).backward()
        reference = exact(images(t))
        loss_of(reference).backward()
        assert float((out - reference).detach().norm() / reference.detach().norm()) < 0.05
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    for norm, other in zip(norms(model), norms(exact), strict=True):
        assert variances(norm).dtype == torch.float32
        pending = norm.memory.pending if hasattr(norm, "memory") else {}
        for key, value in pending.items():
            assert (
                value.dtype == other.memory.pending[key].dtype
            )  # the statistics' float32, that is
            assert value.dtype == torch.float32, key
        torch.testing.assert_close(variances(norm), variances(other), rtol=0.05, atol=0.05)


@every_norm
@pytest.mark.parametrize("ratio", [10, 1000])
@pytest.mark.parametrize("channels_last", [False, True])
def test_off_centre_activations_keep_their_variance(spec, ratio, channels_last):
    """mean / std of the input 10 and 1000; a raw ``mean(x * x)`` is wrong by 18 % at 1000."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), build_norm(spec, 4))
    exact = copy.deepcopy(model).double()
    for t in range(4):
        torch.manual_seed(t)
        x = torch.randn(2, 3, 24, 24) + ratio
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        out = model(x)
        # the convolution rounds too: the reference normalises the same activations
        y = model[0](x).double()
        with torch.no_grad():
            exact[0].weight.copy_(model[0].weight)
        if isinstance(exact[1], nn.BatchNorm2d):
            getattr(norms(model)[0], "_take_conv_input", lambda: None)()
            if hasattr(exact[1], "_keep_input"):
                exact[1]._keep_input(exact[0], (x.double(),))
        reference = exact[1](y.detach())
        error = (out.double() - reference).detach().abs().max()
        assert float(error) < 1e-5 * ratio, "in standard deviations"
        std = out.double().flatten(2).std(2) / reference.flatten(2).std(2)
        assert float((std - 1).abs().max()) < 2e-3
        tick()


@every_norm
def test_float16_activations_of_ten_thousand(spec):
    for out, grad in outputs_at_ten_thousand(spec):
        assert out.dtype == torch.float16 and out.isfinite().all() and grad.isfinite().all()


@every_norm
def test_float16_activations_of_ten_thousand_behind_another_norm(spec):
    """Where KN and GKN have something to predict from."""
    model = stack(spec)
    model[0].half(), model[3].half()
    with torch.no_grad():
        model[3].weight *= 1e4
    for t in range(4):
        x = images(t).half().requires_grad_()
        y = model[3](model[2](model[1](model[0](x))))
        assert 5e3 < float(y.detach().float().abs().max()) < 6e4
        out = model[4](y)
        out.float().pow(2).mean().backward()
        assert out.dtype == torch.float16 and out.isfinite().all()
        grads = [x.grad, *(p.grad for p in model.parameters())]
        assert all(grad.isfinite().all() for grad in grads)
        assert variances(model[4]).isfinite().all()
        tick()


@every_norm
def test_the_output_of_a_new_layer_is_standardised(spec):
    for out, _ in outputs_at_ten_thousand(spec):
        assert 0.9 < float(out.float().std()) < 1.1


def outputs_at_ten_thousand(spec):
    """Outputs of a layer, and gradients at its input, for float16 values of that size."""
    norm = build_norm(spec, 4)
    conv = nn.Conv2d(3, 4, 1, bias=False)
    with torch.no_grad():  # keeps the size
        conv.weight.copy_(conv.weight.softmax(1))
    if getattr(norm, "needs_conv", False):
        norm.bind(conv)
    torch.manual_seed(0)
    for _ in range(4):
        x = (torch.randn(2, 3, 16, 16) * 100 + 1e4).half()
        y = conv(x.float()).detach().half().requires_grad_()
        if hasattr(norm, "_keep_input"):
            norm._keep_input(conv, (x,))
        out = norm(y)
        out.float().pow(2).mean().backward()
        yield out.detach(), y.grad
        tick()


@every_norm
def test_channels_last_stays_and_gives_the_same(spec):
    torch.manual_seed(0)
    model = stack(spec)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    pair = [sgd(m) for m in (model, other)]
    for t in range(5):
        x = images(t).requires_grad_()
        z = images(t).to(memory_format=torch.channels_last).requires_grad_()
        a, b = model(x), other(z)
        assert b.is_contiguous(memory_format=torch.channels_last) and not b.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        loss_of(a).backward()
        loss_of(b).backward()
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-3, atol=1e-5)
        assert z.grad.is_contiguous(memory_format=torch.channels_last)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()


# ---- 7: the clock ----------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_forwards_pool_to_one_of_the_whole_batch(spec, parts):
    """Equal sizes: the entry, its derivatives included, is that of the concatenated batch."""
    torch.manual_seed(0)
    model = block(spec).double()
    whole = copy.deepcopy(model)
    for t in range(5):
        xs = [images(10 * t + k).double() + k for k in range(parts)]
        outs = [model(x) for x in xs]
        again = model(xs[0])  # read-only within the step: the same, whatever was staged since
        assert torch.equal(again, outs[0])
        load_memory_state_dict(model, _without_last(model, xs))
        reference = whole(torch.cat(xs))
        assert reference.shape[0] == 2 * parts
        tick()
        torch.manual_seed(t)
        delta = 0.1 * torch.randn_like(model[0].weight)
        with torch.no_grad():
            model[0].weight += delta
            whole[0].weight += delta
            model[0].bias += delta.mean()
            whole[0].bias += delta.mean()
    a, b = memory(model).get("1"), memory(whole).get("1")
    if a is not None:
        assert a["steps"] == b["steps"] and a["forwards"] == parts and b["forwards"] == 1
        of_entries = ("pending", "rows", "stacked", *([] if "BRN" in spec else ["older"]))
        for key in of_entries:  # BRN's older are running statistics, which each forward moves
            assert_same(a[key], b[key], rtol=1e-9, atol=1e-11)


def _without_last(model, xs):
    """The memory as it is without the forward that looked whether the memory is read-only."""
    norm, state = model[1], memory(model)
    if not state:
        return {}
    fresh = copy.deepcopy(model)
    fresh[1].memory.pending, fresh[1].memory.forwards = {}, 0
    for x in xs:
        fresh(x)
    assert state["1"]["forwards"] == norm.memory.forwards == len(xs) + 1
    return memory(fresh)


@every_norm
def test_forwards_without_gradient_never_write(spec):
    model = stack(spec)
    optimizer = sgd(model)
    train(model, optimizer, range(5))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for t in range(3):
            out = model(images(50 + t))
    assert out.isfinite().all()
    # what follows is as if they had not been (running statistics excepted)
    ours, theirs = (
        train(m, torch.optim.SGD(m.parameters(), lr=0.05), range(5, 9)) for m in (model, reference)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert_same(memory(model), memory(reference))


@every_norm
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forwards_without_gradient_may_come_first_after_a_step(spec, mode):
    """They commit what is due; later iterations must be able to write to it."""
    model = stack(spec)
    reference = copy.deepcopy(model)
    for m in (model, reference):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        for t in range(6):
            train(m, optimizer, [t])
            if m is model:
                with mode():
                    m(images(70 + t))
        m(images(80))
    assert_same(remembered(model), remembered(reference))


@every_norm
def test_precise_bn_computes_population_statistics(spec):
    """fvcore's own, against the pooled moments of all images in numpy."""
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    model = nn.Sequential(*block(spec))
    train(model, sgd(model), range(5))
    before, momentum = memory(model), model[1].momentum
    batches = [images(t) + t / 10 for t in range(30)]
    precise_bn.update_bn_stats(model, batches, len(batches))
    y = model[0](torch.cat(batches)).detach().double().numpy()
    norm = model[1]
    mean, population, size = of_groups(norm, y.mean((0, 2, 3)), y.var((0, 2, 3)))
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_var, population, rtol=0.01)
    if size == 1:  # fvcore averages unbiased variances, with or without those between batches
        plain = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(4))
        plain[0]._forward_pre_hooks.clear()
        precise_bn.update_bn_stats(plain, batches, len(batches))
        np.testing.assert_allclose(norm.running_var, plain[1].running_var, rtol=1e-4)
    assert norm.momentum == momentum
    after = memory(model)
    if after:  # the last iteration is now committed
        assert after["1"]["steps"] == before["1"]["steps"] + 1 and after["1"]["pending"] == {}


@every_norm
def test_statistics_found_by_channel_become_the_layers(spec):
    norm = build_norm(spec, 4)
    y = torch.randn(6, 4, 9, 9, dtype=torch.float64) * torch.rand(1, 4, 1, 1) + torch.rand(4, 1, 1)
    norm.set_statistics(y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0))
    mean, var, _ = of_groups(norm, *(v.numpy() for v in (y.mean((0, 2, 3)), y.var((0, 2, 3)))))
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.running_var, var, rtol=0.01)


@every_norm
def test_momentum_of_one_keeps_the_batch_itself_in_a_forward_without_gradient(spec):
    model = block(spec)
    train(model, sgd(model), range(4))
    norm = model[1]
    norm.momentum = 1.0
    with torch.no_grad():
        out = model(images(8))
        y = model[0](images(8)).double()
    mean, var, size = of_groups(norm, y.mean((0, 2, 3)).numpy(), y.var((0, 2, 3)).numpy())
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.running_var, var, rtol=1e-5 if size == 1 else 0.01)
    # without anything remembered: normalised by this batch alone
    x_hat = (out - norm.bias.view(-1, 1, 1)) / norm.weight.view(-1, 1, 1)
    expected = (y - torch.from_numpy(mean).view(-1, 1, 1)) / torch.from_numpy(var).view(
        -1, 1, 1
    ).sqrt()
    torch.testing.assert_close(x_hat.detach().double(), expected, rtol=0, atol=0.03)


@every_norm
def test_update_bn_of_torch_gives_the_mean_over_batches(spec):
    model = block(spec)
    train(model, sgd(model), range(4))
    norm = model[1]
    batches = [images(t) for t in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)  # sets the momentum to None meanwhile
    with torch.no_grad():
        ys = [model[0](x) for x in batches]
    expected = torch.cat(ys).double().mean((0, 2, 3)).numpy()
    expected, _, _ = of_groups(norm, expected, expected)
    np.testing.assert_allclose(norm.running_mean, expected, rtol=1e-5, atol=1e-6)


@every_norm
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_belongs_to_the_iteration_of_its_forward(spec, reentrant):
    """Though an optimiser has stepped since: another network's, between forward and backward."""
    torch.manual_seed(0)
    model = stack(spec)
    find_chain(model, images(0))
    other = copy.deepcopy(model)
    find_chain(other, images(0))
    for t in range(6):
        x, z = (images(t).requires_grad_() for _ in range(2))
        losses = loss_of(model(x)), loss_of(checkpoint(other, z, use_reentrant=reentrant))
        tick()
        for loss in losses:
            loss.backward()
        assert_same_gradients([x, *model.parameters()], [z, *other.parameters()])
    assert [getattr(m, "steps", 0) for m in norms(model)] == [
        getattr(m, "steps", 0) for m in norms(other)
    ]


@every_norm
@pytest.mark.parametrize("forwards", [1, 2])
def test_activation_checkpointing_changes_nothing(spec, forwards):
    pair = trained_with_checkpoints_and_without(spec, forwards, reentrant=False)
    assert_same(*(model.state_dict() for model in pair))


@every_norm
@pytest.mark.parametrize("forwards", [1, 2])
def test_reentrant_activation_checkpointing_changes_nothing_in_training(spec, forwards):
    trained_with_checkpoints_and_without(spec, forwards, reentrant=True)


@pytest.mark.parametrize(
    "spec", ["CBN(window=3, burn_in=0, momentum=1.0)", "MBN(burn_in=0, momentum=None)"]
)
def test_a_momentum_of_their_own_is_not_taken_for_precise_bn(spec):
    """Which sets it to 1, or None, before its forwards without gradient."""
    trained_with_checkpoints_and_without(spec, forwards=1, reentrant=True)


@every_norm
@pytest.mark.parametrize("forwards", [1, 2])
def test_reentrant_activation_checkpointing_changes_no_running_statistics(spec, forwards):
    pair = trained_with_checkpoints_and_without(spec, forwards, reentrant=True)
    assert_same(*(model.state_dict() for model in pair))


@every_norm
def test_checkpointed_blocks_change_nothing(spec):
    check_checkpointed_blocks(spec, reentrant=False)


@every_norm
def test_reentrant_checkpoints_of_blocks_change_nothing(spec):
    check_checkpointed_blocks(spec, reentrant=True)


def check_checkpointed_blocks(spec, reentrant):
    """Mini-batches of several sizes, all forwards before the backward passes."""
    torch.manual_seed(0)
    model = stack(spec)
    find_chain(model, images(0))
    other = copy.deepcopy(model)
    find_chain(other, images(0))
    pair = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, other)]
    for t in range(4):
        xs, zs = ([images(9 * t + k, n=1 + k).requires_grad_() for k in range(3)] for _ in range(2))
        ours, theirs = [model(x) for x in xs], [by_blocks(other, z, reentrant) for z in zs]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
            loss_of(a).backward()
            loss_of(b).backward()
        assert_same_gradients([*xs, *model.parameters()], [*zs, *other.parameters()])
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()


def by_blocks(model, x, reentrant):
    """A :func:`stack` in two checkpoints."""
    for part in (model[:3], model[3:]):
        x = checkpoint(part, x, use_reentrant=reentrant)
    return x


def assert_same_gradients(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def trained_with_checkpoints_and_without(spec, forwards, reentrant):
    """Two models, each trained in one of the two ways, having seen that they trained alike."""
    torch.manual_seed(0)
    model = stack(spec)
    other = copy.deepcopy(model)
    pair = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, other)]
    for t in range(6):
        for part in range(forwards):
            seed = 10 * t + part
            x, z = (images(seed).requires_grad_() for _ in range(2))
            a, b = model(x), checkpoint(other, z, use_reentrant=reentrant)
            assert torch.equal(a, b)
            loss_of(a).backward()
            loss_of(b).backward()
            assert torch.equal(x.grad, z.grad)
        assert_same(memory(model), memory(other))
        for optimizer, m in zip(pair, (model, other), strict=True):
            for p in m.parameters():
                assert p.grad is not None
            optimizer.step()
            optimizer.zero_grad()
    for norm, twin in zip(norms(model), norms(other), strict=True):
        if isinstance(norm, nn.GroupNorm):
            continue
        if hasattr(norm, "memory"):
            assert norm.memory.forwards == twin.memory.forwards == forwards
        assert twin.__dict__.get("_conv_input") is None
        assert norm.num_batches_tracked == twin.num_batches_tracked
    return model, other


@every_norm
def test_checkpointed_forwards_whose_backward_comes_later_are_staged_once_each(spec):
    model = block(spec)
    xs = [images(t).requires_grad_() for t in range(3)]
    sum(checkpoint(model, x, use_reentrant=True).pow(3).mean() for x in xs).backward()
    assert model[1].memory.forwards == 3 and model[1].num_batches_tracked == 3


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.01, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@every_norm
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_step_of_any_optimiser_is_one_iteration(spec, kind):
    model = stack(spec)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    train(model, optimizer, range(4))
    model(images(4))
    assert [n.steps for n in norms(model)] == [4, 4]


@every_norm
def test_two_optimisers_stepping_together_are_one_iteration(spec):
    model = stack(spec)
    first = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.01)
    second = torch.optim.Adam([p for p in model.parameters() if p.dim() == 1], lr=0.01)
    for t in range(5):
        loss_of(model(images(t))).backward()
        first.step()
        second.step()
    model(images(9))
    assert norms(model)[0].steps == 5


@every_norm
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_no_iteration(spec, fused):
    """GradScaler on CPU: an overflow skips the step, and the next batch belongs to the same one. A
    fused optimiser's step is called all the same, and skips by itself."""
    model = block(spec)
    optimizer = sgd(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for t in range(6):
        optimizer.zero_grad()
        loss = loss_of(model(images(t)))
        if t in (2, 3):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    model(images(9))
    assert model[1].steps == 4


@every_norm
def test_evaluation_does_not_disturb_training(spec):
    model = stack(spec)
    find_chain(model, images(0))
    reference = copy.deepcopy(model)
    pair = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, reference)]
    for t in range(5):
        model.eval()(images(90 + t))
        a = train(model.train(), pair[0], [t])
        b = train(reference, pair[1], [t])
        assert torch.equal(a[0], b[0])
    assert_same(memory(model), memory(reference))


@every_norm
def test_random_state_is_untouched(spec):
    model = stack(spec)
    optimizer = sgd(model)
    state, python = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(model, optimizer, range(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == python).all()


@every_norm
def test_two_runs_are_the_same(spec):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = stack(spec)
        runs.append(train(model, sgd(model), range(6)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- 8 and what concerns a whole model -------------------------------------------------------


@every_norm
def test_without_process_group_syncing_does_nothing(spec):
    model = stack(spec)
    train(model, sgd(model), range(3))
    before = copy.deepcopy(model.state_dict())
    sync_running_stats(model)
    assert_same(model.state_dict(), before)


def test_diagnostics():
    model = stack(SPECS["CBN"])
    assert norm_diagnostics(model) == {} and norm_diagnostics(nn.Conv2d(1, 1, 1)) == {}
    train(model, sgd(model), range(4))
    values = norm_diagnostics(model)
    assert {"norm/clamped", "norm/compensation_var"} < values.keys()
    assert values["norm/compensation_var_worst"] >= values["norm/compensation_var"] > 0
    assert all(isinstance(v, float) and v >= 0 for v in values.values())
    assert values["norm/compensation_mean"] > 0


@every_norm
def test_nothing_is_warned_about(spec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = stack(spec)
        train(model, sgd(model), range(3))
        model.eval()(images(1))


@pytest.mark.parametrize(
    "saved, loaded, what",
    [
        (("CBN(window=3, burn_in=0)", 6), ("CBN(window=4, burn_in=0)", 6), "window"),
        (("CBN(window=3, burn_in=0)", 6), ("CBN(window=1)", 6), "window"),
        (("CBN(window=3, burn_in=0)", 6), ("CBN(window=3, compensation='none')", 6), "none"),
        (("CBN(window=3, burn_in=0)", 6), ("CBN(window=3, positions=None)", 6), "positions=None"),
        (("CBN(window=3, burn_in=0)", 6), ("CBN(window=3)", 8), "6 channels"),
    ],
)
def test_memory_of_another_layer_is_refused(saved, loaded, what):
    models = [
        nn.Sequential(nn.Conv2d(3, width, 3), build_norm(spec, width))
        for spec, width in (saved, loaded)
    ]
    optimizer = torch.optim.SGD(models[0].parameters(), 0.1)
    for _ in range(2):
        models[0](torch.randn(2, 3, 6, 6)).sum().backward()
        optimizer.step()
    with pytest.raises(ValueError, match=what):
        models[1][1].load_memory_state_dict(models[0][1].memory_state_dict())
    models[1](torch.randn(2, 3, 6, 6)).sum().backward()  # untouched


# ---- beside other tools of torch -------------------------------------------------------------


@pytest.mark.parametrize("key", ["CBN", "CBN all positions", "MBN", "BRN", "BGN", "KN", "GKN"])
def test_training_compiled_is_training(key):
    """Many steps: a graph that knew the number of steps would be compiled anew at each, and given
    up after eight."""
    torch.manual_seed(0)
    model = stack(SPECS[key])
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(other, backend="aot_eager")
    find_chain(compiled, images(0))
    ours = train(model, sgd(model), range(12))
    theirs = train(other, sgd(other), range(12), forward=compiled)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same(remembered(model), remembered(other), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 12


@every_norm
def test_full_backward_hooks_change_nothing(spec):
    """Those of Grad-CAM and of loggers of gradients put a node of their own into the graph."""
    torch.manual_seed(0)
    model = stack(spec)
    other = copy.deepcopy(model)
    for module in other:
        module.register_full_backward_hook(lambda *_: None)
    ours, theirs = (train(m, sgd(m), range(5)) for m in (model, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every_norm
def test_data_parallel_is_refused(spec):
    with pytest.raises(RuntimeError, match="use nn.parallel.DistributedDataParallel"):
        build_norm(spec, 4)._replicate_for_data_parallel()


@every_norm
def test_reset_parameters_starts_anew(spec):
    torch.manual_seed(0)
    model = stack(spec)
    untouched = copy.deepcopy(model)
    train(model, sgd(model), range(5))
    model.load_state_dict(untouched.state_dict())
    for norm in norms(model):
        norm.reset_parameters()
    ours, theirs = (train(m, sgd(m), range(4)) for m in (model, untouched))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("spec", ["CBN(window=3)", "MBN(window=3)"])
def test_a_schedule_made_longer_is_in_burn_in_again(spec):
    """What is remembered by then would not be refreshed until burn-in has ended once more."""
    torch.manual_seed(0)
    model = stack(spec)
    plain = copy.deepcopy(model)
    for m, length in ((model, 9), (plain, 10**6)):
        resolve_burn_in(m, length)
    optimizer, other = sgd(model), sgd(plain)
    train(model, optimizer, range(9))
    assert len(model[1].memory) == 2
    resolve_burn_in(model, 18)
    plain.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours, theirs = train(model, optimizer, range(9, 12)), train(plain, other, range(9, 12))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len(model[1].memory) == 0
    ours, theirs = train(model, optimizer, range(12, 15)), train(plain, other, range(12, 15))
    assert not torch.equal(ours[-1], theirs[-1])
