"""What the values of a standalone config may be."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from ..norm_keys import NORM_KEYS
from ..run.errors import ConfigError
from .norm_layers import check_norm

RES_FEATURES = ["res2", "res3", "res4", "res5"]
ROI_FEATURES = ["p2", "p3", "p4", "p5"]

#: the values that a key may have, of those that detectron2 knows
_CHOICES: dict[str, tuple[Any, ...]] = {
    "VERSION": (2,),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.BACKBONE.NAME": ("build_resnet_fpn_backbone",),
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": (RES_FEATURES,),
    "MODEL.FPN.IN_FEATURES": (RES_FEATURES,),
    "MODEL.RPN.IN_FEATURES": ([*ROI_FEATURES, "p6"],),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads",),
    "MODEL.ROI_HEADS.IN_FEATURES": (ROI_FEATURES,),
    "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead",),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
}
#: lists of a fixed length
_LENGTHS = {
    "MODEL.PIXEL_MEAN": 3,
    "MODEL.PIXEL_STD": 3,
    "MODEL.RPN.IOU_THRESHOLDS": 2,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": 1,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": 4,
}
#: numbers of at least 1, without which a run crashes late or does nothing
_COUNTS = (
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "INPUT.MIN_SIZE_TRAIN",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.PRECISE_BN.NUM_ITER",
)


def check_values(cfg: CfgNode, defaults: CfgNode) -> None:
    """Checks the values of a config whose keys are right.

    Raises:
        ConfigError: names the first key whose value this engine cannot honour, and what is
            possible.
    """
    for (key, value), (_, default) in zip(_items(cfg), _items(defaults), strict=True):
        if value is None:
            raise ConfigError(f"{key} has no value")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise _unsupported(key, value, " or ".join(map(repr, _CHOICES[key])))
        if not _fits(value, default):
            raise ConfigError(f"{key} is {value!r}, expected something like {default!r}")
        if len(value if key in _LENGTHS else ()) != _LENGTHS.get(key, 0):
            raise ConfigError(f"{key} is {value!r}, expected {_LENGTHS[key]} numbers")
        numbers = value if isinstance(value, (list, tuple)) else (value,)
        if key in _COUNTS and min(numbers, default=0) < 1:
            raise ConfigError(f"{key} is {value!r}, expected at least 1")
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
    unread = () if cfg.MODEL.MASK_ON else ("MODEL.ROI_MASK_HEAD.NORM",)
    return {key: norm for key, norm in _norms(cfg).items() if key not in unread}


def _norms(cfg: CfgNode) -> dict[str, str]:
    return {row.key: cfg.MODEL[row.key.split(".")[1]].NORM for row in NORM_KEYS if row.prefix}


def _check_norms(cfg: CfgNode) -> None:
    for key, norm in _norms(cfg).items():
        check_norm(key, norm)
    for key, norm in norms_in_use(cfg).items():
        section = key.split(".")[1]
        if norm and cfg.MODEL[section].get("NUM_CONV") == 0:
            raise ConfigError(
                f"{key} is {norm!r}, but with MODEL.{section}.NUM_CONV 0 there is no layer for it"
            )


def _fits(value: Any, default: Any) -> bool:
    """Whether the value is of the default's kind, the elements of a list too."""
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and all(
            _fits(inner, default[0]) for inner in value if default
        )
    return type(value) is type(default) or {type(value), type(default)} == {int, float}


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
