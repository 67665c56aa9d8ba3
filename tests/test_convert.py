"""convert_norm: what is swapped, what stays the same, what is left alone, what is refused."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cbn_det.norms import CBN2d, SmallBatchNorm2d, build_norm, register_norm, spec
from cbn_det.norms.convert import Conversion, ConvertedNorm, LeftNorm, convert_norm

CBN = "CBN(window=3, burn_in=0)"
AS_BATCHNORM = "CBN(window=1, burn_in=0, ema='batch')"


def small_model(norm=nn.BatchNorm2d) -> nn.Sequential:
    """A convolution with a norm in each of the usual places."""
    block = nn.Sequential()
    block.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    block.bn1 = norm(4)
    block.relu = nn.ReLU()
    block.conv2 = nn.Conv2d(4, 4, 1)
    block.bn2 = norm(4)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(), block)


def with_history(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives norms weights and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
            module.num_batches_tracked += 7
    return model


def images(size: int = 8) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def evaluated(model: nn.Module, x) -> torch.Tensor:
    training = {module: module.training for module in model.modules()}
    out = model.eval()(x)
    for module, mode in training.items():
        module.training = mode
    return out


def train(model: nn.Module, x: torch.Tensor, steps: int = 3, lr: float = 0.05) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ours(model: nn.Module) -> dict[str, SmallBatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SmallBatchNorm2d)}


# ---- what stays the same ---------------------------------------------------------------------


def test_weights_statistics_options_and_mode_are_kept() -> None:
    model = with_history(small_model())
    model[1].eps, model[1].momentum = 1e-3, None
    model[1].eval(), model[3].bn1.weight.requires_grad_(False)
    old = dict(model.named_modules())
    before, state = evaluated(model, images()), dict(model.state_dict(keep_vars=True))
    convert_norm(model, CBN)
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name] or tensor.data_ptr() == state[name].data_ptr(), name
    assert all(p is state[name] for name, p in model.named_parameters())
    assert list(ours(model)) == ["1", "3.bn1", "3.bn2"]
    for name, layer in ours(model).items():
        assert isinstance(layer, CBN2d) and (layer.window, layer.burn_in) == (3, 0)
        assert (layer.eps, layer.momentum) == (old[name].eps, old[name].momentum)
        assert layer.training == old[name].training
    assert torch.equal(evaluated(model, images()), before)


def test_the_spec_wins_over_what_the_layer_had() -> None:
    model = small_model()
    convert_norm(model, "CBN(eps=0.25, momentum=0.5)")
    assert {(m.eps, m.momentum) for m in ours(model).values()} == {(0.25, 0.5)}


def test_layers_without_affine_parameters() -> None:
    model = with_history(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    before = evaluated(model, images())
    convert_norm(model, CBN)
    assert not model[1].affine and model[1].weight is None
    assert torch.equal(evaluated(model, images()), before)
    train(model, images())


def test_state_dict_goes_back_into_the_unconverted_model() -> None:
    model, plain = with_history(small_model()), small_model()
    convert_norm(model, CBN)
    train(model, images())
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(evaluated(plain, images()), evaluated(model, images()))
    model.load_state_dict(with_history(small_model(), seed=3).state_dict(), strict=True)


def test_training_is_batchnorms_during_burn_in() -> None:
    torch.manual_seed(0)
    plain = with_history(small_model()).double()
    for norm in (AS_BATCHNORM, "CBN(burn_in=100, ema='batch')"):
        model = copy.deepcopy(plain)
        convert_norm(model, norm)
        expected = copy.deepcopy(plain)
        x = images().double()
        assert train(model, x) == pytest.approx(train(expected, x), rel=1e-10)
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-8, atol=1e-10)


def test_an_optimizer_made_before_still_updates() -> None:
    model = with_history(small_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_norm(model, CBN)
    old = [p.detach().clone() for p in model[1].parameters()]
    model(images()).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(old, model[1].parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_channels_last(dtype: torch.dtype) -> None:
    model = with_history(small_model()).to(dtype).to(memory_format=torch.channels_last)
    x = images().to(dtype).contiguous(memory_format=torch.channels_last)
    before = evaluated(model, x)
    convert_norm(model, CBN)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
    assert torch.equal(evaluated(model, x), before)
    assert model.train()(x).is_contiguous(memory_format=torch.channels_last)
    assert all(torch.isfinite(torch.tensor(train(model, x))))


def test_deepcopy_and_pickle_of_a_converted_model() -> None:
    model = with_history(small_model())
    convert_norm(model, CBN)
    train(model, images())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert other[1].conv is other[0] and other[3].bn2.conv is other[3].conv2
        again = copy.deepcopy(model)
        assert train(other, images()) == train(again, images())


# ---- binding ---------------------------------------------------------------------------------


def test_every_layer_is_bound_and_the_first_forward_agrees() -> None:
    model = small_model()
    report = convert_norm(model, CBN)
    assert [(row.name, row.conv) for row in report.converted] == [
        ("1", "0"),
        ("3.bn1", "3.conv1"),
        ("3.bn2", "3.conv2"),
    ]
    train(model, images())
    assert all("patch" in m.memory.stacked for m in ours(model).values())


class Levels(nn.Module):
    """One convolution for two feature levels, with a norm of each level's own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x):
        return sum(norm(self.conv(x)) for norm in self.norms)


class Pairs(nn.Module):
    """Convolutions and norms in two lists of the same length (Res2Net's blocks)."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x


class DeepStem(nn.Module):
    """A stem of several layers, its last norm outside it (ResNet-D)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.stem(x))


@pytest.mark.parametrize(
    ("model", "convs"),
    [(Levels, ["conv", "conv"]), (Pairs, ["convs.0", "convs.1"]), (DeepStem, ["stem.2"])],
)
def test_what_a_whole_model_shows_beyond_registration(model: type, convs: list[str]) -> None:
    built = model()
    assert [row.conv for row in convert_norm(built, CBN).converted] == convs
    train(built, images())
    assert all("patch" in m.memory.stacked for m in ours(built).values())


def test_a_norm_of_ours_to_another() -> None:
    model = small_model(norm=lambda c: build_norm("CBN(window=4, burn_in=0)", c))
    old = model[1]
    assert convert_norm(model, "CBN(window=8)", max_iter=90).converted[0].before == "CBN"
    assert {(m.window, m.burn_in_steps) for m in ours(model).values()} == {(8, 60)}
    assert old.conv is None and len(model[0]._forward_pre_hooks) == 1
    train(model, images())


def test_a_binding_that_only_the_user_knew_is_kept() -> None:
    model = nn.ModuleDict({"norm": build_norm(CBN, 4), "conv": nn.Conv2d(3, 4, 1)})
    model["norm"].bind(model["conv"])
    convert_norm(model, "CBN(window=5, burn_in=0)")
    assert model["norm"].conv is model["conv"]


def test_a_shared_layer_stays_shared() -> None:
    model = small_model()
    model.again = model[3]  # the whole block, under a second name
    model[3].bn2 = model[3].bn1  # a norm that two convolutions feed
    with pytest.raises(ValueError, match=r"1 of 2 BatchNorms .*by several.*3\.bn1"):
        convert_norm(model, CBN)
    assert model[3].bn1 is model[3].bn2 and type(model[3].bn1) is nn.BatchNorm2d
    report = convert_norm(model, "CBN(compensation='none')")
    assert [row.name for row in report.converted] == ["1", "3.bn1"]
    assert model[3].bn1 is model[3].bn2 and isinstance(model[3].bn1, CBN2d)


# ---- what is left alone ----------------------------------------------------------------------


class WithActivation(nn.BatchNorm2d):
    """timm's BatchNormAct2d in short."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class ClampedAbove(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(max=6)


class WithGain(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(channels))


class ElsewhereInTraining(nn.BatchNorm2d):
    """detectron2's NaiveSyncBatchNorm in short: its own forward, BatchNorm's evaluation."""

    def forward(self, x):
        return super().forward(x) if not self.training else x


class JustAName(nn.BatchNorm2d):
    pass


class FrozenBatchNorm2d(nn.Module):
    pass


class FailsAlone(nn.BatchNorm2d):
    def forward(self, x, scale):
        return super().forward(x) * scale


def hooked() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda *_: None)
    return norm


def without_bias() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4)
    norm.bias = None
    return norm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (WithActivation(4), "it contains act"),
        (ClampedAbove(4), "its output in evaluation differs"),
        (WithGain(4), "it has gain"),
        (FailsAlone(4), "failed when tried: .*scale"),
        (nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
        (without_bias(), "only one of weight and bias"),
        (hooked(), "hooks"),
        (nn.GroupNorm(2, 4), "no BatchNorm2d"),
        (build_norm("GKN(groups=2)", 4), "no BatchNorm2d"),
        (nn.BatchNorm1d(4), "no BatchNorm2d"),
        (nn.BatchNorm3d(4), "no BatchNorm2d"),
        (FrozenBatchNorm2d(), "frozen"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_plain_batchnorm_is_left_and_listed(norm: nn.Module, reason: str) -> None:
    model = small_model()
    model.extra = norm
    report = convert_norm(model, CBN)
    assert model.extra is norm
    (left,) = report.left
    assert (left.name, left.norm) == ("extra", type(norm).__name__)
    lines = str(report).splitlines()
    assert lines[0].startswith("3 of 4 norm layers converted: BatchNorm2d -> " + CBN)
    assert "left: 1 " in lines[1]
    assert re.search(reason, left.reason)


@pytest.mark.parametrize("norm", [JustAName, ElsewhereInTraining, nn.SyncBatchNorm])
def test_what_evaluates_as_batchnorm_is_converted(norm: type) -> None:
    model = with_history(small_model(norm))
    before, random = evaluated(model, images()), torch.random.get_rng_state()
    convert_norm(model, CBN)
    assert len(ours(model)) == 3
    assert torch.equal(evaluated(model, images()), before)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_the_report() -> None:
    report = Conversion(
        (ConvertedNorm("a", "BatchNorm2d", "CBN", 4, "b"), ConvertedNorm("c", "X", "CBN", 4, "")),
        tuple(LeftNorm(f"n{i}", "GroupNorm", "no BatchNorm2d") for i in range(5)),
    )
    assert str(report) == (
        "2 of 7 norm layers converted: BatchNorm2d, X -> CBN; 1 bound to their convolution\n"
        "  left: 5 GroupNorm (n0, n1, n2, n3, ...): no BatchNorm2d"
    )


# ---- what is refused -------------------------------------------------------------------------


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.block(self.bn1(self.conv1(x)))


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_without_its_convolution_names_the_remedy(training: bool) -> None:
    model = PreActivation().train(training)
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=r"1 of 2 .*block\.0") as caught:
        convert_norm(model, "CBN(window=5, burn_in=0)")
    remedy = "CBN(window=5, burn_in=0, compensation='none')"
    assert remedy in str(caught.value) and "convert_norm(model.part" in str(caught.value)
    assert list(model.named_modules()) == modules and not model.conv1._forward_pre_hooks
    assert len(convert_norm(model, remedy).converted) == 2
    train(model.train(), images())


@pytest.mark.parametrize(
    ("model", "norm", "max_iter", "said"),
    [
        (nn.BatchNorm2d(4), CBN, None, "the model is itself a BatchNorm2d"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), CBN, None, "it has no norm layers"),
        (nn.Sequential(nn.GroupNorm(2, 4)), CBN, None, r"left: 1 GroupNorm \(0\): no BatchNorm2d"),
        (small_model(), "Nothing", None, "unknown norm 'Nothing'"),
        (small_model(), "CBN(windows=3)", None, "no option 'windows'"),
        (small_model(), "CBN(window=0)", None, "window=0"),
        (small_model(), "CBN(affine=False)", None, "leave the option affine out"),
        (small_model(), CBN, 0, "max_iter=0"),
        (small_model(), "ConvertGroups", None, "is no BatchNorm2d"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4)), CBN, None, "fed by no nn.Conv2d"),
    ],
)
def test_refused_and_unchanged(monkeypatch, model, norm, max_iter, said) -> None:
    monkeypatch.setattr(spec, "_NORMS", dict(spec._NORMS))
    register_norm("ConvertGroups")(type("Groups", (nn.GroupNorm,), {"__init__": groups_init}))
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=said):
        convert_norm(model, norm, max_iter=max_iter)
    assert list(model.named_modules()) == modules


def groups_init(self, num_features):
    nn.GroupNorm.__init__(self, 2, num_features)


def test_a_norm_of_the_users_own_that_takes_no_eps(monkeypatch) -> None:
    monkeypatch.setattr(spec, "_NORMS", dict(spec._NORMS))

    @register_norm("ConvertOwn")
    class Own(nn.BatchNorm2d):
        def __init__(self, num_features, *, strength=1.0):
            super().__init__(num_features)
            self.strength = strength
            self.register_buffer("noise", torch.zeros(num_features))

    model = with_history(small_model()).double()
    model[1].eps = 0.01
    before = evaluated(model, images().double())
    assert convert_norm(model, "ConvertOwn(strength=2)").converted[0].conv == ""
    assert type(model[1]) is Own and (model[1].strength, model[1].eps) == (2, 0.01)
    assert model[1].noise.dtype == torch.float64
    assert torch.equal(evaluated(model, images().double()), before)


# ---- models that others built ----------------------------------------------------------------


def check_others_model(model: nn.Module, layers: int, x, forward) -> Conversion:
    """Evaluation is kept, every layer bound, and a training step agrees with the binding."""
    with_history(model)
    before = forward(model.eval(), x)
    report = convert_norm(model, CBN)
    assert len(report.converted) == layers and all(row.conv for row in report.converted)
    torch.testing.assert_close(forward(model, x), before, rtol=0, atol=0)
    return report


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 20), ("resnet50", 53)])
def test_torchvision_resnet(name: str, layers: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)(num_classes=5)
    x = images(48)
    report = check_others_model(model, layers, x, evaluated)
    convs = {row.name: row.conv for row in report.converted}
    assert convs["layer2.0.downsample.1"] == "layer2.0.downsample.0" and convs["bn1"] == "conv1"
    assert not report.left
    train(model.train(), x, steps=1, lr=1e-4)
    assert all("patch" in m.memory.pending for m in ours(model).values())


def test_torchvision_detector() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    )
    x = [image for image in images(64)]

    def boxes(model, x):
        torch.manual_seed(0)
        with torch.no_grad():
            return [out["boxes"] for out in model(x)]

    report = check_others_model(model, 65, x, boxes)  # 53, 8 of the FPN, 4
    assert "backbone.fpn.inner_blocks.0.1" in {row.name for row in report.converted}
    assert "roi_heads.box_head.0.1" in {row.name for row in report.converted}
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    sum(model.train()(x, [target, target]).values()).backward()
    assert all("patch" in m.memory.pending for m in ours(model).values())


def test_a_frozen_torchvision_backbone() -> None:
    torchvision = pytest.importorskip("torchvision")
    build = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    with pytest.raises(ValueError, match=r"left: 20 FrozenBatchNorm2d .*: frozen"):
        convert_norm(build(backbone_name="resnet18", weights=None), CBN)


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("name", "norm"),
    [("faster_rcnn_fpn", "BN"), ("retinanet", "BN"), ("mask_rcnn", "naiveSyncBN_N")],
)
def test_detectron2_detector(name: str, norm: str, monkeypatch) -> None:
    import zoo_models as zoo

    model = with_history(zoo.build(name, norm)).train()
    norms, before = len(zoo.batchnorm_layers(model)), zoo.evaluate(model)
    report = convert_norm(model, CBN)
    assert len(report.converted) == norms == len(zoo.cbn_layers(model)) > 50
    assert all(row.conv for row in report.converted)
    assert report.converted[0].before == {"BN": "BatchNorm2d"}.get(norm, "NaiveSyncBatchNorm")
    after = zoo.evaluate(model)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old["instances"].pred_boxes.tensor, new["instances"].pred_boxes.tensor)
    with zoo.convolutions_seen(model, monkeypatch) as fed:
        zoo.train(model, steps=1, lr=1e-3)
    for layer_name, layer in zoo.cbn_layers(model).items():
        assert fed[layer_name] is layer.conv.weight, layer_name


def _two_ranks(rank: int, world: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = small_model(nn.SyncBatchNorm)
    convert_norm(model, CBN)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    train(model, images() + rank)
    return {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


def test_a_synchronised_model_trains_on_two_ranks(tmp_path) -> None:
    first, second = run_ranks(_two_ranks, 2, tmp_path)
    assert first == second and "module.1.weight" in first
