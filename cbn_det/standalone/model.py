"""Faster and Mask R-CNN with ResNet-FPN from torchvision's parts, as a config describes them.

Architecture, number of parameters, initial weights and norm sites are those that detectron2 builds
from the same config. What torchvision's parts do otherwise than detectron2's:

- RoIAlign samples half a feature cell further right and down (``aligned=False``; detectron2's
  default pooler is ``ROIAlignV2``, which is aligned);
- box losses are smooth L1 with beta 1/9 (detectron2's default is beta 0, plain L1);
- RPN losses are divided by the number of anchors sampled (detectron2: by
  ``RPN.BATCH_SIZE_PER_IMAGE`` times the images, which is more where an image has fewer anchors);
- anchors are rounded to whole pixels, and their spacing is the padded image's size divided by the
  feature's: on p6 that is less than 64 pixels where p5 has an odd number of rows or columns;
- the targets of masks are averages of the ground truth over a cell, not 0 or 1;
- proposals thinner than 0.001 pixels and detections thinner than 0.01 are dropped (detectron2: 0);
- proposals that are not finite are dropped in training too, where detectron2 raises.

torchvision counts the background as class 0 and gives it four box deltas and a mask of its own,
which nothing ever reads; detectron2 doesn't. The predictors here have detectron2's outputs and put
zeros where torchvision's code expects the background's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2

from ..norms import check_bindings, find_chain_at_call
from ..run.errors import ConfigError
from .norm_layers import NormLayer, freeze, norm_builder

#: probability from which a pixel is of the object, in evaluation and in prediction
MASK_THRESHOLD = 0.5

# torchvision's names of what FREEZE_AT counts, and of what detectron2 calls res2 to res5
_STEM = ("conv1", "bn1")
_STAGES = ("layer1", "layer2", "layer3", "layer4")


def build_model(cfg: CfgNode) -> GeneralizedRCNN:
    """Builds the detector that a config describes, on the CPU, in training mode, with initial
    weights.

    In training mode ``model(images, targets)`` gives a dict of losses; images are float [3, H, W]
    of values 0..255 and already of their training size. In evaluation mode ``model(images)`` gives
    for each image, resized to ``INPUT.MIN_SIZE_TEST`` in between, a dict of boxes [n, 4] and masks
    [n, 1, H, W] in pixels of the image as it came, labels (from 1) and scores [n].

    Args:
        cfg: from :func:`~cbn_det.standalone.config.read_config`.

    Raises:
        ConfigError: a norm that cannot have a layer's number of channels, or that is bound to no
            convolution; names the config key.
    """
    transform = _Transform(
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        image_mean=cfg.MODEL.PIXEL_MEAN,
        image_std=cfg.MODEL.PIXEL_STD,
    )
    model = GeneralizedRCNN(_backbone(cfg), _rpn(cfg), _roi_heads(cfg), transform)
    try:
        check_bindings(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    find_chain_at_call(model)
    return model


class _Transform(GeneralizedRCNNTransform):
    """Resizes as the training data are resized, with antialiasing; torchvision's own does without,
    and a detector loses AP on images that look otherwise than those it has learned from."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.training:  # the data loader has done it
            return image, target
        return v2.RandomShortestSize(self.min_size[-1], self.max_size)(image), target


class BoxPredictor(nn.Module):
    """Class scores and box deltas of RoIs.

    Args:
        in_channels: length of an RoI's feature vector.
        num_classes: K, without background.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, num_classes * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[n, in_channels] to class logits [n, 1 + K], background first, and deltas
        [n, (1 + K) * 4], the background's zero."""
        return self.cls_score(features), F.pad(self.bbox_pred(features), (4, 0))


class MaskPredictor(nn.Sequential):
    """Mask logits of RoIs, at twice the resolution of their features.

    Args:
        in_channels: channels of an RoI's features.
        hidden_channels: channels after the upsampling.
        num_classes: K, without background.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_classes: int) -> None:
        deconv = nn.ConvTranspose2d(in_channels, hidden_channels, kernel_size=2, stride=2)
        logits = nn.Conv2d(hidden_channels, num_classes, kernel_size=1)
        super().__init__(deconv, nn.ReLU(inplace=True), logits)
        nn.init.kaiming_normal_(deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(logits.weight, std=0.001)
        nn.init.zeros_(deconv.bias)
        nn.init.zeros_(logits.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_channels, s, s] to [n, 1 + K, 2s, 2s]; channel 0, the background's, is zero."""
        return F.pad(super().forward(features), (0, 0, 0, 0, 1, 0))


def _norm(cfg: CfgNode, section: str) -> NormLayer:
    return norm_builder(f"MODEL.{section}.NORM", cfg.MODEL[section].NORM)


def _backbone(cfg: CfgNode) -> BackboneWithFPN:
    node = cfg.MODEL.RESNETS
    resnet = torchvision.models.get_model(
        f"resnet{node.DEPTH}",
        weights=None,
        groups=node.NUM_GROUPS,
        width_per_group=node.WIDTH_PER_GROUP,
        # convolutions of a ResNet have no bias, with a norm or without; Identity takes any argument
        norm_layer=_norm(cfg, "RESNETS") or nn.Identity,
    )
    parts = [_STEM, *((stage,) for stage in _STAGES)]
    for part in parts[: cfg.MODEL.BACKBONE.FREEZE_AT]:
        for name in part:
            setattr(resnet, name, freeze(getattr(resnet, name)))
    return BackboneWithFPN(
        resnet,
        return_layers=dict(zip(_STAGES, cfg.MODEL.ROI_HEADS.IN_FEATURES, strict=True)),
        in_channels_list=[node.RES2_OUT_CHANNELS * 2**level for level in range(len(_STAGES))],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=_norm(cfg, "FPN"),
    )


def _rpn(cfg: CfgNode) -> RegionProposalNetwork:
    node, anchors, levels = (
        cfg.MODEL.RPN,
        cfg.MODEL.ANCHOR_GENERATOR,
        len(cfg.MODEL.RPN.IN_FEATURES),
    )

    def for_each_level(lists: list[list[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(map(tuple, lists * levels if len(lists) == 1 else lists))

    generator = AnchorGenerator(
        for_each_level(anchors.SIZES), for_each_level(anchors.ASPECT_RATIOS)
    )
    background, foreground = node.IOU_THRESHOLDS
    return RegionProposalNetwork(
        generator,
        RPNHead(cfg.MODEL.FPN.OUT_CHANNELS, generator.num_anchors_per_location()[0]),
        fg_iou_thresh=foreground,
        bg_iou_thresh=background,
        batch_size_per_image=node.BATCH_SIZE_PER_IMAGE,
        positive_fraction=node.POSITIVE_FRACTION,
        pre_nms_top_n={"training": node.PRE_NMS_TOPK_TRAIN, "testing": node.PRE_NMS_TOPK_TEST},
        post_nms_top_n={"training": node.POST_NMS_TOPK_TRAIN, "testing": node.POST_NMS_TOPK_TEST},
        nms_thresh=node.NMS_THRESH,
    )


def _roi_heads(cfg: CfgNode) -> RoIHeads:
    node, box, channels = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.FPN.OUT_CHANNELS
    head = FastRCNNConvFCHead(
        (channels, box.POOLER_RESOLUTION, box.POOLER_RESOLUTION),
        [box.CONV_DIM] * box.NUM_CONV,
        [box.FC_DIM] * box.NUM_FC,
        _norm(cfg, "ROI_BOX_HEAD"),
    )
    features = (box.CONV_DIM if box.NUM_CONV else channels) * box.POOLER_RESOLUTION**2
    for layer in head:
        if isinstance(layer, nn.Linear):  # detectron2's initial weights
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
            features = layer.out_features
    (threshold,) = node.IOU_THRESHOLDS
    return RoIHeads(
        _pooler(cfg, "ROI_BOX_HEAD"),
        head,
        BoxPredictor(features, node.NUM_CLASSES),
        fg_iou_thresh=threshold,
        bg_iou_thresh=threshold,
        batch_size_per_image=node.BATCH_SIZE_PER_IMAGE,
        positive_fraction=node.POSITIVE_FRACTION,
        bbox_reg_weights=box.BBOX_REG_WEIGHTS,
        score_thresh=node.SCORE_THRESH_TEST,
        nms_thresh=node.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        **(_mask_branch(cfg) if cfg.MODEL.MASK_ON else {}),
    )


def _mask_branch(cfg: CfgNode) -> dict[str, nn.Module]:
    node, channels = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.FPN.OUT_CHANNELS
    layers = [node.CONV_DIM] * node.NUM_CONV
    return {
        "mask_roi_pool": _pooler(cfg, "ROI_MASK_HEAD"),
        "mask_head": MaskRCNNHeads(channels, layers, 1, _norm(cfg, "ROI_MASK_HEAD")),
        "mask_predictor": MaskPredictor(
            layers[-1] if layers else channels, node.CONV_DIM, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        ),
    }


def _pooler(cfg: CfgNode, section: str) -> MultiScaleRoIAlign:
    node, names = cfg.MODEL[section], cfg.MODEL.ROI_HEADS.IN_FEATURES
    pooler = MultiScaleRoIAlign(names, node.POOLER_RESOLUTION, node.POOLER_SAMPLING_RATIO)
    # It takes the strides of its features from the first batch it sees, by the size of the images
    # without their padding: wrong for good if that is small. Here it sees them without padding.
    side = 64
    features = {
        name: torch.zeros(1, 1, side // stride, side // stride)
        for name, stride in zip(names, (4, 8, 16, 32), strict=True)
    }
    pooler(features, [torch.zeros(1, 4)], [(side, side)])
    return pooler
