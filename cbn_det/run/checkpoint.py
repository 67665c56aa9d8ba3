"""Checkpoints that are either whole or not there, and what a training that goes on from one takes
from it: what norms and optimizer remember; learning rate, momentum and weight decay are those that
the config asks for now."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ..norms import load_memory_state_dict, memory_state_dict, norm_rows, resolve_burn_in
from ..norms.freeze import freeze_layers, frozen_layers
from .errors import ConfigError
from .files import replace_file, write_text

# a resumed training is the same whatever these are
_INDIFFERENT = ("SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE")
# entries of a parameter group that the config decides
_CONFIGURED = ("lr", "initial_lr", "weight_decay", "momentum", "nesterov")
_OF_THIS_MODEL = ("params", "param_names")

# what a file may have or lack and still be the model's: a counter that nothing is computed from,
# and what the config sets
_NOT_NEEDED = re.compile(r"(^|\.)(num_batches_tracked|pixel_mean|pixel_std|cell_anchors\.\d+)$")
_MASK_PREDICTOR = re.compile(r"(^|\.)mask_(head\.)?predictor\.")  # detectron2's, torchvision's


class AtomicSave:
    """Mixin of fvcore's ``Checkpointer``: writes through :func:`replace_file` into a local
    folder."""

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        replace_file(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)


def norm_state(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of a model's norms besides their weights."""
    return {
        "norm_memory": memory_state_dict(model),
        "norms": _norms(model),
        "frozen_norms": frozen_layers(model),
    }


def load_norm_state(
    model: nn.Module, state: Mapping[str, Any], start_iter: int, max_iter: int
) -> str:
    """Restores what :func:`norm_state` returned, all of it or nothing. Norms that remember nothing
    know at least that they are at ``start_iter`` of ``max_iter``.

    Returns:
        Why nothing was restored; empty if all is well.
    """
    before = memory_state_dict(model)
    try:
        if "norm_memory" not in state:
            raise ValueError("it holds no norm memory")
        if state["norms"] != _norms(model):
            raise ValueError("the model has other norms")
        load_memory_state_dict(model, state["norm_memory"])
        freeze_layers(model, state["frozen_norms"], start_iter)
    except ValueError as error:
        load_memory_state_dict(model, before)
        resolve_burn_in(model, max_iter, start_iter)
        return f"{error}: windows of all norms start anew, burn-ins go on"
    return ""


def _norms(model: nn.Module) -> dict[str, str]:
    return {row.name: row.norm for row in norm_rows(model)}


def settings(cfg: CfgNode, seed: int, accumulate: int) -> dict[str, Any]:
    """What a training is set to that a resumed one must be set to as well, for a checkpoint."""
    return {"SEED": seed, "--accumulate": accumulate, **dict(_items(cfg.SOLVER, "SOLVER."))}


def settings_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each of :func:`settings` that had another value when the checkpoint was written.

    Args:
        saved: empty where the checkpoint does not hold them.
    """
    return [
        f"{key} was {saved[key]}, now it is {value}"
        for key, value in now.items()
        if key not in _INDIFFERENT and saved.get(key, value) != value
    ]


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names in the model of an optimizer's parameters, in its order. That depends on the
    config, as parameters are grouped by their weight decay, and on what is frozen."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [known.get(id(p), f"parameter {index}") for index, p in enumerate(parameters)]


def fit_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    saved: Mapping[str, Any],
    saved_names: Sequence[str] | None,
) -> tuple[dict[str, Any], str]:
    """What an optimizer of the config is to load to go on from a checkpoint: what was remembered of
    each parameter, with the learning rate, momentum and weight decay that it has now.

    Args:
        saved: of ``optimizer.state_dict()``.
        saved_names: of :func:`parameter_names`; None: parameters are told by their place.

    Returns:
        A state dict for the optimizer, and what was not to be found; empty if all is well.

    Raises:
        ValueError: parameters can only be told by their place, and the groups are others.
    """
    now, names = optimizer.state_dict(), parameter_names(optimizer, model)
    if saved_names is None:
        sizes = [[len(g["params"]) for g in state["param_groups"]] for state in (saved, now)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the optimizer of the checkpoint has groups of {sizes[0]} parameters, that of the"
                f" config of {sizes[1]}: set MODEL.BACKBONE.FREEZE_AT and the SOLVER.WEIGHT_DECAY"
                " keys as they were"
            )
        saved_names = names
    place = {name: index for index, name in enumerate(saved_names)}
    group_of = {index: group for group in saved["param_groups"] for index in group["params"]}
    missing = [name for name in names if name not in place]
    state = {
        index: saved["state"][place[name]]
        for index, name in enumerate(names)
        if place.get(name) in saved["state"]
    }
    groups = []
    for group in now["param_groups"]:
        known = [place[names[index]] for index in group["params"] if names[index] in place]
        before = group_of[known[0]] if known else {}
        kept = {k: v for k, v in before.items() if k not in (*_CONFIGURED, *_OF_THIS_MODEL)}
        groups.append({**group, **kept})
    fitted = {"state": state, "param_groups": groups}
    if not missing:
        return fitted, ""
    why = f"the optimizer remembers nothing of {len(missing)} parameters, the first {missing[0]}"
    return fitted, why


def _items(node: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def key_of_absent(tensors: Iterable[str]) -> str:
    """The config key that decides whether a model has these tensors, where one decides it of a
    whole head; "" otherwise."""
    return "MODEL.MASK_ON" if any(map(_MASK_PREDICTOR.search, tensors)) else ""


def check_complete(
    where: str,
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    missing: Iterable[str],
    surplus: Iterable[str],
    key_for: Callable[[str, bool], str],
) -> None:
    """Refuses weights that are not the model's to the last tensor.

    Args:
        where: names the file.
        shapes: of each tensor with another shape than the model's: the file's and the model's.
        missing: tensors of the model that are not in the file.
        surplus: tensors of the file that have no place in the model.
        key_for: gives the config key, or section, that most likely differs for a tensor, which is
            of another shape or not; "" if its name does not tell.

    Raises:
        ConfigError: names the file, the first such tensor and the config key to look at.
    """
    missing = [name for name in missing if not _NOT_NEEDED.search(name)]
    surplus = [name for name in surplus if not _NOT_NEEDED.search(name)]
    wrong = [*shapes, *missing, *surplus]
    if not wrong:
        return
    first = wrong[0]
    if first in shapes:
        saved, wanted = shapes[first]
        what = f"{first} is of shape {list(saved)}, the model's is {list(wanted)}"
    else:
        what = f"{first} is not in the {'file' if missing else 'model'}"
    more = f", and {len(wrong) - 1} more tensors do not fit" if len(wrong) > 1 else ""
    key = key_of_absent([*missing, *surplus]) or key_for(first, first in shapes)
    raise ConfigError(
        f"{where} is of another model: {what}{more}. The config must describe the network that was"
        f" trained{f'; look at {key}' if key else ''}"
    )
