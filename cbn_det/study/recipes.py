"""The training recipes that norms are compared with, and how their configs are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode

from cbn_det.study.engine import REPOSITORY

QUICKSTART = REPOSITORY / "configs" / "quickstart"

HEAD_NORM_KEYS = ("MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")
# Of models that only detectron2 has, which a config of the user's own may describe.
DETECTRON2_NORM_KEYS = ("MODEL.SEM_SEG_HEAD.NORM", "MODEL.RETINANET.NORM")


@dataclass(frozen=True)
class Recipe:
    """A training recipe, the same for every norm.

    `norm_keys` are the config keys that the compared norm is written to; `pretrain`, if given, is
    the config of the run that trains the backbone once, for all norms and seeds.
    """

    config: Path
    norm_keys: tuple[str, ...]
    pretrain: Path | None = None


RECIPES = {
    "scratch": Recipe(
        QUICKSTART / "Base-RCNN-R18-FPN-digits.yaml", ("MODEL.RESNETS.NORM", *HEAD_NORM_KEYS)
    ),
    "finetune": Recipe(
        QUICKSTART / "Finetune-RCNN-R18-FPN-digits.yaml",
        HEAD_NORM_KEYS,
        QUICKSTART / "pretrain_R_18_FPN_digits_bn8.yaml",
    ),
}


def config_texts(config: Path) -> list[str]:
    """The contents of a config file and of those it builds on (`_BASE_`)."""
    text = config.read_text(encoding="utf-8")
    base = re.search(r"^_BASE_:\s*[\"']?([^\"'#\n]+?)[\"']?\s*(?:#.*)?$", text, re.MULTILINE)
    return [text, *(config_texts(config.parent / base[1]) if base else [])]


def config_iterations(config: Path) -> int | None:
    """The config's own SOLVER.MAX_ITER; None where it sets none."""
    return CfgNode.load_yaml_with_base(str(config)).get("SOLVER", {}).get("MAX_ITER")


def schedule(config: Path, iterations: int) -> list[str]:
    """Overrides that stretch or shrink the whole schedule of a config to `iterations`.

    Raises:
        ValueError: the config does not say SOLVER.MAX_ITER, so there is nothing to scale.
    """
    solver = CfgNode.load_yaml_with_base(str(config)).get("SOLVER", {})
    if "MAX_ITER" not in solver:
        raise ValueError(
            f"{config}: --iters scales SOLVER.MAX_ITER, which this config does not set"
        )
    factor = iterations / solver["MAX_ITER"]
    options = ["SOLVER.MAX_ITER", str(iterations)]
    if "STEPS" in solver:
        steps = solver["STEPS"]
        steps = steps if isinstance(steps, list | tuple) else re.findall(r"\d+", str(steps))
        scaled = [min(iterations, max(1, round(int(step) * factor))) for step in steps]
        options += ["SOLVER.STEPS", f"({', '.join(map(str, scaled))},)" if scaled else "()"]
    if "WARMUP_ITERS" in solver:
        options += ["SOLVER.WARMUP_ITERS", str(round(solver["WARMUP_ITERS"] * factor))]
    return options
