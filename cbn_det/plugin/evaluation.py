"""detectron2's COCO evaluation, with every prediction and every annotation counted."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator

from ..run.coco_evaluation import detections_counted, number_annotations


class Evaluator(COCOEvaluator):
    """detectron2's, whose limit of predictions follows ``TEST.DETECTIONS_PER_IMAGE`` and which
    takes annotations with any ids.

    Args:
        dataset_name: of ``DATASETS.TEST``.
        cfg: of the run.
        folder: for the predictions.
    """

    def __init__(self, dataset_name: str, cfg: CfgNode, folder: Path) -> None:
        super().__init__(
            dataset_name, output_dir=str(folder), max_dets_per_image=detections_counted(cfg)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            number_annotations(self._coco_api)
