"""Who precedes whom: the rules, one by one, and what they find in whole detectors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cbn_det.norms import find_chain, find_chain_at_call, format_chain, kn_chain
from cbn_det.norms.kn import KN2d
from cbn_det.norms.prediction import evaluated
from cbn_det.norms.spec import build_norm


def conv(cin=4, cout=4, **kwargs):
    return nn.Conv2d(cin, cout, 3, padding=1, **kwargs)


class Between(nn.Module):
    """Two norms, ``a`` and ``b``, in parallel, then something, then a convolution and a norm."""

    def __init__(self, between, width=4, norm="KN(gain=0.5)"):
        super().__init__()
        self.conv_a, self.a = conv(3), build_norm(norm, 4)
        self.conv_b, self.b = conv(3), build_norm(norm, 4)
        self.conv_free, self.scale = conv(), nn.Parameter(torch.ones(4))
        self.number, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm2d(4)
        self.conv_c, self.c = conv(width), build_norm(norm, 4)
        self.between = between

    def forward(self, x):
        a, b = self.a(self.conv_a(x)), self.b(self.conv_b(x))
        return self.c(self.conv_c(self.between(self, a, b)))


def rois(x):
    boxes = [torch.tensor([[0.0, 0.0, 6.0, 6.0]])] * len(x)
    return pytest.importorskip("torchvision").ops.roi_align(x, boxes, (4, 4))


def of_levels(*levels):
    out = torch.zeros(2 * len(levels), 4, 4, 4)
    for k, level in enumerate(levels):
        out.index_put_((torch.arange(2 * k, 2 * k + 2),), rois(level))
    return out


def concatenated(m, a, b):
    return torch.cat([F.relu(a), b], 1)


def half_of(x):
    return torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)


def up(x, mode="nearest"):
    return F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0, mode=mode)


RULES = {
    "nothing": (lambda m, a, b: a, "a"),
    "relu": (lambda m, a, b: F.relu(a), "relu(a)"),
    "in place": (lambda m, a, b: F.relu_(a), "relu(a)"),
    "leaky relu": (lambda m, a, b: F.leaky_relu(a, 0.1), "leakyrelu(a)"),
    "silu": (lambda m, a, b: F.silu(a, inplace=True), "silu(a)"),
    "gelu": (lambda m, a, b: F.gelu(a, approximate="tanh"), "gelu(a)"),
    "relu6": (lambda m, a, b: F.relu6(a), "hardtanh(a)"),
    "elu": (lambda m, a, b: F.elu(a, 0.5), "elu(a)"),
    "hardswish and mish": (lambda m, a, b: F.hardswish(F.mish(a)), "hardswish(mish(a))"),
    "a parameter for all": (lambda m, a, b: a * m.number, "a"),
    "max pool": (lambda m, a, b: F.max_pool2d(F.relu(a), 3, 2, 1), "relu(a)"),
    "average pool": (lambda m, a, b: F.avg_pool2d(a, 2), "a"),
    "up": (lambda m, a, b: up(a) + b, "a + b"),
    "up, bilinear": (lambda m, a, b: up(a, "bilinear") + b, "a + b"),
    "padding": (lambda m, a, b: F.pad(F.relu(a), (0, 1, 0, 1)), "relu(a)"),
    "residual": (lambda m, a, b: F.relu(a + F.relu(b)), "relu(a + relu(b))"),
    "residual in place": (lambda m, a, b: F.relu_(a.add_(b)), "relu(a + b)"),
    "dropout": (lambda m, a, b: F.dropout(F.relu(a), 0.1), "relu(a)"),
    "dropout as on GPU": (lambda m, a, b: torch.native_dropout(F.relu(a), 0.1, True)[0], "relu(a)"),
    "drop path": (lambda m, a, b: a + b * (torch.rand(2, 1, 1, 1).round() * 2), "a + b"),
    "drop path, nothing dropped": (lambda m, a, b: a + b * torch.full((2, 1, 1, 1), 1.25), "a + b"),
    "drop path, all dropped": (lambda m, a, b: a + b * torch.zeros(2, 1, 1, 1), "a + b"),
    "drop path in two steps": (lambda m, a, b: a + b.div(0.8) * half_of(b), "a + b"),
    "masked, then scaled": (lambda m, a, b: a * half_of(a) * 2.0, "a"),
    "unused parameters kept": (lambda m, a, b: a + b.sum() * 0.0, "a"),
    "dropout, scaled": (lambda m, a, b: 3 * F.dropout(a, 0.1), "3 (a)"),
    "times a number": (lambda m, a, b: F.relu(a) * 3, "3 (relu(a))"),
    "a number, times": (lambda m, a, b: torch.tensor(0.5) * a, "0.5 (a)"),
    "times a number, in place": (lambda m, a, b: F.relu(a.mul_(0.5)), "relu(0.5 (a))"),
    "divided by a number": (lambda m, a, b: a / 4 / torch.tensor([2.0]), "0.5 (0.25 (a))"),
    "divided, in place": (lambda m, a, b: a.div_(4), "0.25 (a)"),
    "scaled residual": (lambda m, a, b: F.relu(a + 0.2 * b), "relu(a + 0.2 (b))"),
    "cast": (lambda m, a, b: F.relu(a.double()).float(), "relu(a)"),
    "clone": (lambda m, a, b: a.contiguous(memory_format=torch.channels_last).clone(), "a"),
    "conv": (lambda m, a, b: F.relu(m.conv_free(F.relu(a))), "relu(conv_free(relu(a)))"),
    "scale": (lambda m, a, b: a * m.scale.view(1, -1, 1, 1), "a"),
    "shift": (lambda m, a, b: m.scale.view(1, -1, 1, 1) + a, "a"),
    "batchnorm": (lambda m, a, b: F.relu(m.bn(m.conv_free(a))), "relu(bn)"),
    "roi": (lambda m, a, b: rois(a), "a"),
    "levels": (lambda m, a, b: of_levels(a, F.relu(b)), "mixture(a, relu(b))"),
}


class Relu(torch.autograd.Function):
    """By that name, and another function."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def endless(a, b):
    """Each of 40 sums takes the one before twice: 2^40 ways to ``a``."""
    for _ in range(40):
        a = a + F.relu(a)
    return a


CHANNELS = torch.tensor([0.0, 2.0, 0.0, 2.0]).view(1, -1, 1, 1)
ENDS = {
    "sigmoid": (lambda m, a, b: torch.sigmoid(a), "Sigmoid"),
    "product": (lambda m, a, b: a * b, "product"),
    "quotient": (lambda m, a, b: a / (b.exp() + 1), "quotient"),
    "number by activations": (lambda m, a, b: 1 / (a.exp() + 1), "Reciprocal"),
    "channel mask": (lambda m, a, b: a * (torch.arange(4) < 2).view(1, -1, 1, 1), "no mask"),
    "channel mask, doubled": (lambda m, a, b: a * CHANNELS, "no mask"),
    "mask of positions": (lambda m, a, b: a * (torch.arange(8) < 6), "no mask"),
    "mask of images": (lambda m, a, b: a * half_of(a), "no mask"),
    "weights of images": (lambda m, a, b: a * (1 + torch.rand(2, 1, 1, 1)), "no mask"),
    "zero": (lambda m, a, b: a + b * 0.0, "no mask"),
    "divided by images": (lambda m, a, b: a / torch.full((2, 1, 1, 1), 1.25), "no mask"),
    "a mask that was changed": (lambda m, a, b: a * (mask := half_of(a)) + mask.add_(1), "changed"),
    "difference": (lambda m, a, b: a - b, "Sub"),
    "constant": (lambda m, a, b: a + torch.ones(4, 1, 1), "input, or frozen"),
    "a number that is no activation": (lambda m, a, b: a + b.sum() * 2.0, "no rule for Sum"),
    "its own Function": (lambda m, a, b: Relu.apply(a), "no rule for ReluBackward"),
    "its own subgraph": (lambda m, a, b: endless(a, b), "operations"),
    "detached": (lambda m, a, b: a.detach(), "input, or frozen"),
    "more channels": (lambda m, a, b: F.pad(a[:, :3], (0, 0, 0, 0, 0, 1)), "ConstantPadNd"),
    "shuffled": (lambda m, a, b: a.flip(1), "Flip"),
    "one branch unknown": (lambda m, a, b: a + torch.tanh(b), "Tanh"),
    "transposed": (
        lambda m, a, b: F.conv_transpose2d(a, m.conv_free.weight, padding=1),
        "Convolution",
    ),
    "frozen conv": (lambda m, a, b: F.conv2d(a, torch.ones(4, 4, 1, 1)), "frozen or computed"),
    "rows of the batch": (lambda m, a, b: torch.cat([a, b]), "Cat"),
    "new activations": (
        lambda m, a, b: (a + 0).index_put_((torch.tensor([0]),), b[:1]),
        "IndexPut|AddBackward|Slice|input",
    ),
}


def follows(model, name="c"):
    return {row.name: row for row in kn_chain(model)}[name]


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    between, expected = RULES[rule]
    model = Between(between)
    out = model(torch.randn(2, 3, 8, 8))
    row = follows(model)
    assert row.follows == expected
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert follows(model, "a").follows == "- (a model input, or frozen)"
    assert f"c  <-  {expected}" in format_chain(kn_chain(model))


def test_concatenation():
    model = Between(concatenated, width=8)
    model(torch.randn(2, 3, 8, 8))
    row = follows(model)
    assert row.follows == "concat(relu(a), b)"


@pytest.mark.parametrize("what", ENDS)
def test_everything_else_ends_the_chain_and_the_layer_is_batchnorm(what):
    between, reason = ENDS[what]
    model = Between(between)
    out = model(torch.randn(2, 3, 8, 8))
    row = follows(model)
    assert row.follows.startswith("- (")
    assert any(part in row.follows for part in reason.split("|")), row.follows
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(4), rtol=1e-3, atol=0)


def test_values_follow_the_rules():
    """Numbers, by hand: what each rule makes of N(1, 4) and N(-1, 1)."""
    from cbn_det.norms.propagation import rectified

    def rectified_floats(mean, var):
        return [float(t) for t in rectified(torch.tensor(mean), torch.tensor(var))]

    pairs = {"a": (1.0, 4.0), "b": (-1.0, 1.0)}
    m, v = rectified_floats(1.0, 4.0)
    n, w = rectified_floats(-1.0, 1.0)
    mix = (1.0 + n) / 2
    expected = {
        "nothing": (1.0, 4.0),
        "relu": (m, v),
        "max pool": (m, v),
        "average pool": (1.0, 4.0),
        "up": (0.0, 5.0),
        "up, bilinear": (0.0, 5.0),
        "dropout": (m, v),
        "dropout as on GPU": (m, v),
        "drop path": (0.0, 5.0),
        "scale": (3.0, 36.0),
        "shift": (4.0, 4.0),
        "leaky relu": (0.1 + 0.9 * m, 0.04 + 0.81 * v + 0.18 * 4.0 * 0.6914625),
        "a parameter for all": (3.0, 36.0),
        "times a number": (3 * m, 9 * v),
        "divided by a number": (0.125, 0.0625),
        "scaled residual": rectified_floats(0.8, 4.04),
        "levels": (mix, ((4.0 + (1.0 - mix) ** 2) + (w + (n - mix) ** 2)) / 2),
    }
    models = {rule: Between(RULES[rule][0]) for rule in expected}
    models["concatenation"] = Between(concatenated, width=8)
    expected["concatenation"] = ([m] * 4 + [-1.0] * 4, [v] * 4 + [1.0] * 4)
    for rule, model in models.items():
        with torch.no_grad():
            model.scale.fill_(3.0), model.number.fill_(3.0)
            for name, (beta, variance) in pairs.items():
                getattr(model, name).bias.fill_(beta)
                getattr(model, name).weight.fill_(variance**0.5)
        model(torch.randn(2, 3, 8, 8))
        found = evaluated(model.c.chain.source, torch.empty(0))
        for got, numbers in zip(found, expected[rule], strict=True):
            channels = torch.tensor(numbers).expand(model.conv_c.in_channels)
            torch.testing.assert_close(got, channels, msg=rule)


@pytest.mark.parametrize("kept, expected", [(1.25, "a"), (0.0, "a"), (0.5, "0.5 (a)")])
def test_drop_path_of_a_single_sample(kept, expected):
    model = Between(lambda m, a, b: a * torch.full((1, 1, 1, 1), kept))
    model(torch.randn(1, 3, 8, 8))
    assert follows(model).follows == expected


def test_looking_at_a_mask_does_not_run_a_checkpointed_segment_again():
    runs = []
    model = Between(lambda m, a, b: runs.append(0) or a * (2.0 * half_of(a)))
    out = checkpoint(model, torch.randn(2, 3, 8, 8), use_reentrant=False)
    assert len(runs) == 1 and "checkpointed" in follows(model).follows
    out.sum().backward()
    assert len(runs) == 2
    model = Between(lambda m, a, b: a * 3)
    checkpoint(model, torch.randn(2, 3, 8, 8), use_reentrant=False)
    assert follows(model).follows == "3 (a)"


class Pair(nn.Module):
    """Two inputs and two outputs."""

    def forward(self, a, b):
        return F.relu(a), b * 2


def test_backward_hooks_do_not_stand_in_the_way():
    """Full ones, on all modules: of Grad-CAM, say, or a logger of gradients."""
    model = Between(None)
    model.relu, model.pair = nn.ReLU(), Pair()

    def between(m, a, b):
        a, b = m.pair(m.relu(a), m.conv_free(b))
        return a + m.pair(a, b)[1]

    model.between = between
    seen = []
    for module in list(model.modules())[1:]:
        module.register_full_backward_hook(lambda *_: seen.append(0))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert follows(model).follows == "relu(relu(a)) + 2 (2 (conv_free(b)))"
    assert len(seen) == 10  # the pair twice, bn takes no part


def test_a_norm_without_a_convolution_before_it():
    model = nn.Sequential(conv(3), KN2d(4), nn.ReLU(), KN2d(4))
    model(torch.randn(2, 3, 8, 8))
    assert follows(model, "3").follows == "- (fed by Relu, not by a convolution)"


def test_find_chain_follows_what_is_frozen_like_the_rest():
    model = nn.Sequential(conv(3), KN2d(4), nn.ReLU(), conv(), KN2d(4), nn.ReLU(), conv(), KN2d(4))
    for p in model[:5].parameters():
        p.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    assert follows(model, "4").follows == "- (its convolution is frozen)"
    find_chain(model, x)
    for _ in range(2):
        model(x)
        assert follows(model, "1").follows == "- (a model input, or frozen)"
        assert follows(model, "4").follows == "relu(1)" and follows(model, "7").follows == "relu(4)"
        model.requires_grad_(True)


def test_replacing_a_module_has_layers_look_anew():
    model = nn.Sequential(conv(3), KN2d(4), nn.ReLU(), conv(), KN2d(4), nn.ReLU(), conv(), KN2d(4))
    model(torch.randn(2, 3, 8, 8))
    assert follows(model, "7").follows == "relu(4)"
    model[4] = KN2d(4)
    assert follows(model, "7").follows == "?"
    model(torch.randn(2, 3, 8, 8))
    assert model[7].chain.source.source.layer is model[4]
    model[4] = nn.Identity()
    model(torch.randn(2, 3, 8, 8))
    assert follows(model, "7").follows == "relu(3(relu(1)))"
    model[6] = conv()
    model(torch.randn(2, 3, 8, 8))
    assert model[7].chain.weight.now() is model[6].weight


@pytest.mark.parametrize("how", ["load_state_dict", "attributes"])
def test_assigned_parameters_are_followed(how):
    model = Between(RULES["conv"][0])
    model(torch.randn(2, 3, 8, 8))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if how == "load_state_dict":
        model.load_state_dict(state, assign=True)
    else:
        for conv in (model.conv_c, model.conv_free):
            conv.weight, conv.bias = (nn.Parameter(p.detach() * 3) for p in conv.parameters())
    model(torch.randn(2, 3, 8, 8))
    held = [held.now() for part in model.c.chain.walk() for held in part.parameters]
    for conv in (model.conv_c, model.conv_free):
        for parameter in conv.parameters():
            assert any(value is parameter for value in held)


def test_a_part_that_was_copied_out_looks_anew():
    whole = nn.Sequential(conv(3), KN2d(4), nn.ReLU(), nn.Sequential(conv(), KN2d(4)))
    whole(torch.randn(2, 3, 8, 8))
    part = copy.deepcopy(whole[3])
    part(torch.randn(2, 4, 8, 8))
    assert kn_chain(part)[0].follows == "- (a model input, or frozen)"


def test_before_the_first_forward_nothing_is_known():
    model = Between(RULES["relu"][0])
    assert {row.follows for row in kn_chain(model)} == {"?"} and kn_chain(nn.ReLU()) == []
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    assert follows(model).follows == "?"


def test_other_norms_of_ours_are_sources():
    model = nn.Sequential(
        conv(3), build_norm("CBN(window=2, burn_in=0)", 4), nn.ReLU(), conv(), KN2d(4, gain=0.5)
    )
    model(torch.randn(2, 3, 8, 8))
    assert follows(model, "4").follows == "relu(1)"


def resnet18_rows(stem: str, names: dict[str, str]) -> dict[str, str]:
    """What a person would write down for a ResNet of two blocks a stage, in a model's own names."""
    rows = {names["stem"]: stem}
    block = f"relu({names['stem']})"  # the max pooling keeps the moments
    for stage in range(4):
        for index in range(2):
            first, second, short = (
                names[key].format(stage=stage, index=index) for key in ("first", "second", "short")
            )
            projected = index == 0 and (stage > 0 or names.get("first stage projects"))
            rows[first] = block
            rows[second] = f"relu({first})"
            if projected:
                rows[short] = block
            block = f"relu({second} + {short if projected else block})"
        rows[f"after {stage}"] = block
    return rows


def test_torchvision_resnet():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(norm_layer=lambda c: KN2d(c, gain=0.5))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    names = {
        "stem": "bn1",
        "first": "layer{stage}.{index}.bn1",
        "second": "layer{stage}.{index}.bn2",
        "short": "layer{stage}.{index}.downsample.1",
    }
    expected = resnet18_rows("- (a model input, or frozen)", names)
    for number in (3, 2, 1, 0):  # torchvision counts stages from 1
        expected = {
            key.replace(f"layer{number}.", f"layer{number + 1}."): value.replace(
                f"layer{number}.", f"layer{number + 1}."
            )
            for key, value in expected.items()
        }
    found = {row.name: row.follows for row in kn_chain(model)}
    assert found == {k: v for k, v in expected.items() if not k.startswith("after")}
    assert len(found) == 20


# ---- compiled models -------------------------------------------------------------------------


def compiled(what, **options):
    torch._dynamo.reset()
    # with a graph of gradients of its own, as the default one
    return torch.compile(what, backend="aot_eager", **options)


def compiled_in_place(module):
    torch._dynamo.reset()
    module.compile(backend="aot_eager")
    return module


COMPILED = {
    "whole": compiled,
    "in parts": lambda model: nn.Sequential(compiled(model[:3]), compiled(model[3:])),
    "in place": lambda model: nn.Sequential(compiled_in_place(model)),
}


def two_norms(spec):
    return nn.Sequential(
        conv(3), build_norm(spec, 4), nn.ReLU(), conv(), build_norm(spec, 4), nn.ReLU()
    )


@pytest.mark.parametrize("spec", ["KN(gain=0.5)", "GKN(groups=2, gain=0.5)"])
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_models_are_traced_as_they_were_written(how, spec):
    model = two_norms(spec)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    other = COMPILED[how](model)
    find_chain(other, x)
    ours, theirs = other(x), twin(x)
    assert follows(model, "4").follows == "relu(1)"
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compiled_functions_hide_what_precedes_and_say_so():
    model = two_norms("GKN(groups=2, gain=0.5)")
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    function = compiled(lambda x: model(x))
    with pytest.warns(UserWarning, match="find_chain"):
        function(x)
    assert follows(model, "4").follows == "?"
    find_chain(model, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "KN and GKN")
        torch.testing.assert_close(function(x), twin(x))


def test_a_compiled_part_of_a_graph_says_so_once():
    relu = compiled(F.relu)
    model = Between(lambda m, a, b: relu(a))
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="find_chain"):
        model(x)
    assert follows(model).follows == "- (compiled before it could be followed)"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "KN and GKN")
        model(x)
    find_chain(model, x)
    assert follows(model).follows == "relu(a)"
    model(x)
    assert follows(model).follows == "relu(a)"


def test_a_norm_that_runs_between_two_graphs(monkeypatch):
    monkeypatch.setattr(KN2d, "forward", torch.compiler.disable(KN2d.forward))
    model = two_norms("KN(gain=0.5)")
    conv_1, first, _, conv_2, second, _ = model
    with pytest.warns(UserWarning, match="find_chain"):
        compiled(lambda x: second(conv_2(F.relu(first(conv_1(x))))))(torch.randn(2, 3, 8, 8))
    assert follows(model, "4").follows == "- (compiled before it could be followed)"


def test_a_chain_is_found_in_what_spreads_a_model():
    model = two_norms("KN(gain=0.5)")
    find_chain(nn.DataParallel(model), torch.randn(2, 3, 8, 8))
    assert follows(model, "4").follows == "relu(1)"


# ---- detectron2 ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    import zoo_models

    import cbn_det

    cbn_det.register()
    yield zoo_models
    cbn_det.unregister()


@pytest.mark.detectron2
def test_faster_rcnn_r18_fpn(zoo):
    changes = [("MODEL.RESNETS.DEPTH", 18), ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64)]
    model = zoo.build("faster_rcnn_fpn", "KN(gain=0.5)", changes)
    zoo.train(model, 1, lr=0.01)
    body = "backbone.bottom_up."
    names = {
        "stem": f"{body}stem.conv1.norm",
        "first": f"{body}res{{stage}}.{{index}}.conv1.norm",
        "second": f"{body}res{{stage}}.{{index}}.conv2.norm",
        "short": f"{body}res{{stage}}.{{index}}.shortcut.norm",
        "first stage projects": "stem of 8 channels",
    }
    expected = resnet18_rows("- (a model input, or frozen)", names)
    for number in (3, 2, 1, 0):
        expected = {
            key.replace(f"res{number}.", f"res{number + 2}."): value.replace(
                f"res{number}.", f"res{number + 2}."
            )
            for key, value in expected.items()
        }
    laterals = [f"backbone.fpn_lateral{level}.norm" for level in (2, 3, 4, 5)]
    outputs = [f"backbone.fpn_output{level}.norm" for level in (2, 3, 4, 5)]
    for k in range(4):
        expected[laterals[k]] = expected.pop(f"after {k}")
        expected[outputs[k]] = " + ".join(laterals[k:])
    head = "roi_heads.box_head.conv{}.norm"
    expected[head.format(1)] = f"mixture({', '.join(outputs)})"
    expected[head.format(2)] = f"relu({head.format(1)})"
    found = {row.name: row.follows for row in kn_chain(model)}
    assert found == expected
    assert len(found) == 21 + 8 + 2


def give_statistics(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if type(module).__name__ == "FrozenBatchNorm2d":
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)


@pytest.mark.detectron2
def test_freeze_at_2_seeds_the_chain_at_res3(zoo):
    model = zoo.build("mask_rcnn", "KN(gain=0.5)", [("MODEL.BACKBONE.FREEZE_AT", 2)])
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    give_statistics(model)
    find_chain_at_call(model)
    zoo.train(model, 1, lr=0.01)
    found = {row.name: row for row in kn_chain(model)}
    body = "backbone.bottom_up."
    res2 = [f"{body}res2.{k}.conv3.norm" for k in (2, 1, 0)]
    seed = f"relu({res2[0]} + relu({res2[1]} + relu({res2[2]} + {body}res2.0.shortcut.norm)))"
    first = [f"{body}res3.0.conv1.norm", f"{body}res3.0.shortcut.norm"]
    for name in ("backbone.fpn_lateral2.norm", *first):
        assert found[name].follows == seed
    assert not [name for name, row in found.items() if row.follows.startswith(("-", "?"))]
    assert trained == {n: p.requires_grad for n, p in model.named_parameters()}
    # frozen while it runs: what follows takes the statistics that were gathered
    before = found[f"{body}res4.0.conv1.norm"]
    for block in model.backbone.bottom_up.res3.children():
        block.freeze()
    find_chain_at_call(model)
    zoo.train(model, 1, lr=0.01)
    after = {row.name: row for row in kn_chain(model)}[f"{body}res4.0.conv1.norm"]
    assert after == before and after.follows.startswith(f"relu({body}res3.")


@pytest.mark.detectron2
def test_a_frozen_backbone_seeds_the_fpn(zoo):
    """The papers' recipe: frozen norms in the whole backbone, of which res3 to res5 are trained."""
    changes = [("MODEL.BACKBONE.FREEZE_AT", 2), ("MODEL.RESNETS.DEPTH", 18)]
    changes += [("MODEL.RESNETS.RES2_OUT_CHANNELS", 64)]
    sections = {"RESNETS": "FrozenBN"}
    model = zoo.build("faster_rcnn_fpn", "KN(gain=0.5)", changes, sections=sections)
    give_statistics(model)
    find_chain_at_call(model)
    zoo.train(model, 1, lr=0.01)
    found = {row.name: row.follows for row in kn_chain(model)}
    body = "backbone.bottom_up.res"
    for number in (3, 4, 5):
        last, short = (f"{body}{number}.{end}" for end in ("1.conv2.norm", "0.shortcut.norm"))
        expected = f"relu({last} + relu({body}{number}.0.conv2.norm + {short}))"
        assert found[f"backbone.fpn_lateral{number}.norm"] == expected
    assert len(found) == 10 and not [t for t in found.values() if t.startswith(("-", "?"))]


@pytest.mark.detectron2
def test_frozen_norms_without_statistics_end_the_chain(zoo):
    model = zoo.build("mask_rcnn", "KN(gain=0.5)", [("MODEL.BACKBONE.FREEZE_AT", 2)])
    find_chain_at_call(model)
    zoo.train(model, 1, lr=0.01)
    found = {row.name: row.follows for row in kn_chain(model)}
    end = "- (a frozen norm without statistics)"
    body = "backbone.bottom_up."
    assert not any(".res2." in name or ".stem." in name for name in found)
    ends = [name for name, text in found.items() if text.startswith("-")]
    assert [found[name] for name in ends] == [end] * 3
    first = [f"{body}res3.0.conv1.norm", f"{body}res3.0.shortcut.norm"]
    assert set(ends) == {"backbone.fpn_lateral2.norm", *first}
    # weights that come later bring statistics
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    for key, value in state.items():
        if "running_mean" in key:
            value.copy_(torch.randn(value.shape, generator=generator))
    model.load_state_dict(state)
    find_chain_at_call(model)
    zoo.train(model, 1, lr=0.01)
    assert not [row for row in kn_chain(model) if row.follows.startswith("-")]


@pytest.mark.detectron2
def test_retinanet_levels_have_chains_of_their_own(zoo):
    model = zoo.build("retinanet", "KN(gain=0.5)")
    zoo.train(model, 1, lr=0.01)
    found = {row.name: row for row in kn_chain(model)}
    for subnet in ("cls", "bbox"):
        for level in range(5):
            first, second = (f"head.{subnet}_subnet.{k}.{level}" for k in (1, 4))
            if level < 3:
                assert found[first].follows == f"backbone.fpn_output{level + 3}.norm"
            else:  # made of res5 by convolutions without a norm
                assert found[first].follows.startswith(f"backbone.top_block.p{level + 3}(relu(")
                assert "backbone.bottom_up.res5.2.conv3.norm" in found[first].follows
            assert found[second].follows == f"relu({first})"
