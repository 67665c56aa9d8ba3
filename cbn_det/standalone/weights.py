"""Weights to start from: ``MODEL.WEIGHTS``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..norm_keys import BACKBONE, NORM_KEYS
from ..run.checkpoint import check_complete
from ..run.errors import ConfigError

# a counter that FrozenBatchNorm2d has not; nothing is computed from it
_COUNTER = "num_batches_tracked"


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
        complete: nothing may be left at its initial value, as for an evaluation.
        named_by: the config key or option that the file comes from, for the errors.

    Returns:
        One line: how many tensors were loaded, and which parts were left at their initial values.

    Raises:
        ConfigError: no such file, or one that does not fit the model; names the file, the first
            offending tensor and the key to look at. The model is unchanged then.
    """
    where = f"{named_by} {os.fspath(path)}"
    state = _read(os.fspath(path), where)
    check(model, state, where, complete)
    model.load_state_dict(state, strict=False)
    left = model.state_dict().keys() - state.keys()
    summary = f"{where}: {_parts(state)} loaded"
    return f"{summary}; left at their initial values: {_parts(left)}" if _parts(left) else summary


def check(model: nn.Module, state: Mapping[str, Tensor], where: str, complete: bool) -> None:
    """Refuses weights that do not fit the model or, with ``complete``, are not its own to the last
    tensor.

    Raises:
        ConfigError: names the file (``where``), the first tensor and the config key to look at.
    """
    wanted = model.state_dict()
    in_file = set(map(_layer, state))
    check_complete(
        where,
        {
            key: (state[key].shape, value.shape)
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        },
        # of a layer none or all: one norm's weights are not another's
        [k for k in wanted if k not in state and (complete or _layer(k) in in_file)],
        [k for k in state if k not in wanted],
        _key_for,
    )


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _key_for(tensor: str, other_shape: bool) -> str:
    """The config key, or section, that most likely differs where a tensor does not fit."""
    if tensor.startswith(("backbone.bottom_up.", "proposal_generator.")):
        return "--engine detectron2, whose weights these are"
    if other_shape and "_predictor." in tensor:
        return "MODEL.ROI_HEADS.NUM_CLASSES"
    rows = (row for row in NORM_KEYS if row.prefix and tensor.startswith(row.prefix))
    key = next((row.key for row in rows), "")
    # without a norm a convolution has a bias
    return key.removesuffix(".NORM") if other_shape or tensor.endswith(".weight") else key


def _read(path: str, where: str) -> dict[str, Tensor]:
    """The tensors of a file under the names that they have in a detector."""
    if not os.path.isfile(path):
        raise ConfigError(f"{where}: no such file")
    expected = "Expected a checkpoint of this engine or a state dict of a torchvision ResNet"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of some other kind of file make it do
        raise ConfigError(
            f"{where}: torch.load cannot read it ({type(error).__name__}). {expected}"
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ConfigError(f"{where}: no weights in it. {expected}")
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise ConfigError(f"{where}: {key} is a {type(value).__name__}, not a tensor")
    if not any(key.startswith("backbone.") for key in state):  # a classifier
        state = {BACKBONE.prefix + k: v for k, v in state.items() if not k.startswith("fc.")}
    if not state:
        raise ConfigError(f"{where}: no weights in it. {expected}")
    return dict(state)


def _parts(keys: Iterable[str]) -> str:
    """``"60 tensors of backbone.body, 6 tensors of rpn"``."""
    counts: Counter[str] = Counter()
    for key in keys:
        if not key.endswith(_COUNTER):
            first, second, _ = key.split(".", 2)
            counts[first if first == "rpn" else f"{first}.{second}"] += 1
    return ", ".join(f"{count} tensors of {part}" for part, count in sorted(counts.items()))
