"""A checkpoint with our norms, as one that detectron2 loads without this package."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor, nn

from ..deploy import Deployment, to_batchnorm
from ..norms import known_norms, norm_class, parse_spec
from ..run.errors import ConfigError
from ..run.files import replace_file
from .registry import norm_keys, norms_in_use

#: largest difference of an output, relative to its largest value
TOLERANCE = 1e-5


def write_plain(
    cfg: CfgNode, trained: nn.Module, folder: Path, images: list[Tensor]
) -> tuple[Deployment, list[Path]]:
    """Writes ``config.yaml`` and ``model.pth``: the same detector with plain BatchNorm.

    Norms of ours become "BN" in the config; keys and shapes of the weights are then those of
    detectron2's own model. Before anything is written, that model is built, given the weights and
    tried on images beside the one that was trained. The config names the weights by their absolute
    path, so that it loads from any current folder.

    Args:
        cfg: of the run.
        trained: its model; our norms in it become BatchNorm.
        folder: for the two files.
        images: as detectron2's mapper gives them, float [3, H, W].

    Returns:
        What became of the norm layers, and the files.

    Raises:
        ConfigError: a norm that does not allow it; names its key.
        RuntimeError: the two models differ in what they put out.
    """
    plain_cfg = _plain_config(cfg)
    batches = [[{"image": image}] for image in images]
    expected = [_outputs(trained, batch) for batch in batches]
    report = to_batchnorm(trained)
    state = trained.state_dict()
    plain = build_model(plain_cfg).eval()
    plain.load_state_dict(state, strict=True)
    found = [_outputs(plain, batch) for batch in batches]
    error = max(map(_difference, expected, found))
    if error > TOLERANCE:
        raise RuntimeError(
            f"the model with plain BatchNorm puts out something else: it differs by {error:.1e} of"
            " the largest value. Nothing was written; please report this config"
        )
    weights, config = folder.absolute() / "model.pth", folder.absolute() / "config.yaml"
    replace_file(weights, lambda file: torch.save({"model": state}, file))
    plain_cfg.MODEL.WEIGHTS = str(weights)
    plain_cfg.OUTPUT_DIR = str(folder.absolute())
    text = plain_cfg.dump()
    replace_file(config, lambda file: file.write(text.encode()))
    return report, [config, weights]


def _plain_config(cfg: CfgNode) -> CfgNode:
    """The config with "BN" wherever it names a norm of ours."""
    plain = copy.deepcopy(cfg)
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


def _outputs(model: nn.Module, batch: list[dict[str, Tensor]]) -> list[Tensor]:
    """All tensors that a model puts out for a batch, and its feature maps."""
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(batch).tensor)
        return list(_tensors([features, model(batch)]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Instances):
        value = value.get_fields()
    if isinstance(value, dict):
        value = list(value.values())
    value = getattr(value, "tensor", value)
    if isinstance(value, Tensor):
        yield value.detach().float()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of the tensor it is in."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.numel()]
    errors = [(a - b).abs().max() / a.abs().max().clamp(min=1e-12) for a, b in pairs]
    return float(torch.stack(errors).max()) if errors else 0.0
