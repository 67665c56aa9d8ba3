"""A trained detector of detectron2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Instances
from torch import Tensor, nn

from ..norms import find_chain_at_call
from ..run.command_line import usable_device
from ..run.detector import Detector
from ..run.errors import ConfigError
from .checkpointer import AtomicCheckpointer
from .config import read_config
from .deploy import write_plain
from .registry import check_config_norms, register


class Detectron2Detector(Detector):
    """See :class:`~cbn_det.run.detector.Detector`."""

    @classmethod
    def load(
        cls, run: Path, config: Path, weights: Path, opts: Sequence[str], result: dict[str, Any]
    ) -> Detectron2Detector:
        """
        Raises:
            ConfigError: the config or the checkpoint cannot be read, or they do not fit.
        """
        cfg = read_config(str(config), opts)
        cfg.MODEL.DEVICE, _ = usable_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
        register()
        check_config_norms(cfg)
        model = build_model(cfg)
        find_chain_at_call(model)
        checkpointer = AtomicCheckpointer(model, cfg=cfg)
        checkpointer.load_complete(str(weights), f"--weights {weights}")
        return cls(cfg, model, run, result)

    @torch.no_grad()
    def detect(
        self, image: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        height, width = image.shape[:2]
        record = {"image": self.model_input(image), "height": height, "width": width}
        found = _instances(self.model([record])[0])
        boxes, scores, labels, *masks = (tensor.cpu().numpy() for tensor in _fields(found))
        return boxes, scores, labels, masks[0] if masks else None

    def model_input(self, image: np.ndarray) -> Tensor:
        sizes = self.cfg.INPUT
        if sizes.FORMAT == "BGR":
            image = image[:, :, ::-1]
        elif sizes.FORMAT != "RGB":
            raise ConfigError(f"INPUT.FORMAT {sizes.FORMAT}: expected BGR or RGB")
        resize = ResizeShortestEdge([sizes.MIN_SIZE_TEST] * 2, sizes.MAX_SIZE_TEST)
        image = resize.get_transform(image).apply_image(image)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)).astype("float32"))

    def traceable(self, image: Tensor) -> nn.Module:
        inputs = [{"image": image}]
        return TracingAdapter(self.model, inputs, _inference)

    def write_plain(self, folder: Path, images: list[Tensor]) -> tuple[Any, list[Path]]:
        return write_plain(self.cfg, self.model, folder, images)


def _inference(model: nn.Module, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    """Masks stay on their boxes, where the model allows that."""
    if isinstance(model, GeneralizedRCNN):
        return _fields(model.inference(inputs, do_postprocess=False)[0])
    return _fields(_instances(model(inputs)[0]))


def _instances(output: Any) -> Instances:
    found = output.get("instances") if isinstance(output, dict) else None
    if not (isinstance(found, Instances) and found.has("pred_boxes")):
        raise ConfigError(
            "the model puts out no boxes with classes, which is what can be drawn and exported;"
            " --format torch takes any model of detectron2"
        )
    return found


def _fields(found: Instances) -> tuple[Tensor, ...]:
    masks = (found.pred_masks,) if found.has("pred_masks") else ()
    return found.pred_boxes.tensor, found.scores, found.pred_classes, *masks
