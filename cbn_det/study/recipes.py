"""The training recipes that norms are compared with, and how their configs are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from cbn_det.config_files import CONFIGS
from cbn_det.norm_keys import NORM_KEYS

QUICKSTART = CONFIGS / "quickstart"

BACKBONE_NORM_KEY, *HEAD_NORM_KEYS = (row.key for row in NORM_KEYS if row.prefix)
# Of models that only detectron2 has, which a config of the user's own may describe.
DETECTRON2_NORM_KEYS = tuple(row.key for row in NORM_KEYS if not row.prefix)
# detectron2's own SOLVER.IMS_PER_BATCH and BASE_LR, for configs that do not set them.
DETECTRON2_BATCH, DETECTRON2_RATE = 16, 0.001


@dataclass(frozen=True)
class Recipe:
    """A training recipe, the same for every norm.

    `norm_keys` are the config keys that the compared norm is written to; `pretrain`, if given, is
    the config of the run that trains the backbone once, for all norms and seeds; `expected` says
    what a short run of it reaches.
    """

    config: Path
    norm_keys: tuple[str, ...]
    pretrain: Path | None = None
    expected: str = ""


RECIPES = {
    "scratch": Recipe(
        QUICKSTART / "Base-RCNN-R18-FPN-digits.yaml",
        (BACKBONE_NORM_KEY, *HEAD_NORM_KEYS),
        expected=(
            "To be expected of this recipe after 600 iterations (mean over three seeds): GN 24 to"
            " 26 AP, BN and CBN 10 each, no further apart than seeds are. For the first two thirds"
            " of a training (burn_in) CBN computes what BN computes, so short runs cannot tell them"
            " apart; with far fewer iterations AP stays near 0."
        ),
    ),
    "finetune": Recipe(
        QUICKSTART / "Finetune-RCNN-R18-FPN-digits.yaml",
        tuple(HEAD_NORM_KEYS),
        QUICKSTART / "pretrain_R_18_FPN_digits_bn8.yaml",
    ),
}


def config_texts(config: Path) -> list[str]:
    """The contents of a config file and of those it builds on (`_BASE_`, one or a list)."""
    text = config.read_text(encoding="utf-8")
    bases = (yaml.safe_load(text) or {}).get("_BASE_") or []
    bases = bases if isinstance(bases, list) else [bases]
    return [text, *(part for base in bases for part in config_texts(config.parent / base))]


def read_yaml(config: Path) -> dict[str, Any]:
    """What a config file and those it builds on set, without any defaults.

    Raises:
        OSError: a file cannot be read.
        ValueError: one is no YAML mapping.
    """
    try:
        return dict(CfgNode.load_yaml_with_base(str(config)))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{config}: {' '.join(str(error).split())}") from error


def config_iterations(config: Path) -> int | None:
    """The config's own SOLVER.MAX_ITER; None where it sets none."""
    return read_yaml(config).get("SOLVER", {}).get("MAX_ITER")


def batch(config: Path, ranks: int, images: int, iterations: int | None) -> list[str]:
    """Overrides for `ranks` processes with `images` each.

    A config with SOLVER.REFERENCE_WORLD_SIZE says how its learning rate and schedule follow the
    number of processes. They follow the images per process in the same way, which needs nothing but
    another reference: 16 images on 8 GPUs are 2 per GPU, on 16 GPUs 1 per GPU. Where the length is
    given as well, the rate alone is left to scale. Without the key they stay what they are.

    Args:
        config: the base config.
        iterations: length of the run, or None for what the config says.

    Raises:
        ValueError: the config's batch is no multiple of `images`.
    """
    total = ranks * images
    solver = read_yaml(config).get("SOLVER", {})
    if not solver.get("REFERENCE_WORLD_SIZE"):
        return ["SOLVER.IMS_PER_BATCH", str(total)]
    own = solver.get("IMS_PER_BATCH", DETECTRON2_BATCH)
    if iterations:
        rate = solver.get("BASE_LR", DETECTRON2_RATE) * total / own
        return [
            *("SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.IMS_PER_BATCH", str(total)),
            *("SOLVER.BASE_LR", str(float(f"{rate:.8g}"))),
        ]
    if own % images:
        raise ValueError(
            f"{config}: {images} images per GPU do not divide its SOLVER.IMS_PER_BATCH {own}, "
            "which its schedule is for"
        )
    return ["SOLVER.REFERENCE_WORLD_SIZE", str(own // images)]


def device(config: Path, overrides: list[str]) -> str:
    """MODEL.DEVICE of a config with overrides."""
    words = dict(zip(overrides[::2], overrides[1::2], strict=False))
    own = read_yaml(config).get("MODEL", {}).get("DEVICE", "cuda")
    return words.get("MODEL.DEVICE", own)


def data_sets(config: Path, overrides: list[str]) -> tuple[list[str], list[str]]:
    """DATASETS.TRAIN and DATASETS.TEST of a config with overrides."""
    cfg = CfgNode({"DATASETS": {"TRAIN": (), "TEST": ()}})
    own = read_yaml(config).get("DATASETS", {})
    words = dict(zip(overrides[::2], overrides[1::2], strict=False))
    for name in cfg.DATASETS:
        key = f"DATASETS.{name}"
        cfg.merge_from_list([key, words.get(key, own.get(name, ()))])
    return list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)


def schedule(config: Path, iterations: int) -> list[str]:
    """Overrides that stretch or shrink the whole schedule of a config to `iterations`.

    Raises:
        ValueError: the config does not say SOLVER.MAX_ITER, so there is nothing to scale.
    """
    solver = read_yaml(config).get("SOLVER", {})
    if "MAX_ITER" not in solver:
        raise ValueError(
            f"{config}: --iters scales SOLVER.MAX_ITER, which this config does not set"
        )
    factor = iterations / solver["MAX_ITER"]
    options = ["SOLVER.MAX_ITER", str(iterations)]
    if "STEPS" in solver:
        steps = solver["STEPS"]
        steps = steps if isinstance(steps, list | tuple) else re.findall(r"\d+", str(steps))
        # a step at the end, or two at once, are refused where the schedule is built
        scaled = sorted({max(1, round(int(step) * factor)) for step in steps} - {iterations})
        options += ["SOLVER.STEPS", f"({', '.join(map(str, scaled))},)" if scaled else "()"]
    if "WARMUP_ITERS" in solver:
        options += ["SOLVER.WARMUP_ITERS", str(round(solver["WARMUP_ITERS"] * factor))]
    return options
