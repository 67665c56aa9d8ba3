"""The training recipes that norms are compared with, and what has to be overridden in a config: the
norm at its sites, batch and schedule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from ..config_files import CONFIGS
from ..norm_keys import NORM_KEYS

QUICKSTART = CONFIGS / "quickstart"

# What `--sites` calls a place of the norm -> its config key.
SITES = {row.site: row.key for row in NORM_KEYS}
BACKBONE_NORM_KEY, *HEAD_NORM_KEYS = (row.key for row in NORM_KEYS if row.prefix)
# Of models that only detectron2 has, which a config of the user's own may describe.
DETECTRON2_NORM_KEYS = tuple(row.key for row in NORM_KEYS if not row.prefix)
# The row without any norm: what the backbone came with is frozen, nothing is put elsewhere.
NO_NORM, FROZEN = "none", "FrozenBN"
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


def setting(config: Path, key: str, overrides: Sequence[str] = (), default: Any = None) -> Any:
    """What a config file, those it builds on, or overrides set a key to.

    The value of an override is text. For what is raised see :func:`read_yaml`.
    """
    node: Any = read_yaml(config)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    own = default if node is None else node
    return dict(zip(overrides[::2], overrides[1::2], strict=False)).get(key, own)


def device(config: Path, overrides: Sequence[str]) -> str:
    """MODEL.DEVICE of a config with overrides."""
    return setting(config, "MODEL.DEVICE", overrides, "cuda")


def data_sets(config: Path, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """DATASETS.TRAIN and DATASETS.TEST of a config with overrides."""
    cfg = CfgNode({"DATASETS": {"TRAIN": (), "TEST": ()}})
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        cfg.merge_from_list([key, setting(config, key, overrides, ())])  # reads what is text
    return list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)


def norm_keys(
    config: Path | None, recipe: str, engine: str, sites: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The config keys that the compared norm is written to.

    Args:
        config: of the user's own; None: the recipe's.
        engine: the standalone engine knows no keys of models that it does not have.
        sites: names of `SITES`. None: where the config names a norm that is not frozen; where it
            names none, the recipe's sites that the config does not freeze.

    Raises:
        ValueError: an unknown site.
    """
    known = [
        key for key in SITES.values() if engine == "detectron2" or key not in DETECTRON2_NORM_KEYS
    ]
    if sites is not None:
        unknown = [site for site in sites if SITES.get(site) not in known]
        if unknown:
            names = ", ".join(site for site, key in SITES.items() if key in known)
            raise ValueError(f"site {unknown[0]!r}: known are {names}")
        return tuple(key for key in known if key in {SITES[site] for site in sites})
    if config is None:
        return RECIPES[recipe].norm_keys
    norms = {key: setting(config, key) for key in known}
    trained = tuple(key for key in known if norms[key] not in (None, "", FROZEN))
    usual = (*RECIPES[recipe].norm_keys, *DETECTRON2_NORM_KEYS)
    return trained or tuple(key for key in known if key in usual and norms[key] != FROZEN)


def norm_words(keys: Sequence[str], norm: str) -> list[str]:
    """KEY VALUE pairs that put a norm at these keys."""
    if norm != NO_NORM:
        return [word for key in keys for word in (key, norm)]
    return [word for key in keys for word in (key, FROZEN if key == BACKBONE_NORM_KEY else "")]


def batch(config: Path, ranks: int, images: int, iterations: int | None) -> list[str]:
    """Overrides for `ranks` processes with `images` each.

    A config with SOLVER.REFERENCE_WORLD_SIZE says how its learning rate and schedule follow the
    number of processes. They follow the images per process in the same way, which needs nothing but
    another reference: 16 images on 8 GPUs are 2 per GPU, on 16 GPUs 1 per GPU. Where the length is
    given as well, the rate alone is left to scale. Without the key they stay what they are.

    Raises:
        ValueError: the config's batch is no multiple of `images`.
    """
    total = ranks * images
    if not setting(config, "SOLVER.REFERENCE_WORLD_SIZE"):
        return ["SOLVER.IMS_PER_BATCH", str(total)]
    own = setting(config, "SOLVER.IMS_PER_BATCH", default=DETECTRON2_BATCH)
    if iterations:
        rate = setting(config, "SOLVER.BASE_LR", default=DETECTRON2_RATE) * total / own
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


def schedule(config: Path, iterations: int) -> list[str]:
    """Overrides that stretch or shrink the whole schedule of a config to `iterations`.

    Raises:
        ValueError: the config does not say SOLVER.MAX_ITER, so there is nothing to scale.
    """
    length, steps, warmup = (
        setting(config, f"SOLVER.{name}") for name in ("MAX_ITER", "STEPS", "WARMUP_ITERS")
    )
    if length is None:
        raise ValueError(
            f"{config}: --iters scales SOLVER.MAX_ITER, which this config does not set"
        )
    factor = iterations / length
    options = ["SOLVER.MAX_ITER", str(iterations)]
    if steps is not None:
        steps = steps if isinstance(steps, list | tuple) else re.findall(r"\d+", str(steps))
        # a step at the end, or two at once, are refused where the schedule is built
        scaled = sorted({max(1, round(int(step) * factor)) for step in steps} - {iterations})
        options += ["SOLVER.STEPS", f"({', '.join(map(str, scaled))},)" if scaled else "()"]
    if warmup is not None:
        options += ["SOLVER.WARMUP_ITERS", str(round(warmup * factor))]
    return options
