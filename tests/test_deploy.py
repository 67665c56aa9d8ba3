"""cbn_det.deploy: plain BatchNorm and folded convolutions."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from cbn_det.deploy import fold, to_batchnorm
from cbn_det.norms import build_norm, convert_norm, find_chain_at_call

REPOSITORY = Path(__file__).resolve().parents[1]

NORMS = [
    "CBN(window=3, burn_in=0)",
    "KN",
    "MBN(window=3, burn_in=0)",
    "BGN(groups=2)",
    "BRN(burn_in=0, ramp=0)",
]


class Block(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = norm(4)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.bn2 = norm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


def model_with(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(), Block(norm))


def images(size: int = 12) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def with_history(model: nn.Module) -> nn.Module:
    """Norms get values that are not the initial ones."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, name)
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=generator) * 1.5 + 0.2
    return model


def trained(spec: str) -> nn.Module:
    """A model that made three training steps with the norm, in evaluation mode."""
    torch.manual_seed(0)
    model = model_with(lambda channels: build_norm(spec, channels))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(images() * 2.0 + 1.0).square().mean().backward()
        optimizer.step()
    return model.eval()


def norm_layers(model: nn.Module) -> list[nn.Module]:
    leaves = [m for m in model.modules() if not list(m.children())]  # no lists of norms
    names = {m: type(m).__name__ for m in leaves}
    # torch's parametrisations of a weight begin with _
    named = {m for m, name in names.items() if "Norm" in name and name[0] != "_"}
    return [m for m in leaves if m in named or hasattr(m, "running_mean")]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


# ---- plain BatchNorm -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", NORMS)
def test_every_norm_becomes_a_batchnorm(spec: str) -> None:
    model = trained(spec)
    find_chain_at_call(model)
    expected, x = model(images()), images()
    report = to_batchnorm(model)
    assert torch.equal(model(x), expected)
    assert report.converted == ("1", "3.bn1", "3.bn2") and not report.left
    assert [type(m) for m in norm_layers(model)] == [nn.BatchNorm2d] * 3
    plain = model_with(nn.BatchNorm2d).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), expected)
    # nothing of ours hangs on to the model any more
    assert not any(m._forward_pre_hooks for m in model.modules())
    buffer = io.BytesIO()
    torch.save(model, buffer, _use_new_zipfile_serialization=False)
    strings = [arg for _, arg, _ in pickletools.genops(buffer.getvalue()) if isinstance(arg, str)]
    assert not [text for text in strings if "cbn_det" in text]


def test_parameters_stay_the_very_objects_and_training_goes_on() -> None:
    model = trained(NORMS[0]).train()
    before = dict(model.named_parameters())
    to_batchnorm(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert all(m.training for m in norm_layers(model))
    model(images()).sum().backward()
    assert before["1.weight"].grad is not None


def test_a_shared_layer_stays_shared() -> None:
    norm = build_norm("BGN(groups=2)", 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm).eval()
    assert to_batchnorm(model).converted == ("1",)
    assert model[1] is model[3] and type(model[1]) is nn.BatchNorm2d


def test_what_is_not_ours_is_left_and_listed() -> None:
    model = model_with(nn.BatchNorm2d)
    model.append(nn.GroupNorm(2, 4))
    model.append(nn.SyncBatchNorm(4))
    report = to_batchnorm(model)
    assert report.converted == ("5",) and type(model[5]) is nn.BatchNorm2d
    assert {row.name for row in report.left} == {"1", "3.bn1", "3.bn2", "4"}
    assert "left: 1 GroupNorm (4)" in str(report)


def test_gkn_is_refused_by_name() -> None:
    model = model_with(lambda channels: build_norm("BGN(groups=2)", channels))
    model[3].bn2 = build_norm("GKN(groups=2)", 4)
    kept = list(model.modules())
    for deploy in (to_batchnorm, fold):
        with pytest.raises(ValueError, match=r"1 GKN2d \(3\.bn2\): takes its statistics"):
            deploy(model.eval())
    assert kept == list(model.modules())


# ---- folding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", NORMS)
def test_every_norm_folds(spec: str) -> None:
    model = trained(spec)
    expected = model(images())
    report = fold(model)
    assert report.folded == ("1", "3.bn1", "3.bn2") and not report.left and not report.converted
    assert not norm_layers(model)
    assert relative(model(images()), expected) < 1e-5


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2, groups=3),
        nn.Conv2d(3, 6, (3, 1), padding="same", padding_mode="reflect", bias=False),
        nn.Conv2d(3, 6, 5, padding=4),
    ],
    ids=["grouped", "reflect", "padded"],
)
@pytest.mark.parametrize("affine", [True, False])
def test_convolutions_of_all_kinds(conv: nn.Conv2d, affine: bool) -> None:
    model = with_history(nn.Sequential(conv, nn.BatchNorm2d(6, affine=affine))).eval()
    expected = model(images())
    assert fold(model).folded == ("1",)
    assert relative(model(images()), expected) < 1e-5


def test_a_large_mean_and_a_small_variance() -> None:
    """As in layers whose statistics collapsed: the product of large and small must not overflow
    or vanish in between."""
    model = with_history(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))).eval()
    model[1].running_mean.fill_(100.0)
    model[1].running_var.fill_(1e-6)
    expected = model.double()(images().double())
    model.float()
    fold(model)
    assert relative(model(images()).double(), expected) < 1e-5


def test_16_bit_weights_stay_16_bit() -> None:
    model = with_history(model_with(nn.BatchNorm2d)).eval().bfloat16()
    expected = model(images().bfloat16())
    fold(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert relative(model(images().bfloat16()).float(), expected.float()) < 0.05


def test_two_convolutions_with_the_same_weight() -> None:
    """New parameters, so that the convolution without a norm keeps its weight."""
    model = with_history(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    model[2].weight = model[0].weight
    expected = model.eval()(images())
    fold(model)
    assert relative(model(images()), expected) < 1e-5


class PreActivation(nn.Module):
    """The norm comes before the convolution that it is registered after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x))


class UsedTwice(PreActivation):
    """The convolution's output goes elsewhere, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class WithActivation(PreActivation):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.relu(self.conv(x)))


class CalledTwice(PreActivation):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Branching(PreActivation):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) if x.mean() > 0 else x


class Standardised(nn.Conv2d):
    """Weight standardisation: what is folded into the weight is divided out again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


def standardised() -> nn.Module:
    return nn.Sequential(Standardised(3, 3, 1), nn.BatchNorm2d(3))


def parametrised() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), nn.ReLU()
    )


def levels() -> nn.Module:
    class Levels(nn.ModuleList):
        turn = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.turn += 1
            return self[self.turn % 2](x)

    return nn.Sequential(nn.Conv2d(3, 3, 1), Levels([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]))


def shared() -> nn.Module:
    conv = nn.Conv2d(3, 3, 1)
    parts = [nn.Sequential(conv, nn.BatchNorm2d(3)) for _ in range(2)]
    return nn.Sequential(*parts)


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 1), norm) for _ in range(2)])


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda module, args, output: output * 2.0)
    return model


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (PreActivation, "no nn.Conv2d feeds it"),
        (UsedTwice, "no nn.Conv2d feeds it and nothing else"),
        (WithActivation, "no nn.Conv2d feeds it"),
        (CalledTwice, "no nn.Conv2d feeds it"),
        (Branching, "cannot be told from Branching.forward"),
        (standardised, "does more than a convolution"),
        (parametrised, "computes its weight"),
        (levels, "several feature levels"),
        (shared, "its convolution is used at several places"),
        (shared_norm, "used at several places"),
        (hooked, "hooks"),
        (transposed, "no nn.Conv2d feeds it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_folded_is_left_as_batchnorm(build: Callable, reason: str) -> None:
    model = with_history(build())
    convert_norm(model, "CBN(compensation='none')")
    model.eval()
    expected = [model(images()) for _ in range(2)]
    report = fold(model)
    assert not report.folded and reason in report.left[0].reason
    assert {type(m) for m in norm_layers(model)} == {nn.BatchNorm2d}
    assert all(torch.equal(model(images()), out) for out in expected)


def test_an_optional_argument_takes_its_default() -> None:
    class Optional(PreActivation):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.norm(self.conv(x) if mask is None else self.conv(x) * mask)

    model = with_history(Optional()).eval()
    expected = model(images())
    assert fold(model).folded == ("norm",)
    assert relative(model(images()), expected) < 1e-5


def test_looking_at_a_forward_leaves_no_trace() -> None:
    class Counting(PreActivation):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.norm(self.conv(x))

    model = with_history(Counting()).eval()
    assert fold(model).folded == ("norm",) and model.calls == 0


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), LayerNorm2d(4), nn.InstanceNorm2d(4)])
def test_norms_of_their_own_input_are_left(norm: nn.Module) -> None:
    model = with_history(model_with(nn.BatchNorm2d)).append(norm).eval()
    expected = model(images())
    report = fold(model)
    assert report.folded == ("1", "3.bn1", "3.bn2") and [row.name for row in report.left] == ["4"]
    assert "takes its statistics from its own input" in report.left[0].reason
    assert relative(model(images()), expected) < 1e-5


def test_norms_of_ours_that_take_their_own_statistics_are_refused() -> None:
    model = model_with(nn.BatchNorm2d).append(build_norm("GKN(groups=2)", 4)).eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 GKN2d \(4\): takes its statistics"):
        fold(model)
    now = model.state_dict()
    assert now.keys() == kept.keys() and all(torch.equal(now[n], v) for n, v in kept.items())


def test_training_mode_is_refused() -> None:
    model = model_with(nn.BatchNorm2d)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        fold(model)
    model.eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"\(1: in training mode\)"):
        fold(model)
    for deploy in (fold, to_batchnorm):
        with pytest.raises(ValueError, match="itself a BatchNorm2d"):
            deploy(nn.BatchNorm2d(4).eval())


def test_a_folded_model_exports_without_norms() -> None:
    model = trained("KN")
    fold(model)
    program = torch.export.export(model, (images(),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in called) and not [n for n in called if "norm" in n]


# ---- models that others built ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet18", 20), ("mobilenet_v3_small", 34), ("googlenet", 57)]
)
def test_torchvision_classifiers(name: str, layers: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = with_history(getattr(torchvision.models, name)(weights=None, **extra)).eval()
    convert_norm(model, "KN")
    model.eval()
    with torch.no_grad():
        expected = model(images(48))
        assert len(fold(model).folded) == layers
        assert relative(model(images(48)), expected) < 1e-5
    assert not norm_layers(model)


@pytest.mark.parametrize("frozen", [False, True])
def test_torchvision_detectors(frozen: bool) -> None:
    torchvision = pytest.importorskip("torchvision")
    build = getattr(
        torchvision.models.detection, f"fasterrcnn_resnet50_fpn{'' if frozen else '_v2'}"
    )
    model = build(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96)
    if frozen:  # as it is with pretrained weights
        frozen_norm = torchvision.ops.FrozenBatchNorm2d
        model.backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=frozen_norm
        )
    with_history(model)
    for norm in norm_layers(model):
        norm.weight.data *= 0.3  # or feature maps grow from block to block
    if not frozen:
        convert_norm(model, "CBN")
    model.eval()
    with torch.no_grad():
        expected = model.backbone(images(64))
        assert len(fold(model).folded) == (53 if frozen else 65)
        found = model.backbone(images(64))
    assert not norm_layers(model)
    assert max(relative(found[key], expected[key]) for key in expected) < 1e-5


def features_of(zoo: Any, model: nn.Module) -> list[torch.Tensor]:
    x = torch.rand(1, 3, zoo.HEIGHT, zoo.WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.backbone(x)
        head = model.head([maps[f] for f in model.head_in_features]) if has_levels(model) else ()
    return [*maps.values(), *(level for kind in head for level in kind)]


def has_levels(model: nn.Module) -> bool:
    return hasattr(model, "head_in_features")


@pytest.mark.detectron2
@pytest.mark.parametrize("norm", ["CBN", "KN", "BN", "FrozenBN"])
@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet"])
def test_detectron2_detectors(name: str, norm: str) -> None:
    import zoo_models as zoo
    from detectron2.layers import CycleBatchNormList

    import cbn_det

    cbn_det.register()
    try:
        model = with_history(zoo.build(name, zoo.NORMS.get(norm, norm))).eval()
    finally:
        cbn_det.unregister()
    for layer in norm_layers(model):
        if layer.weight is not None:
            layer.weight.data *= 0.3
    layers, expected = len(norm_layers(model)), features_of(zoo, model)
    report = fold(model)
    found = features_of(zoo, model)
    assert max(map(relative, found, expected)) < 1e-5
    of_levels = [m for m in model.modules() if isinstance(m, CycleBatchNormList)]
    if name == "retinanet" and norm != "FrozenBN":
        assert len(of_levels) == 4 and {type(m) for m in of_levels} == {CycleBatchNormList}
        assert len(report.left) == 20 and "feature levels" in report.left[0].reason
        assert len(norm_layers(model)) == 20
    else:
        assert not report.left and len(report.folded) == layers and not norm_layers(model)
