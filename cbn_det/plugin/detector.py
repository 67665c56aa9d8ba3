"""A trained detector of detectron2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.export import TracingAdapter
from detectron2.export.flatten import flatten_to_tuple
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Instances
from torch import Tensor, nn

from ..deploy import Deployment, to_batchnorm
from ..norms import find_chain_at_call, known_norms, norm_class, parse_spec
from ..run.command_line import usable_device
from ..run.detector import Detector
from ..run.errors import ConfigError
from ..run.files import replace_file
from ..run.folder import CONFIG
from .checkpointer import AtomicCheckpointer
from .config import read_config
from .registry import check_config_norms, norm_keys, norms_in_use, register

#: largest difference of a plain model's output, relative to its largest value
TOLERANCE = 1e-5


class Detectron2Detector(Detector):
    """See :class:`~cbn_det.run.detector.Detector`."""

    @classmethod
    def load(cls, run: Path, weights: Path, opts: Sequence[str]) -> Detectron2Detector:
        cfg = read_config(str(run / CONFIG), opts)
        cfg.MODEL.DEVICE, _ = usable_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
        register()
        check_config_norms(cfg)
        model = build_model(cfg)
        find_chain_at_call(model)
        checkpointer = AtomicCheckpointer(model, cfg=cfg)
        checkpointer.load_complete(str(weights), f"--weights {weights}")
        return cls(cfg, model, run)

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

    @torch.no_grad()
    def write_plain(self, folder: Path, images: list[Tensor]) -> tuple[Deployment, list[Path]]:
        """Writes ``config.yaml`` and ``model.pth``: the same detector with plain BatchNorm.

        Norms of ours become "BN" in the config; keys and shapes of the weights are then those of
        detectron2's own model. Before anything is written, that model is built, given the weights
        and tried beside the one that was trained. The config names the weights by their absolute
        path, so that it loads from any current folder.
        """
        plain_cfg = _plain_config(self.cfg)
        expected = [_outputs(self.model, image) for image in images]
        report = to_batchnorm(self.model)
        state = self.model.state_dict()
        plain = build_model(plain_cfg).eval()
        plain.load_state_dict(state, strict=True)
        for image, wanted in zip(images, expected, strict=True):
            error = _difference(wanted, _outputs(plain, image))
            if error > TOLERANCE:
                raise RuntimeError(
                    f"the model with plain BatchNorm puts out something else: it differs by"
                    f" {error:.1e} of the largest value. Nothing was written; please report this"
                    " config"
                )
        weights, config = folder.absolute() / "model.pth", folder.absolute() / "config.yaml"
        replace_file(weights, lambda file: torch.save({"model": state}, file))
        plain_cfg.MODEL.WEIGHTS, plain_cfg.OUTPUT_DIR = str(weights), str(weights.parent)
        replace_file(config, lambda file: file.write(plain_cfg.dump().encode()))
        return report, [config, weights]


def _plain_config(cfg: CfgNode) -> CfgNode:
    """The config with "BN" wherever it names a norm of ours."""
    plain = cfg.clone()
    used = norms_in_use(cfg)
    for key, norm in norm_keys(cfg):
        name = parse_spec(norm)[0] if norm else ""
        if name not in known_norms():
            continue
        if key in used and not issubclass(norm_class(name), nn.BatchNorm2d):
            raise ConfigError(
                f"{key}: {norm} cannot become BatchNorm: it takes its statistics from its own"
                " input in evaluation, too"
            )
        plain.merge_from_list([key, "BN"])
    return plain


def _outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """All tensors that a model puts out for an image, and its feature maps."""
    batch = [{"image": image}]
    features = model.backbone(model.preprocess_image(batch).tensor)
    values, _ = flatten_to_tuple([features, model(batch)])
    return [value.float() for value in values if isinstance(value, Tensor)]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of the tensor it is in."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs)


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
