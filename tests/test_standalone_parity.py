"""Both engines build the same network from one config; detectron2 is the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_parity as parity
import pytest
import torch
from torch import nn

from cbn_det.norms import norm_diagnostics
from cbn_det.standalone import read_config
from cbn_det.standalone.model import build_model

pytestmark = pytest.mark.detectron2

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
R50 = [
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"),
    *("MODEL.RESNETS.STRIDE_IN_1X1", "False"),
]
NO_NORM = [
    word
    for section in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    for word in (f"MODEL.{section}.NORM", "")
]
MASK_CBN = "mask_rcnn_R_18_FPN_digits_cbn"
CASES = {
    **{
        f"{kind}_{norm}": (f"{kind}_rcnn_R_18_FPN_digits_{norm}", [])
        for kind in ("faster", "mask")
        for norm in ("bn", "gn", "cbn")
    },
    "finetune": ("finetune_faster_rcnn_R_18_FPN_digits_cbn", []),
    "freeze_cbn": (MASK_CBN, ["MODEL.BACKBONE.FREEZE_AT", "2"]),
    "freeze_gn": ("faster_rcnn_R_18_FPN_digits_gn", ["MODEL.BACKBONE.FREEZE_AT", "3"]),
    "syncbn": ("faster_rcnn_R_18_FPN_digits_gn", ["MODEL.FPN.NORM", "SyncBN"]),
    "no_norm": (MASK_CBN, NO_NORM),
    "r50": (MASK_CBN, R50),
    "resnext": (MASK_CBN, [*R50, "MODEL.RESNETS.NUM_GROUPS", "4"]),
    "heads": (
        MASK_CBN,
        [
            *("MODEL.ROI_BOX_HEAD.NUM_FC", "2", "MODEL.ROI_MASK_HEAD.CONV_DIM", "64"),
            *("MODEL.ROI_BOX_HEAD.CONV_DIM", "96", "MODEL.FPN.OUT_CHANNELS", "64"),
        ],
    ),
    "fc_only": (
        "faster_rcnn_R_18_FPN_digits_gn",
        ["MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NORM", ""],
    ),
    "conv_only": (MASK_CBN, ["MODEL.ROI_BOX_HEAD.NUM_FC", "0"]),
}


@pytest.fixture(autouse=True)
def _norms_in_detectron2() -> Iterator[None]:
    from cbn_det.plugin.registry import register, unregister

    register()
    yield
    unregister()


def both(name: str, opts: list[str]) -> tuple[nn.Module, nn.Module, Any]:
    """detectron2's model, ours with the same weights, and our config."""
    import detectron2.config
    from detectron2.modeling import build_model as build_detectron2

    path = CONFIGS / f"{name}.yaml"
    theirs_cfg = detectron2.config.get_cfg()
    theirs_cfg.merge_from_file(str(path))
    theirs_cfg.merge_from_list([*opts, "MODEL.DEVICE", "cpu"])
    cfg = read_config(path, opts)
    theirs, ours = build_detectron2(theirs_cfg), build_model(cfg)
    state = parity.our_state(theirs.state_dict(), cfg.MODEL.ROI_BOX_HEAD.NUM_CONV)
    ours.load_state_dict(state)  # strict: the same tensors, of the same shapes
    return theirs, ours, cfg


def is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return ("Norm" in name or "CBN" in name) and not list(module.children())


@pytest.mark.parametrize("case", CASES)
def test_same_parameters_and_norm_sites(case: str) -> None:
    theirs, ours, cfg = both(*CASES[case])
    convs = cfg.MODEL.ROI_BOX_HEAD.NUM_CONV
    our_modules = dict(ours.named_modules())

    def count(model: nn.Module, *prefixes: str) -> tuple[int, int]:
        chosen = [p for name, p in model.named_parameters() if name.startswith(prefixes)]
        return sum(p.numel() for p in chosen), sum(p.numel() for p in chosen if p.requires_grad)

    for our_part, their_part in {
        "backbone.body": "backbone.bottom_up",
        "backbone.fpn": "backbone.fpn",
        "rpn": "proposal_generator",
        "roi_heads.box_head": "roi_heads.box_head",
        "roi_heads.box_predictor": "roi_heads.box_predictor",
        "roi_heads.mask": "roi_heads.mask",
        "": "",
    }.items():
        assert count(ours, our_part) == count(theirs, their_part), our_part

    their_sites, our_sites = {}, {}
    for name, module in theirs.named_modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, nn.Conv2d) and norm is not None:
            conv = parity.our_layer(name, convs)
            their_sites[conv] = parity.norm_site(module, norm)
            our_sites[conv] = parity.norm_site(
                our_modules[conv], our_modules[parity.our_norm(conv)]
            )
    assert our_sites == their_sites
    assert sum(map(is_norm, ours.modules())) == len(our_sites)
    for conv in our_sites:
        norm = our_modules[parity.our_norm(conv)]
        if getattr(norm, "needs_conv", False):
            assert norm.conv is our_modules[conv]


IMAGES = (2, 3, 96, 160)


def feature_maps(backbone: nn.Module, training: bool) -> tuple[list[Any], list[Any]]:
    """Maps and gradients of three optimiser steps: a norm's memory has then done its part."""
    generator = torch.Generator().manual_seed(1)
    backbone.train(training)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-3)
    maps, gradients = [], []
    for _ in range(3 if training else 1):
        features = list(backbone(torch.randn(IMAGES, generator=generator)).values())
        maps += [f.detach() for f in features]
        optimizer.zero_grad()
        sum((f * torch.randn(f.shape, generator=generator)).mean() for f in features).backward()
        gradients += [p.grad for n, p in backbone.named_parameters() if n.endswith("conv1.weight")]
        optimizer.step()
    return maps, gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("faster_rcnn_R_18_FPN_digits_bn", []),
        ("faster_rcnn_R_18_FPN_digits_gn", []),
        (
            "faster_rcnn_R_18_FPN_digits_gn",
            [
                *("MODEL.RESNETS.NORM", "CBN(window=3, burn_in=0)"),
                *("MODEL.FPN.NORM", "CBN(window=3, burn_in=0)"),
            ],
        ),
        ("finetune_faster_rcnn_R_18_FPN_digits_bn", []),
        ("faster_rcnn_R_18_FPN_digits_bn", R50),
        (MASK_CBN, NO_NORM),
    ],
    ids=["bn", "gn", "cbn", "finetune", "r50", "no_norm"],
)
def test_same_feature_maps_and_gradients(name: str, opts: list[str], training: bool) -> None:
    theirs, ours, ours_cfg = both(name, opts)
    their_maps, their_gradients = feature_maps(theirs.backbone, training)
    our_maps, our_gradients = feature_maps(ours.backbone, training)
    assert len(our_maps) == (15 if training else 5)
    remembers = "burn_in=0" in ours_cfg.MODEL.FPN.NORM and training
    assert bool(norm_diagnostics(ours)) == remembers
    for mine, reference in zip(our_maps, their_maps, strict=True):
        scale = reference.abs().max().item()
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4 * scale)
    for mine, reference in zip(our_gradients, their_gradients, strict=True):
        if reference is None:
            assert mine is None
            continue
        scale = reference.abs().max().item()
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("training", [True, False])
def test_same_head_outputs(training: bool) -> None:
    theirs, ours, cfg = both(MASK_CBN, ["MODEL.ROI_BOX_HEAD.NUM_FC", "2"])
    theirs.train(training), ours.train(training)
    their_heads, our_heads = theirs.roi_heads, ours.roi_heads
    rois = torch.randn(6, cfg.MODEL.FPN.OUT_CHANNELS, 7, 7)
    scores, deltas = their_heads.box_predictor(their_heads.box_head(rois.clone()))
    our_scores, our_deltas = our_heads.box_predictor(our_heads.box_head(rois.clone()))
    torch.testing.assert_close(our_scores, scores.roll(1, dims=1))
    torch.testing.assert_close(our_deltas[:, 4:], deltas)

    rois = torch.randn(6, cfg.MODEL.FPN.OUT_CHANNELS, 14, 14)
    masks = their_heads.mask_head.layers(rois.clone())
    our_masks = our_heads.mask_predictor(our_heads.mask_head(rois.clone()))
    torch.testing.assert_close(our_masks[:, 1:], masks)

    features = [torch.randn(2, cfg.MODEL.FPN.OUT_CHANNELS, s, s) for s in (8, 4)]
    objectness, anchor_deltas = theirs.proposal_generator.rpn_head(features)
    our_objectness, our_anchor_deltas = ours.rpn.head(features)
    torch.testing.assert_close(our_objectness, objectness)
    torch.testing.assert_close(our_anchor_deltas, anchor_deltas)


def test_same_spread_of_initial_weights() -> None:
    theirs, ours, cfg = both(MASK_CBN, [])
    fresh = dict(build_model(cfg).named_parameters())
    for name, parameter in ours.named_parameters():  # detectron2's initial weights
        expected, found = parameter.std().item(), fresh[name].std().item()
        if parameter.dim() > 1:
            assert found == pytest.approx(expected, rel=0.1), name
            assert fresh[name].mean().item() == pytest.approx(0, abs=0.1 * expected), name
        else:
            torch.testing.assert_close(fresh[name], parameter, msg=name)


@pytest.mark.parametrize("opts", [[], ["MODEL.ANCHOR_GENERATOR.SIZES", "[[20, 40]]"]])
def test_anchors_are_detectron2s_rounded(opts: list[str]) -> None:
    from torchvision.models.detection.image_list import ImageList

    theirs, ours, _ = both("faster_rcnn_R_18_FPN_digits_bn", opts)
    # a side of 128 gives p5 an even number of rows: torchvision's spacing on p6 is right then
    sides = [128 // stride for stride in (4, 8, 16, 32, 64)]
    features = [torch.zeros(1, 1, side, side) for side in sides]
    reference = [a.tensor for a in theirs.proposal_generator.anchor_generator(features)]
    images = ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)])
    (anchors,) = ours.rpn.anchor_generator(images, features)
    assert anchors.shape == torch.cat(reference).shape
    for mine, expected in zip(
        anchors.split([len(level) for level in reference]), reference, strict=True
    ):
        difference = torch.cdist(mine, expected, p=float("inf")).min(dim=1).values
        assert difference.max() <= 0.5
