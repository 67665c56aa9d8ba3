"""COCO evaluation by pycocotools, with the numbers that detectron2 reports."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from fvcore.common.config import CfgNode
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..data.coco_api import detections_counted
from ..progress import shown
from ..run.files import replace_file
from ..run.folder import PREDICTIONS
from .datasets import DetectionDataset
from .loading import in_order
from .model import MASK_THRESHOLD

logger = logging.getLogger(__name__)


_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def evaluate(
    model: nn.Module, dataset: DetectionDataset, cfg: CfgNode, folder: Path
) -> dict[str, dict[str, float]]:
    """Predicts every image of a set and scores the predictions, which are written to
    ``<folder>/coco_instances_results.json`` in COCO's result format.

    Args:
        model: a detector of torchvision's on ``MODEL.DEVICE``; its mode is put back afterwards.
        dataset: not for training.

    Returns:
        ``{"bbox": {"AP": ..., "AP50": ..., "AP75": ..., "APs": ..., "APm": ..., "APl": ...,
        "AP-<class>": ...}}``, and likewise ``"segm"`` with ``MODEL.MASK_ON``: on the scale 0 to
        100, NaN where undefined. The AP of each class is there if there are several classes and
        anything was predicted; without any prediction all is NaN, as in detectron2. Empty for a set
        without annotations.

    Raises:
        DataError: an image cannot be read.
    """
    predictions = _predict(model, dataset, cfg)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / PREDICTIONS, lambda f: f.write(json.dumps(predictions).encode()))
    if "annotations" not in dataset.coco.dataset:
        logger.warning("The data set has no annotations: predictions are written, no AP computed")
        return {}
    results = {}
    for task in ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",):
        found = results[task] = _score(dataset, predictions, task, detections_counted(cfg))
        row = [found[metric] for metric in _METRICS]
        table = tabulate([row], headers=_METRICS, tablefmt="pipe", floatfmt=".3f")
        logger.info(f"Evaluation results for {task}:\n{table}")
    return results


@torch.no_grad()
def _predict(model: nn.Module, dataset: DetectionDataset, cfg: CfgNode) -> list[dict[str, Any]]:
    """The predictions for all images, in COCO's result format."""
    predictions = []
    logger.info(f"Evaluating {len(dataset)} images")
    training = model.training
    model.eval()
    try:
        for image, target in shown(in_order(dataset, cfg), "evaluating images", len(dataset)):
            (output,) = model([image.to(cfg.MODEL.DEVICE)])
            predictions += _coco_results(output, target["image_id"], dataset.category_ids)
    finally:
        model.train(training)
    return predictions


def _coco_results(
    output: dict[str, Tensor], image_id: Any, category_ids: list[int]
) -> list[dict[str, Any]]:
    boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
    labels, scores = output["labels"].tolist(), output["scores"].tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in output:  # [n, 1, H, W], probabilities
        for result, (mask,) in zip(results, output["masks"], strict=True):
            pixels = (mask >= MASK_THRESHOLD).to("cpu", torch.uint8).numpy()
            rle = mask_util.encode(np.asfortranarray(pixels))
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return results


def _score(
    dataset: DetectionDataset, predictions: list[dict[str, Any]], task: str, limit: int
) -> dict[str, float]:
    if not predictions:  # pycocotools fails on an empty list
        logger.warning(f"The model predicted nothing on this data set: {task} AP is NaN")
        return dict.fromkeys(_METRICS, float("nan"))
    # With "bbox" in a result, pycocotools would sort masks into small, medium and large by its area
    left_out = "bbox" if task == "segm" else "segmentation"
    copies = [{k: v for k, v in p.items() if k != left_out} for p in predictions]
    with contextlib.redirect_stdout(io.StringIO()):
        scores = COCOeval(dataset.coco, dataset.coco.loadRes(copies), task)
        scores.params.maxDets[-1] = limit
        scores.evaluate()
        scores.accumulate()
    # [IoU 0.5 to 0.95, recall, class, area: all, small, medium, large], most detections per image
    precision = scores.eval["precision"][..., -1]
    of_all = precision[..., 0]
    parts = (of_all, of_all[0], of_all[5], *(precision[..., area] for area in (1, 2, 3)))
    results = dict(zip(_METRICS, map(_mean, parts), strict=True))
    if len(dataset.class_names) > 1:
        for index, name in enumerate(dataset.class_names):
            results[f"AP-{name}"] = _mean(of_all[:, :, index])
    return results


def _mean(precision: np.ndarray) -> float:
    """In percent, of what is defined; NaN if nothing is."""
    defined = precision[precision > -1]
    return float(defined.mean()) * 100 if defined.size else float("nan")
