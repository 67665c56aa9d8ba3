"""Models of detectron2's zoo with our norms at every norm site, trained for two steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.detectron2

MODELS = {
    "faster_rcnn_fpn": 63,
    "faster_rcnn_c4": 53,
    "mask_rcnn": 67,
    "cascade_mask_rcnn": 71,
    "keypoint_rcnn": 63,
    "retinanet": 79,
    "fcos": 46,
    "mask_rcnn_regnet": 39,
    "panoptic_fpn": 74,
    "semantic_fpn": 68,
    "deeplab_v3": 60,
    "deeplab_v3_plus": 63,
    "panoptic_deeplab": 83,
    "panoptic_deeplab_depthwise": 89,
}

# CBN is trained on all of the above. Each of these goes once through every kind of norm site:
OTHERS = ("KN", "GKN", "MBN", "BGN", "BRN")
SITES = {
    # model: {section of its config: (names of that section's layers, what kind of site it is)}
    "panoptic_fpn": {
        "RESNETS": (r"backbone\.bottom_up\.", "stem and bottlenecks"),
        "FPN": (r"backbone\.fpn_", "lateral and output convolutions"),
        "ROI_BOX_HEAD": (r"roi_heads\.box_head\.", "convolutional box head"),
        "ROI_MASK_HEAD": (r"roi_heads\.mask_head\.", "mask head"),
        "SEM_SEG_HEAD": (r"sem_seg_head\.", "semantic head, before upsampling"),
    },
    "retinanet": {
        "RETINANET": (r"head\.", "head shared by five levels"),
        "FPN": (r"backbone\.fpn_", "lateral and output convolutions"),
        "RESNETS": (r"backbone\.bottom_up\.", "stem and bottlenecks"),
    },
    "faster_rcnn_c4": {
        "RESNETS": (r"roi_heads\.res5\.|backbone\.", "bottlenecks on RoIs"),
    },
    "panoptic_deeplab_depthwise": {
        "SEM_SEG_HEAD": (r"sem_seg_head\.", "ASPP and decoder, depthwise convolutions"),
        "INS_EMBED_HEAD": (r"ins_embed_head\.", "the same, of instance centres"),
        "RESNETS": (r"backbone\.", "deep stem, dilated bottlenecks"),
    },
}
# In round r a model's i-th section has the norm (r + i) % 5, so every pair of section and norm
# occurs, and norms of different kinds follow each other. In these models one norm is everywhere:
EVERYWHERE = [
    *(("mask_rcnn_regnet", norm) for norm in OTHERS),  # norms beside their convolutions
    ("fcos", "KN"),
    ("fcos", "GKN"),
    ("faster_rcnn_fpn", "KN"),
    ("mask_rcnn", "GKN"),
    ("cascade_mask_rcnn", "MBN"),
    ("keypoint_rcnn", "BGN"),
    ("semantic_fpn", "BRN"),
    ("deeplab_v3", "KN"),
    ("deeplab_v3_plus", "GKN"),
    ("panoptic_deeplab", "MBN"),
]


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    import zoo_models

    import cbn_det

    cbn_det.register()
    yield zoo_models
    cbn_det.unregister()


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_with_cbn_at_every_norm_site(zoo, name, monkeypatch):
    from cbn_det.norms import check_bindings

    model = zoo.build(name, zoo.CBN)
    check_bindings(model)
    fed = check_two_steps(zoo, name, model, monkeypatch)
    layers = zoo.cbn_layers(model)
    assert len(layers) == MODELS[name]
    wrong = [n for n, m in layers.items() if m.conv is None or m.conv.weight is not fed[n]]
    assert not wrong, f"bound to another convolution than the one that feeds it: {wrong}"


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("turn", range(len(OTHERS)))
def test_two_steps_with_the_others_in_turn(zoo, name, turn, monkeypatch):
    kinds = {section: OTHERS[(turn + i) % len(OTHERS)] for i, section in enumerate(SITES[name])}
    specs = {section: zoo.NORMS[kind] for section, kind in kinds.items()}
    model = zoo.build(name, "BN", sections=specs)
    check_two_steps(zoo, name, model, monkeypatch)
    layers = zoo.our_layers(model)
    left = set(layers)
    for section, (pattern, _) in SITES[name].items():
        there = {n for n in left if re.match(pattern, n)}
        assert {type(layers[n]).__name__ for n in there} == {f"{kinds[section]}2d"}, section
        left -= there
    assert not left


@pytest.mark.parametrize(("name", "kind"), EVERYWHERE)
def test_two_steps_with_another_norm_at_every_norm_site(zoo, name, kind, monkeypatch):
    model = zoo.build(name, zoo.NORMS[kind])
    check_two_steps(zoo, name, model, monkeypatch)
    assert {type(m).__name__ for m in zoo.our_layers(model).values()} == {f"{kind}2d"}


# where nothing is predicted, in all of these models: stems, behind ASPP's global mean, and behind
# the gate of squeeze and excitation
_FIRST_OF_A_CHAIN = r".*\bstem\.(conv1\.norm|bn)|.*\bproject\.norm|.*\.c_bn"


def check_two_steps(zoo, name, model, monkeypatch) -> dict[str, nn.Parameter]:
    """Trains, and checks all that does not depend on the method, and that the method is at work.

    Returns:
        by norm, the weight of the convolution that fed it.
    """
    # detectron2's own "BN" shows where the norm sites are
    batchnorm = zoo.build(name, "BN")
    layers = zoo.our_layers(model)
    assert _sites(model, layers) == _sites(batchnorm, zoo.batchnorm_layers(batchnorm))
    assert _shapes(model, layers) == _shapes(batchnorm, layers)

    before = {key: value.clone() for key, value in model.named_parameters()}
    with zoo.convolutions_seen(model, monkeypatch) as fed:
        steps = zoo.train(model, 2)

    assert all(math.isfinite(loss) for step in steps for loss in step.values()), steps
    _check_at_work(layers, fed)
    # (a gamma may move by less than float32 shows at 1.0; its gradient is looked at below)
    still = {n: p for n, p in model.named_parameters() if torch.equal(p, before[n])}
    feeding = {id(weight) for weight in fed.values()}
    assert not [n for n, p in still.items() if id(p) in feeding]
    assert len(still) < 0.1 * len(before), list(still)
    for name_of, norm in _affine(model).items():
        for gradient in (norm.weight.grad, norm.bias.grad):
            assert gradient is not None and gradient.isfinite().all(), name_of
            assert gradient.count_nonzero() > 0, name_of
    assert all(value.isfinite().all() for value in model.buffers())

    kept = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(zoo.evaluate(model)) == 1
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, kept[k])] == []
    return fed


def _sites(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """Where the layers are; those of several levels at one place count once."""
    from detectron2.layers import CycleBatchNormList

    names = [
        (
            name.rpartition(".")[0]
            if isinstance(model.get_submodule(name.rpartition(".")[0]), CycleBatchNormList)
            else name
        )
        for name in layers
    ]
    return list(dict.fromkeys(names))


def _shapes(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, torch.Size]:
    """Of the state, without statistics where one of ``layers`` is a GroupNorm."""
    groupnorms = tuple(f"{n}." for n, m in layers.items() if isinstance(m, nn.GroupNorm))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {
        key: value.shape
        for key, value in model.state_dict().items()
        if not (key.startswith(groupnorms) and key.endswith(statistics))
    }


def _check_at_work(layers: dict[str, Any], fed: dict[str, nn.Parameter]) -> None:
    """After two steps, of which the first was committed when the second began."""
    for name, layer in layers.items():
        kind = type(layer).__name__.removesuffix("2d")
        if kind != "GKN":
            assert layer.num_batches_tracked == 2, name
        if kind in ("CBN", "MBN", "BRN"):
            assert layer.steps == 1, name
        if kind in ("CBN", "MBN"):
            assert len(layer.memory) == 1, name
        elif kind == "BGN":
            of_groups = layer.running_mean.unflatten(0, (4, -1))
            assert torch.equal(of_groups, of_groups[:, :1].expand_as(of_groups)), name
        elif kind == "BRN":
            assert layer.diagnostics and layer.memory.kept, name
        elif re.fullmatch(_FIRST_OF_A_CHAIN, name):
            assert not hasattr(layer.chain, "weight"), name
        else:  # KN and GKN
            assert layer.chain.weight.now() is fed[name], name
            assert "prediction_mean" in layer.diagnostics, name


def _affine(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold a norm's affine parameters: the norm, or the list of five levels."""
    from detectron2.layers import CycleBatchNormList

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, CycleBatchNormList))
        and getattr(module, "weight", None) is not None
    }


def test_compensation_needs_an_ordinary_convolution(zoo):
    from cbn_det.norms import check_bindings

    model = zoo.build("mask_rcnn_deformable", zoo.CBN)
    with pytest.raises(ValueError) as told:
        check_bindings(model)
    # res3 to res5 have 4 + 6 + 3 blocks, each with one deformable convolution
    assert "13 CBN layers" in str(told.value)
    assert "backbone.bottom_up.res3.0.conv2.norm" in str(told.value)
    assert "CBN(compensation='none')" in str(told.value)
    with pytest.raises(RuntimeError, match=r"CBN\(compensation='none'\)"):
        zoo.losses(model, zoo.random_inputs())


NEEDS_NO_CONVOLUTION = {"CBN": "CBN(burn_in=0, compensation='none')"}


@pytest.mark.parametrize("kind", ["CBN", "KN", "MBN"])
def test_after_deformable_convolutions(zoo, kind):
    model = zoo.build("mask_rcnn_deformable", {**zoo.NORMS, **NEEDS_NO_CONVOLUTION}[kind])
    batchnorm = zoo.build("mask_rcnn_deformable", "BN")
    layers = zoo.our_layers(model)
    assert list(layers) == list(zoo.batchnorm_layers(batchnorm))
    # detectron2 has no backward pass of this operator on CPU: forwards and empty steps
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for seed in range(2):
        with torch.enable_grad():
            terms = zoo.losses(model, zoo.random_inputs(seed))
        assert all(term.isfinite() for term in terms.values())
        optimizer.step()
    deformable = layers["backbone.bottom_up.res3.0.conv2.norm"]
    if kind == "KN":
        assert "not by a convolution" in deformable.chain.reason
        behind = model.backbone.bottom_up.res3[0].conv3
        assert behind.norm.chain.weight.now() is behind.weight
    else:
        assert getattr(deformable, "conv", None) is None and len(deformable.memory) == 1
    assert len(zoo.evaluate(model)) == 1


def test_simple_feature_pyramid(zoo):
    """ViTDet's neck, where one norm follows a transposed convolution."""
    pytest.importorskip("timm", reason="no training library: timm")  # its ViT imports it
    from detectron2.modeling import SimpleFeaturePyramid, ViT

    from cbn_det.norms import check_bindings, kn_chain

    def build(norm):
        torch.manual_seed(0)
        net = ViT(
            img_size=64, patch_size=16, embed_dim=32, depth=1, num_heads=2, out_feature="last"
        )
        return SimpleFeaturePyramid(
            net, "last", out_channels=8, scale_factors=(4.0, 2.0, 1.0, 0.5), norm=norm
        ).train()

    with pytest.raises(ValueError, match=r"1 CBN layers.*simfp_2\.1.*compensation='none'"):
        check_bindings(build(zoo.CBN))

    expected = list(zoo.batchnorm_layers(build("BN")))
    assert len(expected) == 9
    for kind, spec in {**zoo.NORMS, **NEEDS_NO_CONVOLUTION}.items():
        model = build(spec)
        check_bindings(model)
        layers = zoo.our_layers(model)
        assert list(layers) == expected
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(2):
            outputs = model(torch.randn(2, 3, 64, 64))
            optimizer.zero_grad()
            sum(out.square().mean() for out in outputs.values()).backward()
            optimizer.step()
        assert all(m.weight.grad.isfinite().all() for m in layers.values())
        if kind in ("CBN", "MBN"):
            assert all(len(m.memory) == 1 for m in layers.values())
        elif kind in ("KN", "GKN"):
            follows = {row.name: row.follows for row in kn_chain(model)}
            assert follows["simfp_2.1"] == "- (no rule for Convolution)"  # a transposed one
            assert follows["simfp_2.5.norm"] == "simfp_2.4.norm"
