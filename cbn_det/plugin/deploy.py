"""A checkpoint with our norms, as one that detectron2 loads without this package."""

from __future__ import annotations

import argparse
import copy
import os
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
from .checkpointer import AtomicCheckpointer
from .config import _read
from .registry import check_config_norms, norm_keys, norms_in_use, register

#: longest side, in pixels, of the image that both models are tried on
TRIED_SIZE = 320
#: largest difference of an output, relative to its largest value
TOLERANCE = 1e-5


def deploy_checkpoint(
    config: str, weights: str, output: Path, overrides: list[str] | None = None
) -> Deployment:
    """Writes ``config.yaml`` and ``model.pth``: the same detector with plain BatchNorm.

    Norms of ours become "BN" in the config; keys and shapes of the weights are then those of
    detectron2's own model. Before anything is written, that model is built, given the weights and
    tried on an image beside the one that was trained.

    Args:
        config: YAML file of the run (its ``config.yaml``).
        weights: checkpoint of the run.
        output: folder for the two files, new or empty.
        overrides: KEY VALUE pairs for the config, such as ``MODEL.DEVICE cpu``.

    Returns:
        What became of the norm layers.

    Raises:
        ConfigError: a file, key or norm that does not allow it; names it.
        RuntimeError: the two models differ in what they put out.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: expected a new or an empty folder")
    if not os.path.isfile(weights):
        raise ConfigError(f"--weights {weights}: no such file")
    cfg = _read(argparse.Namespace(config_file=config, opts=overrides or []))
    register()
    check_config_norms(cfg)
    plain_cfg = _plain_config(cfg)
    trained = build_model(cfg).eval()
    AtomicCheckpointer(trained, cfg=cfg).load_complete(weights, f"--weights {weights}")
    batch = [{"image": _image(cfg)}]
    expected = _outputs(trained, batch)
    try:
        report = to_batchnorm(trained)
    except ValueError as error:
        raise ConfigError(f"--weights {weights}: {error}") from error
    state = trained.state_dict()
    plain = build_model(plain_cfg).eval()
    plain.load_state_dict(state, strict=True)
    error = _difference(expected, _outputs(plain, batch))
    if error > TOLERANCE:
        raise RuntimeError(
            f"the model with plain BatchNorm puts out something else: it differs by {error:.1e} of"
            " the largest value. Nothing was written; please report this config"
        )
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / "model.pth", lambda file: torch.save({"model": state}, file))
    plain_cfg.MODEL.WEIGHTS = str(output / "model.pth")
    plain_cfg.OUTPUT_DIR = str(output)
    text = plain_cfg.dump()
    replace_file(output / "config.yaml", lambda file: file.write(text.encode()))
    return report


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


def _image(cfg: CfgNode) -> Tensor:
    """Noise of the size that images are tested at, up to `TRIED_SIZE`: [3, H, W], 0 to 255."""
    side = min(cfg.INPUT.MIN_SIZE_TEST or TRIED_SIZE, TRIED_SIZE)
    generator = torch.Generator().manual_seed(0)
    channels = len(cfg.MODEL.PIXEL_MEAN)
    coarse = torch.rand(1, channels, side // 16 + 1, side // 16 + 1, generator=generator)
    return 255.0 * nn.functional.interpolate(coarse, (side, side), mode="bilinear")[0]


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
