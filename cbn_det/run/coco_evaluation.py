"""What COCO's evaluation needs so that right predictions score 100 on any file."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from ..data.coco_api import number_annotations

__all__ = ["detections_counted", "number_annotations"]

_LIMIT = 100  # of COCO: more predictions of an image and a category do not count
_NO_LIMIT = 10**6


def detections_counted(cfg: CfgNode) -> int:
    """How many predictions of an image count: as many as ``TEST.DETECTIONS_PER_IMAGE`` allows, and
    COCO's 100 where that is less, as then all do."""
    most = cfg.TEST.DETECTIONS_PER_IMAGE
    return _NO_LIMIT if most < 0 else max(_LIMIT, most)
