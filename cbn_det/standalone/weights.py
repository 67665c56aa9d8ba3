"""Weights to start from: ``MODEL.WEIGHTS``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..norm_keys import BACKBONE, NORM_KEYS
from ..run.checkpoint import check_complete, key_of_absent
from ..run.errors import ConfigError

_BODY = BACKBONE.prefix
# a counter that FrozenBatchNorm2d has not; nothing is computed from it
_COUNTER = "num_batches_tracked"
_OTHER_NORM = (
    "which has other tensors of that layer: let the config name the norm that these weights were"
    " trained with (FrozenBN, BN and CBN are interchangeable here)"
)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    complete: bool = False,
    named_by: str = "MODEL.WEIGHTS",
) -> str:
    """Loads a checkpoint of this engine, whole or in parts (a backbone alone is fine), or the state
    dict of a torchvision ResNet, whose ``fc`` is left out.

    The weights of torchvision's classifiers expect ``INPUT.FORMAT: RGB``, ``PIXEL_MEAN: [123.675,
    116.28, 103.53]`` and ``PIXEL_STD: [58.395, 57.12, 57.375]``.

    Args:
        model: from :func:`~cbn_det.standalone.model.build_model`; changed in place.
        path: the file.
        complete: nothing may be left at its initial value, as for an evaluation.
        named_by: the config key or option that the file comes from, for the errors.

    Returns:
        One line: how many tensors were loaded, and which parts were left at their initial values.

    Raises:
        ConfigError: no such file, or one that does not fit the model; names the file, the first
            offending key and the fix. The model is unchanged then.
    """
    where = f"{named_by} {os.fspath(path)}"
    state = _read(os.fspath(path), where)
    wanted = model.state_dict()
    _check(state, wanted, where)
    left = [key for key in wanted if key not in state and not key.endswith(_COUNTER)]
    if complete and left:
        look_at = key_of_absent(left) or _key_for(left[0], other_shape=False)
        raise ConfigError(
            f"{where}: {len(left)} tensors of the model are not in the file, the first {left[0]}:"
            f" train it first{f', or look at {look_at}' if look_at else ''}"
        )
    model.load_state_dict(state, strict=False)
    loaded = sum(not key.endswith(_COUNTER) for key in state)
    summary = f"{where}: {loaded} tensors loaded into {_parts(state)}"
    if not left:
        return summary
    return f"{summary}; {len(left)} left at their initial values in {_parts(left)}"


def check_own(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Refuses weights that are not this model's to the last tensor, those to resume.

    Args:
        state: of the file.
        where: names the file.

    Raises:
        ConfigError: names the file, the first tensor and the config key to look at.
    """
    wanted = model.state_dict()
    shapes = {
        key: (state[key].shape, value.shape)
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    }
    missing = [key for key in wanted if key not in state]
    surplus = [key for key in state if key not in wanted]
    check_complete(where, shapes, missing, surplus, _key_for)


def _key_for(tensor: str, other_shape: bool) -> str:
    """The config key, or section, that most likely differs where a tensor does not fit."""
    if other_shape and "_predictor." in tensor:
        return "MODEL.ROI_HEADS.NUM_CLASSES"
    rows = (row for row in NORM_KEYS if row.prefix and tensor.startswith(row.prefix))
    key = next((row.key for row in rows), "")
    return key.removesuffix(".NORM") if other_shape else key


def _read(path: str, where: str) -> dict[str, Tensor]:
    """The tensors of a file under the names that they have in a detector."""
    if "://" in path:
        raise ConfigError(f"{where}: the standalone engine reads files only; download it first")
    if not os.path.isfile(path):
        raise ConfigError(f"{where}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of some other kind of file make it do
        raise ConfigError(
            f"{where}: torch.load cannot read it ({type(error).__name__}). Expected a checkpoint of"
            " this engine or a state dict of a torchvision ResNet"
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else {}
    state = dict(state) if isinstance(state, Mapping) else {}
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise ConfigError(f"{where}: {key} is a {type(value).__name__}, not a tensor")
    if not any(key.startswith("backbone.") for key in state):  # a classifier
        state = {_BODY + key: v for key, v in state.items() if not key.startswith("fc.")}
    if not state:
        raise ConfigError(
            f"{where}: no weights in it. Expected a checkpoint of this engine, {{'model': state"
            " dict}, or a state dict of a torchvision ResNet"
        )
    return state


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    layers, saved_layers = _layers(wanted), _layers(state)
    for key, value in state.items():
        if key in wanted:
            if value.shape != wanted[key].shape:
                look_at = _key_for(key, other_shape=True)
                raise ConfigError(
                    f"{where}: {key} is of shape {list(value.shape)}, the model's is"
                    f" {list(wanted[key].shape)}: let the config describe the network that was"
                    f" trained{look_at and f' ({look_at})'}, or take its backbone alone (python -m"
                    " cbn_det.study.backbone)"
                )
        elif not (key.endswith(_COUNTER) and _layer(key) in layers):
            raise ConfigError(f"{where}: {_not_in_model(key, _layer(key) in layers)}")
    for key in wanted:
        if key not in state and _layer(key) in saved_layers and not key.endswith(_COUNTER):
            raise ConfigError(f"{where}: {key} is not in the file, {_OTHER_NORM}")


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _layers(state: Mapping[str, Tensor]) -> set[str]:
    return {_layer(key) for key in state}


def _not_in_model(key: str, known_layer: bool) -> str:
    if key.startswith(("backbone.bottom_up.", "proposal_generator.")):
        return f"{key} is a tensor of a detectron2 model: use --engine detectron2 for these weights"
    if known_layer:
        return f"{key} is not in the model, {_OTHER_NORM}"
    look_at = _key_for(key, other_shape=False)
    return (
        f"{key.removeprefix(_BODY)} is not in the model. Expected a checkpoint of this engine, with"
        f" the config that it was trained with{look_at and f' ({look_at})'}, or a state"
        " dict of a torchvision ResNet of the depth in MODEL.RESNETS.DEPTH"
    )


def _parts(keys: Iterable[str]) -> str:
    """``"backbone.body (60), rpn (6)"``."""
    counts: Counter[str] = Counter()
    for key in keys:
        if not key.endswith(_COUNTER):
            first, second, _ = key.split(".", 2)
            counts[first if first == "rpn" else f"{first}.{second}"] += 1
    return ", ".join(f"{part} ({count})" for part, count in counts.items())
