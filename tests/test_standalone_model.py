"""The standalone engine's model: norms in place, one training step, predictions, config keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms import v2

from cbn_det.norms import CBN2d, kn_chain, norm_rows
from cbn_det.run.errors import ConfigError
from cbn_det.standalone import read_config
from cbn_det.standalone.config import _defaults
from cbn_det.standalone.model import BoxPredictor, MaskPredictor, build_model
from cbn_det.standalone.norm_layers import freeze

BASE = Path(__file__).resolve().parents[1] / "configs/quickstart/Base-RCNN-R18-FPN-digits.yaml"
SMALL = [
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    *("INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "128"),
]


def config(*opts: str, norm: str | None = None) -> CfgNode:
    sections = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    norms = [w for s in sections for w in (f"MODEL.{s}.NORM", norm or "")]
    return read_config(BASE, [*SMALL, *(norms if norm is not None else []), *opts])


def target(*boxes: tuple[float, float, float, float], label: int = 3) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), 96, 96, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.full((len(boxes),), label),
        "masks": masks,
    }


def images(number: int = 2) -> list[Tensor]:
    return [torch.rand(3, 96, 96) * 255 for _ in range(number)]


NORMS = ["", "BN", "SyncBN", "FrozenBN", "GN", "CBN(burn_in=0)", "CBN(compensation='none')"]


@pytest.mark.parametrize("norm", NORMS)
def test_training_step_and_prediction_with_each_norm(norm: str) -> None:
    model = build_model(config("MODEL.MASK_ON", "True", norm=norm))
    assert model.training
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    # an image without objects beside one with; then none at all, so that the mask head sees no RoI
    batches = [
        [target((10, 10, 60, 70), (30, 20, 90, 90)), target()],
        [target(), target()],
    ]
    for batch in batches:
        losses = model(images(), batch)
        assert set(losses) == {
            *("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"),
            "loss_mask",
        }
        assert all(loss.isfinite() for loss in losses.values())
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        if batch is batches[0]:
            moved = [p for p in model.roi_heads.mask_head.parameters() if p.grad.abs().max() > 0]
            assert moved
        optimizer.step()
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name

    model.eval()
    large = torch.rand(3, 120, 200) * 255
    for detections, (height, width) in zip(
        model([large, images()[0]]), [(120, 200), (96, 96)], strict=True
    ):
        assert detections["masks"].shape == (len(detections["boxes"]), 1, height, width)
        assert (detections["boxes"] >= 0).all()
        limits = torch.tensor([width, height, width, height])
        assert (detections["boxes"] <= limits + 1e-3).all()
    model.roi_heads.score_thresh = 1.0
    (nothing,) = model([large])
    assert len(nothing["boxes"]) == len(nothing["masks"]) == 0


@pytest.mark.parametrize(
    ("norm", "cls", "count"),
    [
        # ResNet-18 has 20 norms, the FPN 8, the heads 2 each
        ("BN", nn.BatchNorm2d, 32),
        ("SyncBN", nn.SyncBatchNorm, 32),
        ("FrozenBN", FrozenBatchNorm2d, 32),
        ("GN", nn.GroupNorm, 32),
        ("CBN(window=2)", CBN2d, 32),
        ("", nn.Identity, 20),
    ],
)
def test_norms_in_place(norm: str, cls: type[nn.Module], count: int) -> None:
    model = build_model(config("MODEL.MASK_ON", "True", norm=norm))
    found = [m for m in model.modules() if type(m) is cls]
    assert len(found) == count
    assert len(norm_rows(model)) == (count if norm else 0)
    biases = {
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None
    }
    predictors = {"rpn.head.conv.0.0", "rpn.head.cls_logits", "rpn.head.bbox_pred"}
    predictors.add("roi_heads.mask_predictor.2")
    assert (biases == predictors) == bool(norm)
    for layer in found:
        if cls is CBN2d:
            assert layer.options()["window"] == 2 and layer.conv is not None
        if cls is nn.GroupNorm:
            assert layer.num_groups == 32


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN", "CBN"])
@pytest.mark.parametrize("stages", [0, 1, 3])
def test_freeze_at(norm: str, stages: int) -> None:
    model = build_model(config("MODEL.BACKBONE.FREEZE_AT", str(stages), norm=norm))
    parts = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    for index, names in enumerate(parts):
        for part in (model.backbone.body[name] for name in names):
            frozen = index < stages
            assert all(p.requires_grad != frozen for p in part.parameters())
            for layer in part.modules():
                if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
                    assert not frozen
                if isinstance(layer, FrozenBatchNorm2d):
                    assert frozen
    assert all(p.requires_grad for p in model.backbone.fpn.parameters())
    if stages and norm == "CBN":  # the convolution has stopped feeding it
        assert not model.backbone.body["conv1"]._forward_pre_hooks


def test_freezing_keeps_what_a_norm_computes() -> None:
    for norm in (nn.BatchNorm2d(4, eps=0.1), CBN2d(4, eps=0.1), CBN2d(4, affine=False)):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        block = nn.Sequential(norm.eval())
        x = torch.randn(2, 4, 3, 3)
        expected = block(x).detach()
        torch.testing.assert_close(freeze(block).train()(x), expected)
        assert isinstance(block[0], FrozenBatchNorm2d)


def test_norm_that_cannot_have_these_channels() -> None:
    cfg = config("MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_BOX_HEAD.CONV_DIM", "40")
    with pytest.raises(ConfigError, match=r"MODEL\.ROI_BOX_HEAD\.NORM: .*40.*32"):
        build_model(cfg)


def test_predictors_pad_the_background() -> None:
    box = BoxPredictor(8, num_classes=3)
    nn.init.normal_(box.bbox_pred.bias)
    scores, deltas = box(torch.randn(5, 8))
    assert scores.shape == (5, 4) and deltas.shape == (5, 16)
    assert (deltas[:, :4] == 0).all() and (deltas[:, 4:] != 0).all()
    assert box(torch.empty(0, 8))[1].shape == (0, 16)
    mask = MaskPredictor(8, 6, num_classes=3)
    nn.init.normal_(mask[2].bias)
    logits = mask(torch.randn(5, 8, 7, 7))
    assert logits.shape == (5, 4, 14, 14)
    assert (logits[:, 0] == 0).all() and (logits[:, 1:] != 0).all()
    assert mask(torch.empty(0, 8, 7, 7)).shape == (0, 4, 14, 14)


@torch.no_grad()
def test_the_background_is_never_predicted_and_classes_keep_their_masks() -> None:
    model = build_model(config("MODEL.MASK_ON", "True", norm="GN")).eval()
    predictor, mask_logits = model.roi_heads.box_predictor, model.roi_heads.mask_predictor[2]
    nn.init.zeros_(predictor.cls_score.weight)
    nn.init.zeros_(mask_logits.weight)
    # logits of the background and classes 1 to 3: the background first, then class 2 leads
    predictor.cls_score.bias.data = torch.tensor([9.0, 0.0, 0.0, 0.0])
    (found,) = model(images(1))
    assert len(found["labels"]) == 0
    predictor.cls_score.bias.data = torch.tensor([9.0, -9.0, 9.0, -9.0])
    mask_logits.bias.data = torch.tensor([-9.0, 9.0, -9.0])
    (found,) = model(images(1))
    assert len(found["labels"]) and (found["labels"] == 2).all()
    torch.testing.assert_close(found["scores"], torch.full_like(found["scores"], 0.5))
    inside = found["masks"].amax(dim=(1, 2, 3))
    assert (inside > 0.9).all()  # class 2's mask, not its neighbours', which are empty


def test_labels_count_from_one_in_training() -> None:
    model = build_model(config(norm="GN"))
    predictor = model.roi_heads.box_predictor
    nn.init.zeros_(predictor.cls_score.weight)
    losses = {}
    for label in (1, 2, 3):
        predictor.cls_score.bias.data = torch.zeros(4).index_fill_(0, torch.tensor(label), 20.0)
        model.rpn._post_nms_top_n["training"] = 1
        # all but one RoI is the ground truth itself
        boxes = [(4.0, 4.0, 90.0, 90.0)] * 20
        losses[label] = [
            model(images(1), [target(*boxes, label=other)])["loss_classifier"].item()
            for other in (1, 2, 3)
        ]
    for label, values in losses.items():
        assert min(range(1, 4), key=lambda other: values[other - 1]) == label


def test_training_does_not_resize_and_evaluation_does() -> None:
    model = build_model(config("MODEL.PIXEL_MEAN", "[10.0, 20.0, 30.0]", norm="BN"))
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.full((3, 70, 90), 74.0)
    model([image], [target((10, 10, 60, 60))])
    (batch,) = seen
    assert batch.shape == (1, 3, 96, 96)  # padded to a multiple of 32 only
    expected = torch.tensor([1.0, 54 / 64, 44 / 64])
    torch.testing.assert_close(batch[0, :, 69, 89], expected)
    assert (batch[0, :, 70:] == 0).all() and (batch[0, :, :, 90:] == 0).all()
    model.eval()([image])
    assert seen[1].shape == (1, 3, 96, 128)  # shortest side 96: 96 x 123


def test_poolers_know_their_strides_whatever_they_see_first() -> None:
    model = build_model(config("MODEL.MASK_ON", "True", norm="BN"))
    tiny = torch.rand(3, 34, 34) * 255  # padded to 64
    model([tiny], [{**target((2, 2, 30, 30)), "masks": torch.ones(1, 34, 34, dtype=torch.uint8)}])
    for pooler in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pooler.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def fingerprint(model: GeneralizedRCNN) -> str:
    """Everything about a model that a config key may decide, but for its weights' values."""
    heads, rpn, transform = model.roi_heads, model.rpn, model.transform
    parts: list[Any] = [str(model), [p.requires_grad for p in model.parameters()]]
    parts += [transform.min_size, transform.max_size, transform.image_mean, transform.image_std]
    for module in (rpn, heads):
        matcher, sampler = module.proposal_matcher, module.fg_bg_sampler
        parts += [matcher.low_threshold, matcher.high_threshold, sampler.positive_fraction]
        parts += [sampler.batch_size_per_image, module.nms_thresh, module.box_coder.weights]
    parts += [rpn._pre_nms_top_n, rpn._post_nms_top_n, rpn.anchor_generator.cell_anchors]
    parts += [heads.score_thresh, heads.detections_per_img]
    return repr(parts)


def test_paired_settings_are_not_swapped() -> None:
    opts = ["MODEL.RPN.IOU_THRESHOLDS", "[0.1, 0.2]", "MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.6]"]
    opts += ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", "1", "MODEL.RPN.PRE_NMS_TOPK_TEST", "2"]
    opts += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", "3", "MODEL.RPN.POST_NMS_TOPK_TEST", "4"]
    model = build_model(config(*opts))
    rpn, heads = model.rpn.proposal_matcher, model.roi_heads.proposal_matcher
    assert (rpn.low_threshold, rpn.high_threshold) == (0.1, 0.2)
    assert (heads.low_threshold, heads.high_threshold) == (0.6, 0.6)
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (1, 3)
    model.eval()
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (2, 4)


CHANGES = {
    "MODEL.PIXEL_MEAN": "[1.0, 2.0, 3.0]",
    "MODEL.PIXEL_STD": "[1.0, 2.0, 3.0]",
    "MODEL.MASK_ON": "False",
    "MODEL.BACKBONE.FREEZE_AT": "1",
    "MODEL.RESNETS.DEPTH": "34",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": "64",
    "MODEL.FPN.NORM": "BN",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[8]]",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "[[1.0]]",
    "MODEL.RPN.IOU_THRESHOLDS": "[0.2, 0.6]",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": "7",
    "MODEL.RPN.POSITIVE_FRACTION": "0.1",
    "MODEL.RPN.NMS_THRESH": "0.1",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "7",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "7",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "7",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "7",
    "MODEL.ROI_HEADS.NUM_CLASSES": "7",
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": "[0.4]",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "7",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": "0.1",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.1",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "0.1",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": "1",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "64",
    "MODEL.ROI_BOX_HEAD.NUM_FC": "2",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "64",
    "MODEL.ROI_BOX_HEAD.NORM": "BN",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": "5",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "2",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "(1.0, 1.0, 1.0, 1.0)",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": "1",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "64",
    "MODEL.ROI_MASK_HEAD.NORM": "BN",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": "5",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": "2",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "256",
    "TEST.DETECTIONS_PER_IMAGE": "7",
}
R50 = [
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"),
    *("MODEL.RESNETS.STRIDE_IN_1X1", "False"),
]
BOTTLENECK_CHANGES = {"MODEL.RESNETS.NUM_GROUPS": "2", "MODEL.RESNETS.WIDTH_PER_GROUP": "32"}
# decided elsewhere, or with one possible value once the others are set
NOT_HERE = {
    *("MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME"),
    *("MODEL.RESNETS.OUT_FEATURES", "MODEL.FPN.IN_FEATURES", "MODEL.RPN.IN_FEATURES"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "MODEL.ROI_HEADS.NAME", "MODEL.ROI_BOX_HEAD.NAME"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MODEL.RESNETS.RES2_OUT_CHANNELS"),
    "MODEL.RESNETS.STRIDE_IN_1X1",
}


def model_keys(node: CfgNode, prefix: str) -> set[str]:
    keys = set()
    for key, value in node.items():
        path = f"{prefix}.{key}"
        keys |= model_keys(value, path) if isinstance(value, CfgNode) else {path}
    return keys


def test_every_model_key_changes_the_model() -> None:
    keys = model_keys(CfgNode(_defaults("honoured")).MODEL, "MODEL")
    assert keys == {
        key for key in {*CHANGES, *BOTTLENECK_CHANGES, *NOT_HERE} if key.startswith("MODEL.")
    }
    for base, changes in (([], CHANGES), (R50, BOTTLENECK_CHANGES)):
        opts = [*base, "MODEL.MASK_ON", "True"]
        before = fingerprint(build_model(config(*opts, norm="GN")))
        for key, value in changes.items():
            after = fingerprint(build_model(config(*opts, key, value, norm="GN")))
            assert after != before, key


@pytest.mark.parametrize(
    ("smallest", "largest", "expected"),
    [(40, 40, (30, 40)), (40, 60, (40, 53)), (60, 1000, (60, 80)), (120, 120, (90, 120))],
)
def test_images_to_evaluate_are_resized_as_those_to_train_on(
    smallest: int, largest: int, expected: tuple[int, int]
) -> None:
    """With antialiasing, and also where shortest and longest side may be equally long."""
    words = ("INPUT.MIN_SIZE_TEST", str(smallest), "INPUT.MAX_SIZE_TEST", str(largest))
    transform = build_model(config(*words)).eval().transform
    image = torch.rand(3, 90, 120) * 255
    resized, target = transform.resize(image)
    assert tuple(resized.shape[1:]) == expected and target is None
    assert torch.equal(resized, v2.functional.resize(image, list(expected), antialias=True))
    assert transform.train().resize(image)[0] is image


def test_kalman_norms_look_through_the_frozen_stem_in_training() -> None:
    model = build_model(config("MODEL.BACKBONE.FREEZE_AT", "2", norm="KN"))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.copy_(torch.randn(module.weight.shape, generator=generator))
    assert {row.follows for row in kn_chain(model)} == {"?"}
    sum(model(images(), [target((10, 10, 60, 70))] * 2).values()).backward()
    rows = {row.name: row.follows for row in kn_chain(model)}
    assert rows["backbone.body.layer2.0.bn1"].startswith("relu(backbone.body.layer1.1.bn2 + ")
    assert not [name for name, follows in rows.items() if follows.startswith(("-", "?"))]


@torch.no_grad()
def test_gkn_evaluates_in_a_model_that_has_not_trained() -> None:
    model = build_model(config(norm="GKN(groups=4)")).eval()
    model(images())
    rows = {row.name: row.follows for row in kn_chain(model)}
    assert rows["backbone.body.layer2.0.bn1"].startswith("relu(backbone.body.layer1.1.bn2 + ")
    assert "?" not in rows.values()
