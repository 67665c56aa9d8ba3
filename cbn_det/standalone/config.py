"""The config of the standalone engine: detectron2's keys and defaults.

A value that this engine cannot honour is an error that names its key, never ignored: a run must not
differ silently from what its file says.
"""

from __future__ import annotations

import os
from ast import literal_eval
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from ..norm_keys import NORM_KEYS
from ..run.command_line import merge
from ..run.errors import ConfigError
from .norm_layers import check_norm

_RES_FEATURES = ["res2", "res3", "res4", "res5"]
_ROI_FEATURES = ["p2", "p3", "p4", "p5"]

#: the values that a key may have, of those that detectron2 knows
_CHOICES: dict[str, tuple[Any, ...]] = {
    "VERSION": (2,),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.BACKBONE.NAME": ("build_resnet_fpn_backbone",),
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": (_RES_FEATURES,),
    "MODEL.FPN.IN_FEATURES": (_RES_FEATURES,),
    "MODEL.RPN.IN_FEATURES": ([*_ROI_FEATURES, "p6"],),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads",),
    "MODEL.ROI_HEADS.IN_FEATURES": (_ROI_FEATURES,),
    "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead",),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
}
#: numbers without which a run crashes late or does nothing
_COUNTS = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.PRECISE_BN.NUM_ITER",
)
#: sections of MODEL that detectron2 does not read either where the above are as they must be
_UNREAD = ("RETINANET", "PANOPTIC_FPN", "SEM_SEG_HEAD", "ROI_KEYPOINT_HEAD", "ROI_BOX_CASCADE_HEAD")


def get_cfg() -> CfgNode:
    """A config with detectron2's default for each of its keys."""
    cfg = CfgNode(_defaults("honoured"))
    cfg.set_new_allowed(True)
    cfg.merge_from_other_cfg(CfgNode(_defaults("fixed")))
    cfg.set_new_allowed(False)
    return cfg


def read_config(file: str | os.PathLike[str], opts: Sequence[str] = ()) -> CfgNode:
    """Reads a YAML config (with its ``_BASE_``) and KEY VALUE words over the defaults.

    Args:
        file: path of the YAML file.
        opts: ``["SOLVER.MAX_ITER", "100", ...]``, as on the launcher's command line.

    Returns:
        The config, not frozen, with every value checked.

    Raises:
        ConfigError: a missing or unreadable file, a key that detectron2 does not have, a value that
            this engine does not honour; names it and what is possible.
    """
    file = os.fspath(file)
    cfg = get_cfg()
    for section in _UNREAD:
        cfg.MODEL[section] = CfgNode(new_allowed=True)
    merge(cfg, file, opts, lambda: cfg.merge_from_file(file, allow_unsafe=False))
    for section in _UNREAD:
        del cfg.MODEL[section]
    try:
        _check_values(cfg)
    except ConfigError as error:
        by_option = any(key in str(error) for key in opts[::2])
        where = "" if by_option else f"--config-file {file}: "
        raise ConfigError(f"{where}{error}") from error
    return cfg


def norms_in_use(cfg: CfgNode) -> dict[str, str]:
    """The ``*NORM`` keys that the configured model reads, with their values."""
    sections = {row.key: row.key.split(".")[1] for row in NORM_KEYS if row.prefix}
    if not cfg.MODEL.MASK_ON:
        del sections["MODEL.ROI_MASK_HEAD.NORM"]
    return {key: cfg.MODEL[section].NORM for key, section in sections.items()}


@cache
def _defaults(part: str) -> dict[str, Any]:
    text = Path(__file__).with_name("defaults.yaml").read_text(encoding="utf-8")
    return _decoded(yaml.safe_load(text)[part])


def _decoded(value: Any) -> Any:
    """What text stands for, where it is a Python literal, as configs write tuples."""
    if isinstance(value, dict):
        return {key: _decoded(inner) for key, inner in value.items()}
    try:
        return literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of all values that are no sections, with these."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_values(cfg: CfgNode) -> None:
    possible = _CHOICES | {key: (value,) for key, value in _leaves(_defaults("fixed"))}
    for (key, value), (_, default) in zip(_leaves(cfg), _leaves(get_cfg()), strict=True):
        if value not in possible.get(key, (value,)):
            raise _unsupported(key, value, " or ".join(map(repr, possible[key])))
        if not _fits(value, default):
            raise ConfigError(f"{key} is {value!r}, expected something like {default!r}")
        if key in _COUNTS and value < 1:
            raise ConfigError(f"{key} is {value}, expected at least 1")
    _check_resnet(cfg)
    _check_anchors(cfg)
    _check_norms(cfg)
    if cfg.MODEL.ROI_BOX_HEAD.NUM_CONV + cfg.MODEL.ROI_BOX_HEAD.NUM_FC == 0:
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.NUM_CONV and MODEL.ROI_BOX_HEAD.NUM_FC are both 0: the box head"
            " needs a layer"
        )


def _fits(value: Any, default: Any) -> bool:
    """Whether the value is of the default's kind, the elements of a list too."""
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and all(
            _fits(inner, default[0]) for inner in value if default
        )
    return type(value) is type(default) or {type(value), type(default)} == {int, float}


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
    needed |= {"NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64} if basic else {"STRIDE_IN_1X1": False}
    for key, value in needed.items():
        if node[key] != value:
            possible = f"{value!r} with MODEL.RESNETS.DEPTH {node.DEPTH}"
            raise _unsupported(f"MODEL.RESNETS.{key}", node[key], possible)


def _check_anchors(cfg: CfgNode) -> None:
    levels = len(cfg.MODEL.RPN.IN_FEATURES)
    for key in ("SIZES", "ASPECT_RATIOS"):
        lists = cfg.MODEL.ANCHOR_GENERATOR[key]
        if len(lists) not in (1, levels):
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(lists)} lists, expected one for all"
                f" features or one for each of the {levels} in MODEL.RPN.IN_FEATURES"
            )
        if len(set(map(len, lists))) > 1:
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{key} has lists of different lengths: all features share"
                " one RPN head, which predicts the same number of anchors for each"
            )


def _check_norms(cfg: CfgNode) -> None:
    for key, norm in norms_in_use(cfg).items():
        check_norm(key, norm)
        section = key.split(".")[1]
        if norm and cfg.MODEL[section].get("NUM_CONV") == 0:
            raise ConfigError(
                f"{key} is {norm!r}, but with MODEL.{section}.NUM_CONV 0 there is no layer for it"
            )
