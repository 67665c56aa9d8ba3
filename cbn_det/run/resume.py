"""What a resumed training takes from its checkpoint and what from its config: the optimizer goes on
with what it remembers, at the learning rate, momentum and weight decay that the config asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

# a resumed training is the same whatever these are
_INDIFFERENT = ("SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE")
# entries of a parameter group that the config decides
_CONFIGURED = ("lr", "initial_lr", "weight_decay", "momentum", "nesterov")
_OF_THIS_MODEL = ("params", "param_names")


def solver_state(cfg: CfgNode) -> dict[str, Any]:
    """The ``SOLVER`` keys with their values, for a checkpoint."""
    return dict(_items(cfg.SOLVER, "SOLVER."))


def solver_changes(saved: Mapping[str, Any], cfg: CfgNode) -> list[str]:
    """A line for each ``SOLVER`` key that has another value than when the checkpoint was written.

    Args:
        saved: of :func:`solver_state`; empty where the checkpoint does not hold it.
    """
    now = solver_state(cfg)
    return [
        f"{key} was {saved[key]}, now it is {now[key]}"
        for key in now
        if key in saved and key not in _INDIFFERENT and saved[key] != now[key]
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
