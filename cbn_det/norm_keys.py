"""The one table of the config keys that name a norm: where in a model their layers are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormKey:
    """A config key.

    Attributes:
        site: what ``--sites`` calls it.
        modules: regular expression that the names of its modules in detectron2's models match.
        prefix: of the names of its modules in the standalone engine's; "" where it has none.
    """

    key: str
    site: str
    modules: str
    prefix: str = ""


NORM_KEYS = (
    NormKey(
        "MODEL.RESNETS.NORM", "backbone", r"backbone\.(?!fpn_)|roi_heads\.res5", "backbone.body."
    ),
    NormKey("MODEL.FPN.NORM", "fpn", r"backbone\.fpn_", "backbone.fpn."),
    NormKey("MODEL.ROI_BOX_HEAD.NORM", "box_head", r"roi_heads\.box_head", "roi_heads.box_head."),
    NormKey(
        "MODEL.ROI_MASK_HEAD.NORM", "mask_head", r"roi_heads\.mask_head", "roi_heads.mask_head."
    ),
    NormKey("MODEL.SEM_SEG_HEAD.NORM", "sem_seg_head", "sem_seg_head"),
    NormKey("MODEL.RETINANET.NORM", "retinanet", r"head\."),
)
BACKBONE, *_ = NORM_KEYS
