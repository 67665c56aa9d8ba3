"""The config keys that the standalone engine honours, and how a file of them is read.

Names and defaults are detectron2's. A key or a value that this engine cannot honour is an error
that names it, never ignored: a run must not differ silently from what its file says.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from ..run.errors import ConfigError, one_line
from .config_values import check_values

_DEFAULTS: dict[str, Any] = {
    "VERSION": 2,
    "SEED": -1,
    "OUTPUT_DIR": "./output",
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "DEVICE": "cuda",
        "WEIGHTS": "",
        "PIXEL_MEAN": [103.53, 116.28, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "MASK_ON": False,
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        "RESNETS": {
            "DEPTH": 50,
            "OUT_FEATURES": ["res4"],
            "NORM": "FrozenBN",
            "STRIDE_IN_1X1": True,
            "RES2_OUT_CHANNELS": 256,
            "NUM_GROUPS": 1,
            "WIDTH_PER_GROUP": 64,
        },
        "FPN": {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": ""},
        "ANCHOR_GENERATOR": {
            "SIZES": [[32, 64, 128, 256, 512]],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        },
        "RPN": {
            "IN_FEATURES": ["res4"],
            "IOU_THRESHOLDS": [0.3, 0.7],
            "BATCH_SIZE_PER_IMAGE": 256,
            "POSITIVE_FRACTION": 0.5,
            "NMS_THRESH": 0.7,
            "PRE_NMS_TOPK_TRAIN": 12000,
            "PRE_NMS_TOPK_TEST": 6000,
            "POST_NMS_TOPK_TRAIN": 2000,
            "POST_NMS_TOPK_TEST": 1000,
        },
        "ROI_HEADS": {
            "NAME": "Res5ROIHeads",
            "IN_FEATURES": ["res4"],
            "NUM_CLASSES": 80,
            "IOU_THRESHOLDS": [0.5],
            "BATCH_SIZE_PER_IMAGE": 512,
            "POSITIVE_FRACTION": 0.25,
            "SCORE_THRESH_TEST": 0.05,
            "NMS_THRESH_TEST": 0.5,
        },
        "ROI_BOX_HEAD": {
            "NAME": "",
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NUM_FC": 0,
            "FC_DIM": 1024,
            "NORM": "",
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
        },
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead",
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NORM": "",
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
        },
    },
    "DATASETS": {"TRAIN": (), "TEST": ()},
    "DATALOADER": {"NUM_WORKERS": 4, "FILTER_EMPTY_ANNOTATIONS": True},
    "INPUT": {
        "FORMAT": "BGR",
        "MIN_SIZE_TRAIN": (800,),
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        "RANDOM_FLIP": "horizontal",
        "MASK_FORMAT": "polygon",
    },
    "SOLVER": {
        "IMS_PER_BATCH": 16,
        "BASE_LR": 0.001,
        "MAX_ITER": 40000,
        "STEPS": (30000,),
        "GAMMA": 0.1,
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "WARMUP_ITERS": 1000,
        "WARMUP_FACTOR": 0.001,
        "CHECKPOINT_PERIOD": 5000,
        "CLIP_GRADIENTS": {
            "ENABLED": False,
            "CLIP_TYPE": "value",
            "CLIP_VALUE": 1.0,
            "NORM_TYPE": 2.0,
        },
    },
    "TEST": {"DETECTIONS_PER_IMAGE": 100, "EVAL_PERIOD": 0},
}


def get_cfg() -> CfgNode:
    """A config with detectron2's default for every key that this engine honours."""
    return CfgNode(_DEFAULTS)


def read_config(file: str | os.PathLike[str], opts: Sequence[str] = ()) -> CfgNode:
    """Reads a YAML config (with its ``_BASE_``) and KEY VALUE words over the defaults.

    Args:
        file: path of the YAML file.
        opts: ``["SOLVER.MAX_ITER", "100", ...]``, as on the launcher's command line.

    Returns:
        The config, not frozen, with every value checked.

    Raises:
        ConfigError: a missing or unreadable file, a key or value that this engine does not honour;
            names it and what is possible.
    """
    file = os.fspath(file)
    if not os.path.isfile(file):
        raise ConfigError(f"--config-file {file}: no such file")
    late = [word for word in opts if word.startswith("--")]
    if late:
        raise ConfigError(f"{late[0]} must stand before the KEY VALUE pairs")
    if len(opts) % 2:
        raise ConfigError(f"KEY VALUE pairs expected, got {len(opts)} words: {list(opts)}")
    cfg = get_cfg()
    try:
        loaded = CfgNode.load_yaml_with_base(file)
        _check_keys(list(_leaves(loaded)))
        cfg.merge_from_other_cfg(CfgNode(loaded))
    except RecursionError as error:
        raise ConfigError(f"--config-file {file}: its _BASE_ leads back to it") from error
    except (TypeError, AttributeError) as error:  # of code that expects a dict of dicts
        raise ConfigError(f"--config-file {file}: not a mapping of config keys") from error
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config-file {file}: {one_line(error)}") from error
    _check_keys(opts[::2])
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{' '.join(opts)}: {one_line(error)}") from error
    check_values(cfg)
    return cfg


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values that are no sections."""
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path


def _check_keys(keys: Sequence[str]) -> None:
    known = list(_leaves(_DEFAULTS))
    sections = {key[:end] for key in known for end in range(len(key)) if key[end] == "."}
    for key in keys:
        if key in known or key in sections:  # what a section may be set to is told by the merge
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.93)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(
            f"{key} is not a key that the standalone engine honours{hint};"
            " --engine detectron2 takes all of detectron2's keys"
        )
