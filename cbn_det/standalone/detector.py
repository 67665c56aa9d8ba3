"""A trained detector of the standalone engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from ..deploy import fold
from ..run.command_line import usable_device
from ..run.detector import Detector
from ..run.export import OUTPUTS, check_same
from ..run.files import replace_file
from ..run.folder import CONFIG
from .config import read_config
from .model import MASK_THRESHOLD, build_model
from .weights import load_weights


class StandaloneDetector(Detector):
    """See :class:`~cbn_det.run.detector.Detector`."""

    first_label = 1
    model: GeneralizedRCNN

    @classmethod
    def load(cls, run: Path, weights: Path, opts: Sequence[str]) -> StandaloneDetector:
        cfg = read_config(run / CONFIG, opts)
        cfg.MODEL.DEVICE, _ = usable_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
        model = build_model(cfg).to(cfg.MODEL.DEVICE)
        load_weights(model, weights, complete=True, named_by="--weights")
        return cls(cfg, model, run)

    @torch.no_grad()
    def detect(
        self, image: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        (output,) = self.model([self._tensor(image)])
        found = {key: value.cpu().numpy() for key, value in output.items()}
        masks = found["masks"][:, 0] >= MASK_THRESHOLD if "masks" in found else None
        return found["boxes"], found["scores"], found["labels"] - 1, masks

    def model_input(self, image: np.ndarray) -> Tensor:
        size = (self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST)
        return v2.RandomShortestSize(*size)(self._tensor(image))

    def traceable(self, image: Tensor) -> nn.Module:
        return _Traceable(self.model)

    def write_plain(self, folder: Path, images: list[Tensor]) -> tuple[Any, list[Path]]:
        expected = _of_each(images, self.model)
        report = fold(self.model)
        plain = plain_torchvision(self.model).cpu()
        path = folder / "model.pth"
        replace_file(path, lambda file: torch.save(plain, file))
        read = torch.load(path, weights_only=False).to(self.cfg.MODEL.DEVICE)
        check_same(expected, _of_each(images, read), images, "written")
        return report, [path]

    def _tensor(self, image: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
        if self.cfg.INPUT.FORMAT == "BGR":
            tensor = tensor.flip(0)
        return tensor.to(self.cfg.MODEL.DEVICE)


@torch.no_grad()
def _of_each(images: list[Tensor], model: GeneralizedRCNN) -> list[list[Tensor]]:
    outputs = (model([image])[0] for image in images)
    return [[output[name] for name in OUTPUTS if name in output] for output in outputs]


class _Traceable(nn.Module):
    """Without what happens to images before and to masks after, which depends on sizes."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        normalised = [model.transform.normalize(image)]
        batch = model.transform.batch_images(normalised, model.transform.size_divisible)
        sizes = [(image.shape[-2], image.shape[-1])]
        features = model.backbone(batch)
        proposals, _ = model.rpn(ImageList(batch, sizes), features)
        (found,), _ = model.roi_heads(features, proposals, sizes)
        masks = (found["masks"],) if "masks" in found else ()
        return found["boxes"], found["scores"], found["labels"] - 1, *masks


@torch.no_grad()
def plain_torchvision(model: GeneralizedRCNN) -> GeneralizedRCNN:
    """The same detector of nothing but torchvision's classes, so that it is pickled without this
    package. Its norms have to be folded, or BatchNorm. It resizes without antialiasing: give it
    images that have their size already.

    Args:
        model: of :func:`.model.build_model`; left as it is.
    """
    plain = copy.deepcopy(model)
    ours, heads = model.transform, plain.roi_heads
    plain.transform = GeneralizedRCNNTransform(
        ours.min_size, ours.max_size, ours.image_mean, ours.image_std, ours.size_divisible
    )
    box = heads.box_predictor
    heads.box_predictor = FastRCNNPredictor(box.cls_score.in_features, box.cls_score.out_features)
    heads.box_predictor.cls_score = box.cls_score
    _with_background(heads.box_predictor.bbox_pred, box.bbox_pred)
    if heads.has_mask():
        deconv, _, logits = heads.mask_predictor
        classes = logits.out_channels + 1
        mask = MaskRCNNPredictor(deconv.in_channels, deconv.out_channels, classes)
        mask.conv5_mask = deconv
        _with_background(mask.mask_fcn_logits, logits)
        heads.mask_predictor = mask
    return plain.eval()


def _with_background(wider: nn.Module, layer: nn.Module) -> None:
    """Gives a layer the outputs of a narrower one, behind zeros for the background."""
    for to, of in ((wider.weight, layer.weight), (wider.bias, layer.bias)):
        to.zero_()
        to[len(to) - len(of) :] = of
