"""Multiply-adds of a detectron2 model."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

logger = logging.getLogger(__name__)


def count_flops(cfg: CfgNode, model: nn.Module) -> int | None:
    """Multiply-adds of the model on the first test image, as fvcore counts them.

    Returns:
        None, with the reason in the log, for a model that cannot be traced.
    """
    training = model.training
    model.eval()
    try:
        record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
        sample = DatasetMapper(cfg, is_train=False)(dict(record))
        analysis = FlopCountAnalysis(model, [{"image": sample["image"]}])
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return int(analysis.tracer_warnings("none").total())
    except Exception as error:  # tracing runs arbitrary model code; no run fails over a statistic
        logger.warning(f"FLOPs are not counted: {type(error).__name__}: {error}")
        return None
    finally:
        model.train(training)
