"""What the values of a standalone config may be."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

from fvcore.common.config import CfgNode

from ..run.errors import ConfigError
from .norm_layers import check_norm

RES_FEATURES = ["res2", "res3", "res4", "res5"]
ROI_FEATURES = ["p2", "p3", "p4", "p5"]
RPN_FEATURES = [*ROI_FEATURES, "p6"]

#: the values that a key may have, of those that detectron2 knows
_CHOICES: dict[str, tuple[Any, ...]] = {
    "VERSION": (2,),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.BACKBONE.NAME": ("build_resnet_fpn_backbone",),
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": (RES_FEATURES,),
    "MODEL.FPN.IN_FEATURES": (RES_FEATURES,),
    "MODEL.RPN.IN_FEATURES": (RPN_FEATURES,),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads",),
    "MODEL.ROI_HEADS.IN_FEATURES": (ROI_FEATURES,),
    "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead",),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _at_least(bound: int) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and value >= bound


def _share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _all(of_one: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def check(values: Any) -> bool:
        return (
            isinstance(values, (list, tuple))
            and bool(values)
            and length in (None, len(values))
            and all(map(of_one, values))
        )

    return check


def _thresholds(values: Any) -> bool:
    return _all(_share, 2)(values) and values[0] <= values[1]


_FROM_ONE = (_at_least(1), "a number of at least 1")
_FROM_ZERO = (_at_least(0), "a number of at least 0")
_SHARE = (_share, "a number from 0 to 1")
_POSITIVE = (_positive, "a positive number")
_LEVELS = (_all(_all(_positive)), "a list of lists of positive numbers")

#: the range of a key's value, as a test and in words
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "MODEL.PIXEL_MEAN": (_all(_is_number, 3), "a number for each of the 3 channels"),
    "MODEL.PIXEL_STD": (_all(_positive, 3), "a positive number for each of the 3 channels"),
    "MODEL.RESNETS.NUM_GROUPS": _FROM_ONE,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _FROM_ONE,
    "MODEL.FPN.OUT_CHANNELS": _FROM_ONE,
    "MODEL.ANCHOR_GENERATOR.SIZES": _LEVELS,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _LEVELS,
    "MODEL.RPN.IOU_THRESHOLDS": (
        _thresholds,
        "two numbers from 0 to 1, ascending",
    ),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _FROM_ONE,
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _FROM_ONE,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _FROM_ONE,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _FROM_ONE,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _FROM_ONE,
    "MODEL.ROI_HEADS.NUM_CLASSES": _FROM_ONE,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": (_all(_share, 1), "a list of one number from 0 to 1"),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _FROM_ONE,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _FROM_ZERO,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _FROM_ONE,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _FROM_ZERO,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _FROM_ONE,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _FROM_ONE,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _FROM_ZERO,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (_all(_positive, 4), "4 positive numbers"),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _FROM_ZERO,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _FROM_ONE,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _FROM_ONE,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _FROM_ZERO,
    "DATALOADER.NUM_WORKERS": _FROM_ZERO,
    "INPUT.MIN_SIZE_TRAIN": (_all(_at_least(1)), "sizes of at least 1 pixel"),
    "INPUT.MAX_SIZE_TRAIN": _FROM_ONE,
    "INPUT.MIN_SIZE_TEST": _FROM_ONE,
    "INPUT.MAX_SIZE_TEST": _FROM_ONE,
    "SOLVER.IMS_PER_BATCH": _FROM_ONE,
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.MAX_ITER": _FROM_ONE,
    "SOLVER.STEPS": (lambda steps: all(map(_at_least(0), steps)), "a list of iterations"),
    "SOLVER.GAMMA": _POSITIVE,
    "SOLVER.MOMENTUM": _SHARE,
    "SOLVER.WEIGHT_DECAY": _FROM_ZERO,
    "SOLVER.WEIGHT_DECAY_NORM": _FROM_ZERO,
    "SOLVER.WARMUP_ITERS": _FROM_ZERO,
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CHECKPOINT_PERIOD": _FROM_ONE,
    "TEST.DETECTIONS_PER_IMAGE": _FROM_ONE,
    "TEST.EVAL_PERIOD": _FROM_ZERO,
}


def check_values(cfg: CfgNode) -> None:
    """Checks the values of a config whose keys and types are right.

    Raises:
        ConfigError: names the first key whose value this engine cannot honour, and what is
            possible.
    """
    for key, value in _items(cfg):
        if value is None:
            raise ConfigError(f"{key} has no value")
        if key in _CHOICES and value not in _CHOICES[key]:
            choices = " or ".join(repr(choice) for choice in _CHOICES[key])
            raise _unsupported(key, value, choices)
        if key in _RANGES and not _RANGES[key][0](value):
            raise ConfigError(f"{key} is {value!r}, expected {_RANGES[key][1]}")
    _check_resnet(cfg)
    _check_anchors(cfg)
    _check_norms(cfg)
    if cfg.MODEL.ROI_BOX_HEAD.NUM_CONV + cfg.MODEL.ROI_BOX_HEAD.NUM_FC == 0:
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.NUM_CONV and MODEL.ROI_BOX_HEAD.NUM_FC are both 0: the box head"
            " needs a layer"
        )


def norms_in_use(cfg: CfgNode) -> dict[str, str]:
    """The ``*NORM`` keys that the configured model reads, with their values."""
    sections = ["RESNETS", "FPN", "ROI_BOX_HEAD"] + ["ROI_MASK_HEAD"] * cfg.MODEL.MASK_ON
    return {f"MODEL.{section}.NORM": cfg.MODEL[section].NORM for section in sections}


def _check_norms(cfg: CfgNode) -> None:
    for section in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        check_norm(f"MODEL.{section}.NORM", cfg.MODEL[section].NORM)
    for key, norm in norms_in_use(cfg).items():
        section = key.split(".")[1]
        if norm and cfg.MODEL[section].get("NUM_CONV") == 0:
            raise ConfigError(
                f"{key} is {norm!r}, but with MODEL.{section}.NUM_CONV 0 there is no layer for it"
            )


def _items(node: CfgNode, prefix: str = "") -> list[tuple[str, Any]]:
    items = []
    for key, value in node.items():
        path = f"{prefix}{key}"
        items += _items(value, f"{path}.") if isinstance(value, CfgNode) else [(path, value)]
    return items


def _unsupported(key: str, value: Any, possible: str) -> ConfigError:
    return ConfigError(
        f"{key} is {value!r}: the standalone engine takes {possible}; --engine detectron2 takes"
        " more"
    )


def _check_resnet(cfg: CfgNode) -> None:
    """torchvision's residual networks have fixed widths, and the stride in the 3x3 convolution."""
    node = cfg.MODEL.RESNETS
    basic = node.DEPTH < 50
    needed = {"RES2_OUT_CHANNELS": 64 if basic else 256}
    if basic:
        needed |= {"NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64}
    else:
        needed["STRIDE_IN_1X1"] = False
    for key, value in needed.items():
        if node[key] != value:
            raise _unsupported(
                f"MODEL.RESNETS.{key}",
                node[key],
                f"{value!r} with MODEL.RESNETS.DEPTH {node.DEPTH}",
            )


def _check_anchors(cfg: CfgNode) -> None:
    levels = len(cfg.MODEL.RPN.IN_FEATURES)
    node = cfg.MODEL.ANCHOR_GENERATOR
    for key in ("SIZES", "ASPECT_RATIOS"):
        if len(node[key]) not in (1, levels):
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(node[key])} lists, expected one for all"
                f" features or one for each of the {levels} in MODEL.RPN.IN_FEATURES"
            )
        if len({len(of_level) for of_level in node[key]}) > 1:
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{key} has lists of different lengths: all features share"
                " one RPN head, which predicts the same number of anchors for each"
            )
