"""GKN against the equations written out in kalman.py, and GroupNorm; the chain in evaluation."""

import copy
import io
import pickle
import threading

import kalman
import pytest
import torch
from kalman import Kalman, checkpointed_after_one_iteration_without
from torch import nn
from torch.nn import functional as F

from cbn_det.norms import chain, find_chain, find_chain_at_call, kn_chain
from cbn_det.norms.gkn import GKN2d
from cbn_det.norms.kn import KN2d
from cbn_det.norms.spec import build_norm


def images(seed, n=2, size=8, channels=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator, dtype=dtype)


class Net(nn.Module):
    """A stem, a residual block and a head, which may be left out of a forward."""

    def __init__(self, **options):
        super().__init__()
        options = {"groups": 2, "gain": 0.6, **options}
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), GKN2d(4, **options)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), GKN2d(4, **options)
        self.conv3, self.norm3 = nn.Conv2d(4, 6, 3, groups=2), GKN2d(6, **options)
        self.with_head = True
        torch.manual_seed(3)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x):
        x = F.relu_(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)) + x)
        return self.norm3(self.conv3(x)) if self.with_head else x

    def reference(self, x, gain):
        a, b, c = (Kalman(n, gain, groups=2) for n in (self.norm1, self.norm2, self.norm3))
        relu = kalman.rectified
        x = F.relu(a(self.conv1(x), None))
        before = relu(*a.handed)
        y = b(self.conv2(x), kalman.convolved(*before, self.conv2))
        handed = b.handed
        after = relu(handed[0] + before[0], handed[1] + before[1])
        return c(self.conv3(F.relu(y + x)), kalman.convolved(*after, self.conv3))


def gradients(out, leaves):
    probe = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((probe * out + out**3 / 5).sum(), leaves)


# ---- the method ------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.3, 0.9])
def test_outputs_and_gradients_equal_the_equations(gain):
    torch.manual_seed(0)
    model = Net(gain=gain).double()
    twin = copy.deepcopy(model)
    x, z = (images(1).requires_grad_() for _ in range(2))
    ours, theirs = model(x), twin.reference(z, gain)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    a = gradients(ours, [x, *model.parameters()])
    b = gradients(theirs, [z, *twin.parameters()])
    names = ["input", *(n for n, _ in model.named_parameters())]
    for name, g, h in zip(names, a, b, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-7, msg=name)


def test_gradcheck():
    model = Net().double()
    x = images(1, n=1, size=5).requires_grad_()
    assert torch.autograd.gradcheck(model, [x], atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_without_gain_it_is_groupnorm(affine):
    x = images(1, channels=8, dtype=torch.float32).requires_grad_()
    ours = build_norm(f"GKN(groups=4, gain=0, eps=1e-3, affine={affine})", 8)
    theirs = nn.GroupNorm(4, 8, eps=1e-3, affine=affine)
    a, b = ours(x), theirs(x)
    assert torch.equal(a, b) and torch.equal(gradients(a, [x])[0], gradients(b, [x])[0])
    assert isinstance(ours, nn.GroupNorm) and not isinstance(ours, nn.BatchNorm2d)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_the_first_layer_of_a_chain_is_groupnorm():
    model = Net().double()
    x = images(1)
    y = model.conv1(x)
    expected = F.group_norm(y, 2, model.norm1.weight, model.norm1.bias)
    assert torch.equal(model.norm1(y), expected)
    assert model.state_dict().keys() == {
        f"{layer}{k}.{p}"
        for layer in ("conv", "norm")
        for k in (1, 2, 3)
        for p in ("weight", "bias")
    }


@pytest.mark.parametrize("gain", [0, 0.6])
def test_groups_of_a_single_value(gain):
    """One RoI of 1x1 and as many groups as channels, where ``nn.GroupNorm`` raises: an output of
    bias alone, and behind another layer what is predicted and the value, mixed."""
    torch.manual_seed(0)
    options = {"groups": 4, "gain": gain}
    first, second = (GKN2d(4, **options).double() for _ in range(2))
    convs = [nn.Conv2d(cin, 4, 1).double() for cin in (3, 4)]
    for norm in (first, second):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    x = images(1, n=1, size=1).requires_grad_()
    y = first(convs[0](x))
    torch.testing.assert_close(y.flatten(), first.bias)
    assert all(float(grad.abs().max()) < 1e-12 for grad in gradients(y, [x, first.weight]))
    ours = second(convs[1](first(convs[0](x))))
    references = [Kalman(norm, gain, groups=4) for norm in (first, second)]
    z = references[0](convs[0](x), None)
    prediction = kalman.convolved(*references[0].handed, convs[1])
    theirs = references[1](convs[1](z), prediction)
    leaves = [x, *first.parameters(), *second.parameters(), *convs[1].parameters()]
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    for g, h in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-7)


def test_samples_do_not_see_each_other():
    model = Net().double()
    x = images(1, n=3)
    together = model(x)
    x[1:] *= 50.0
    torch.testing.assert_close(model(x)[:1], together[:1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x[:1]), together[:1], rtol=1e-9, atol=1e-9)


def test_a_constant_group_is_predicted_as_it_is():
    """Two dead channels with the same bias: their output is the norm's bias."""
    model = Net().double()
    with torch.no_grad():
        model.conv2.weight[:2] = 0.0
        model.conv2.bias[:2] = 0.5
    outs = []
    model.norm2.register_forward_hook(lambda norm, args, out: outs.append(out))
    out = model(images(1))
    bias = model.norm2.bias[:2].view(2, 1, 1).expand_as(outs[0][:, :2])
    torch.testing.assert_close(outs[0][:, :2], bias)
    assert float(model.norm2.diagnostics["guarded"]) == 0.0
    expected = model.reference(images(1), 0.6)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    assert all(grad.isfinite().all() for grad in gradients(out, [*model.parameters()]))


def test_each_sample_has_its_own_guard():
    """At 100 times the variance, on average over groups. Identities as convolutions: N(0, 1) is
    predicted, and of a group of variance v the first layer makes v / (v + eps)."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False), GKN2d(4, groups=2, eps=1.0),
        nn.Conv2d(4, 4, 1, bias=False), GKN2d(4, groups=2, eps=0.0, gain=0.5),
    ).double()  # fmt: skip
    ratios = torch.tensor([[99.0, 99.0], [101.0, 101.0], [190.0, 1.01], [210.0, 1.01]]).double()
    x = F.group_norm(images(1, n=4, channels=4), 2, eps=0.0)
    x *= (ratios - 1.0).rsqrt().repeat_interleave(2, 1)[..., None, None]
    with torch.no_grad():
        for conv in (model[0], model[2]):
            conv.weight.copy_(torch.eye(4)[..., None, None])
    out = model(x)
    plain = F.group_norm(x, 2, eps=0.0)
    refused = [torch.allclose(a, b) for a, b in zip(out, plain, strict=True)]
    assert refused == [False, True, False, True]
    assert float(model[3].diagnostics["guarded"]) == 0.5


def test_rois_are_predicted_like_the_images():
    ops = pytest.importorskip("torchvision").ops

    class Rois(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"groups": 2, "gain": 0.5}
            self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), GKN2d(4, **options)
            self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), GKN2d(4, **options)

        def forward(self, x):
            x = self.norm1(self.conv1(x))
            boxes = [torch.tensor([[0.0, 0, 6, 6], [1, 1, 5, 5], [2, 2, 6, 6]])] * len(x)
            return self.norm2(self.conv2(ops.roi_align(x, boxes, (4, 4))))

        def reference(self, x):
            norms = [Kalman(n, 0.5, groups=2) for n in (self.norm1, self.norm2)]
            y = norms[0](self.conv1(x), None)
            mean, var = norms[0].handed
            boxes = [torch.tensor([[0.0, 0, 6, 6], [1, 1, 5, 5], [2, 2, 6, 6]])] * len(x)
            y = self.conv2(ops.roi_align(y, boxes, (4, 4)))
            return norms[1](y, kalman.convolved(mean, var, self.conv2))

    model = Rois()
    x = images(1, dtype=torch.float32)
    torch.testing.assert_close(model(x), model.reference(x), rtol=1e-4, atol=1e-4)
    assert kn_chain(model)[1].follows == "norm1"


def test_kn_and_gkn_follow_each_other():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), GKN2d(4, groups=2, gain=0.5), nn.ReLU(),
        nn.Conv2d(4, 4, 3), KN2d(4, gain=0.5), nn.ReLU(),
        nn.Conv2d(4, 4, 3), GKN2d(4, groups=2, gain=0.5),
    )  # fmt: skip
    for train in (True, False):
        out = model.train(train)(images(1, size=12, dtype=torch.float32))
        out.pow(2).mean().backward()
        assert out.isfinite().all()
    assert [row.follows for row in kn_chain(model)[1:]] == ["relu(1)", "relu(4)"]


# ---- training and evaluation -----------------------------------------------------------------


def trained(**options):
    torch.manual_seed(0)
    model = Net(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for t in range(3):
        optimizer.zero_grad()
        model(images(t, dtype=torch.float32)).pow(3).mean().backward()
        optimizer.step()
    return model


X = images(9, dtype=torch.float32)
CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}


def test_evaluation_is_what_training_is():
    model = trained()
    expected = model(X)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), expected, rtol=1e-5, atol=1e-5)
        plain = copy.deepcopy(model)
        for norm in (plain.norm1, plain.norm2, plain.norm3):
            norm.gain = 0.0
        assert not torch.allclose(plain(X), expected, atol=1e-2)


def test_gradients_in_evaluation_are_those_in_training():
    model = trained().double()
    x, z = (images(1).requires_grad_() for _ in range(2))
    ours, theirs = model.eval()(x), model.train()(z)
    torch.testing.assert_close(ours, theirs)
    a = gradients(ours, [x, *model.parameters()])
    for g, h in zip(a, gradients(theirs, [z, *model.parameters()]), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-9)


def loaded(model):
    fresh = Net().eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    return fresh


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_loaded_checkpoint_evaluates_as_the_model_that_was_trained(context):
    model = trained().eval()
    fresh, other = loaded(model), loaded(model)
    find_chain_at_call(other)
    with CONTEXTS[context]():
        x = X + 0.0  # where there is no graph, a tensor that could not be part of one
        with pytest.raises(RuntimeError, match=r"GKN2d\(4\).*find_chain\(model, batch\)"):
            fresh(x)
        find_chain(fresh, x)
        assert torch.equal(fresh(x), model(x)) and torch.equal(other(x), model(x))
    assert kn_chain(fresh) == kn_chain(model) == kn_chain(other)
    assert all(not m.training for m in fresh.modules())


@pytest.mark.parametrize("frozen", ["weights", "average"])
def test_models_of_which_nothing_is_trained(frozen):
    model = trained().eval()
    other = copy.deepcopy(model) if frozen == "average" else loaded(model)
    other.requires_grad_(False)
    if frozen == "weights":
        find_chain(other, X)
    with torch.no_grad():
        assert torch.equal(other(X), model(X))
    assert not any(p.requires_grad for p in other.parameters())
    again = pickle.loads(pickle.dumps(other))
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    with torch.no_grad():
        for copied in (again, torch.load(file, weights_only=False)):
            assert torch.equal(copied(X), model(X))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_average_follows_changes_through_data(mode):
    """Which the versions of tensors do not show: the update that most moving averages make."""
    model = trained()
    average = getattr(copy.deepcopy(model).requires_grad_(False), mode)()
    with torch.no_grad():
        before = average(X)
        for p, q in zip(average.parameters(), Net().parameters(), strict=True):
            p.data.mul_(0.5).add_(q.data, alpha=0.5)
        fresh = loaded(average)
        find_chain(fresh, X)
        torch.testing.assert_close(average(X), fresh(X), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(average(X), before, atol=1e-3)


def test_a_head_that_a_first_forward_leaves_out():
    model = trained().eval()
    fresh = loaded(model)
    fresh.with_head = False
    find_chain(fresh, X)
    assert kn_chain(fresh)[2].follows == "?"
    fresh.with_head = True
    with pytest.raises(RuntimeError, match="find_chain"), torch.no_grad():
        fresh(X)
    find_chain(fresh, X)
    assert torch.equal(fresh(X), model(X))


def test_looking_leaves_no_trace():
    fresh = nn.Sequential(Net(), nn.Dropout(0.5)).eval()
    calls = []
    fresh[0].conv1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    state = torch.get_rng_state()
    find_chain_at_call(fresh)
    with torch.no_grad():
        for _ in range(3):
            fresh(X)
    assert calls == [True, False, False, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in fresh.parameters())


def test_finding_the_chain_by_hand():
    fresh = Net()
    find_chain(fresh, X)
    assert [row.follows for row in kn_chain(fresh)[1:]] == [
        "relu(norm1)",
        "relu(norm2 + relu(norm1))",
    ]
    assert all(m.training for m in fresh.modules())
    kn = nn.Sequential(nn.Conv2d(3, 4, 3), KN2d(4), nn.Conv2d(4, 4, 3), KN2d(4))
    before = kn[1].running_mean.clone()
    find_chain(kn, X)
    assert kn_chain(kn)[1].follows == "1" and torch.equal(kn[1].running_mean, before)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbone, self.head = (
            nn.Sequential(nn.Conv2d(cin, 4, 3), GKN2d(4, groups=2, gain=0.6), nn.ReLU())
            for cin in (3, 4)
        )
        nn.init.uniform_(self.backbone[1].weight, 0.5, 3.0)

    def forward(self, x, *, scale=1.0):
        return self.head(self.backbone(x * scale))


@torch.no_grad()
def test_parts_are_followed_as_they_lie_in_the_whole():
    model = Detector().eval()
    find_chain(model, X, scale=2.0)
    expected = model(X)
    assert torch.equal(model.head(model.backbone(X)), expected)
    alone = Detector().eval()
    find_chain(alone.backbone, X)
    find_chain(alone.head, alone.backbone(X))
    assert not torch.allclose(alone.head(alone.backbone(X)), expected, atol=1e-3)
    find_chain(alone, X)
    assert torch.equal(alone(X), expected)


@torch.no_grad()
def test_a_forward_that_was_interrupted_is_over():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(Detector(), Interrupted())
    with pytest.raises(KeyboardInterrupt):
        find_chain(model, X)
    assert model.training and not chain.tracing()
    assert kn_chain(model)[1].follows == "relu(0.backbone.1)"


@torch.no_grad()
def test_threads_look_for_themselves():
    """While another thread looks, this one evaluates."""
    results = []

    class Waiting(Detector):
        def forward(self, x):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return super().forward(x)

    @torch.no_grad()
    def other():
        with pytest.raises(RuntimeError, match="find_chain"):
            Detector().eval()(X)
        results.append(chain.tracing())

    find_chain(Waiting(), X)
    assert results == [False]


def test_compiled_in_evaluation():
    model = trained().eval()
    fresh = loaded(model)
    with torch.no_grad():
        expected = model(X)
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="find_chain"):
            torch.compile(fresh, backend="eager")(X)
        find_chain(fresh, X)
        for m in (model, fresh):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(m, backend="eager")(X), expected)


def test_reentrant_checkpointing_is_groupnorm_for_one_iteration_and_the_same_afterwards():
    model = Net().double()
    twin = checkpointed_after_one_iteration_without(model, images)
    assert kn_chain(twin) == kn_chain(model)


# ---- formats ---------------------------------------------------------------------------------


def test_formats():
    model = trained()
    expected = model(X).detach()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    z = X.to(memory_format=torch.channels_last).requires_grad_()
    out = twin(z)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert z.grad.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16
    assert float((out - expected).detach().norm() / expected.norm()) < 0.05
    empty = model(torch.zeros(0, 3, 8, 8))
    empty.sum().backward()
    assert empty.shape == (0, 6, 6, 6)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.norm3.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"groups": 3}, "groups=3.*8 channels"),
        ({"groups": 0}, "groups"),
        ({"groups": 2, "gain": 1}, "gain"),
        ({"groups": 2, "eps": -1}, "eps"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GKN2d(8, **options)


def test_options_build_the_same_layer_again():
    norm = build_norm("GKN(groups=4, gain=0.3)", 8)
    assert GKN2d(8, **norm.options()).options() == norm.options()
    assert set(norm.state_dict()) == {"weight", "bias"}
    with pytest.raises(ValueError, match="4D"):
        norm(torch.zeros(2, 8))


# ---- detectron2 ------------------------------------------------------------------------------


@pytest.mark.detectron2
def test_a_detector_from_a_checkpoint():
    import zoo_models

    import cbn_det

    cbn_det.register()
    try:
        changes = [
            ("MODEL.RESNETS.STEM_OUT_CHANNELS", 16),
            ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        ]
        spec = "GKN(groups=4, gain=0.5)"
        model = zoo_models.build("mask_rcnn", spec, changes)
        zoo_models.train(model, 2, lr=0.01)
        fresh = zoo_models.build("mask_rcnn", spec, changes, seed=1)
        fresh.load_state_dict(model.state_dict(), strict=True)
        find_chain_at_call(fresh)
        outs = [zoo_models.evaluate(m)[0]["instances"] for m in (model, fresh)]
        assert len(outs[0]) and torch.equal(outs[0].pred_boxes.tensor, outs[1].pred_boxes.tensor)
        assert torch.equal(outs[0].scores, outs[1].scores)
        assert kn_chain(fresh) == kn_chain(model)
        assert sum(row.follows.startswith("-") for row in kn_chain(model)) == 1
    finally:
        cbn_det.unregister()
