"""What concerns all norms of a model together: burn-in, ranks, memory, the table of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import SmallBatchNorm2d, unchanged
from .binding import ConvBound
from .remembering import RememberingNorm2d
from .sites import some
from .spec import name_of, shown_options


def _remembering(model: nn.Module) -> dict[str, RememberingNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, RememberingNorm2d)}


def resolve_burn_in(model: nn.Module, max_iter: int, start_iter: int | None = None) -> None:
    """Tells every layer where in the schedule it is.

    Args:
        model: any.
        max_iter: optimiser steps of the schedule that a burn-in or ramp is a fraction of.
        start_iter: optimiser steps taken before, where training resumes without what the norms
            remembered (:func:`load_memory_state_dict`): a burn-in is then not done again.
    """
    for layer in _remembering(model).values():
        layer.resolve_burn_in(max_iter)
        if start_iter is not None:
            layer.place(start_iter)


def check_bindings(model: nn.Module) -> None:
    """Refuses a model in which a norm that needs its convolution is bound to none.

    Raises:
        ValueError: names the layers and the remedy.
    """
    bound = [(n, m) for n, m in model.named_modules() if isinstance(m, ConvBound) and m.training]
    unbound = [n for n, m in bound if m.needs_conv and m.conv is None]
    if unbound:
        layer = model.get_submodule(unbound[0])
        raise ValueError(
            f"{len(unbound)} {name_of(type(layer))} layers are fed by no nn.Conv2d:"
            f" {some(unbound)} (deformable, transposed and Trident convolutions are none). Use"
            f' NORM: "{layer.without_conv}" there, or another norm.'
        )


@torch.no_grad()
def sync_running_stats(model: nn.Module) -> None:
    """Pools the running statistics of all ranks, in place: the mean of the variances plus the
    variance of the means.

    Neither our norms nor torch's BatchNorm communicate in forward, so ranks' statistics drift apart
    until this runs: before every evaluation and checkpoint, on every rank. Ranks whose layer has
    seen no data (a mask head without a RoI) do not count; BatchNorms in evaluation mode and layers
    that ``freeze`` has fixed are left as they are. Does nothing without an initialised process
    group.

    A DistributedDataParallel with ``broadcast_buffers=True``, torch's default, gives all ranks rank
    0's before every forward: what is pooled is then of rank 0's images and each rank's last ones
    (MBN's are each rank's own). Training is the same either way, but for BRN.
    """
    layers = [m for m in model.modules() if _gathers_statistics(m)]
    if not layers or not dist.is_available() or not dist.is_initialized():
        return
    if dist.get_world_size() == 1:
        return
    seen = torch.cat([(m.num_batches_tracked > 0).expand(m.num_features).float() for m in layers])
    mean = torch.cat([m.running_mean.float() for m in layers])
    var = torch.cat([m.running_var.float() for m in layers])
    first = torch.stack([seen, seen * mean])
    dist.all_reduce(first)
    ranks = first[0].clamp(min=1.0)
    pooled_mean = first[1] / ranks
    pooled_var = seen * (var + (mean - pooled_mean).square())
    dist.all_reduce(pooled_var)
    pooled_var = pooled_var / ranks
    pooled_mean = torch.where(first[0] > 0, pooled_mean, mean)
    pooled_var = torch.where(first[0] > 0, pooled_var, var)
    sizes = [m.num_features for m in layers]
    for layer, mu, sigma2 in zip(
        layers, pooled_mean.split(sizes), pooled_var.split(sizes), strict=True
    ):
        layer.running_mean.copy_(mu)
        layer.running_var.copy_(sigma2)


def _gathers_statistics(module: nn.Module) -> bool:
    if isinstance(module, SmallBatchNorm2d):
        return not module.frozen
    return isinstance(module, _BatchNorm) and module.training and module.running_mean is not None


def settle(model: nn.Module) -> None:
    """Takes the finished iteration into memory and running statistics, as the next training forward
    would do first, and does where the weight that this needs is sharded until then."""
    for layer in _remembering(model).values():
        layer.settle()


@contextmanager
def reading_memory(model: nn.Module) -> Iterator[None]:
    """Within it, forwards in training mode normalise as the next iteration's would, with what is
    remembered, and leave the norms as they are: for measurements, under ``torch.no_grad()``."""
    settle(model)
    with unchanged([m for m in model.modules() if isinstance(m, SmallBatchNorm2d)]):
        yield


def memory_state_dict(model: nn.Module) -> dict[str, Any]:
    """What the norms of a model remember between iterations (windows, step counts): plain tensors,
    numbers and dicts, for a checkpoint. ``state_dict()`` stays BatchNorm's."""
    return {name: layer.memory_state_dict() for name, layer in _remembering(model).items()}


def load_memory_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Restores what :func:`memory_state_dict` returned for the same model.

    Raises:
        ValueError: the layers are not the same; names the first that differs.
    """
    layers = _remembering(model)
    different = sorted(layers.keys() ^ state.keys())
    if different:
        raise ValueError(
            f"the saved norm memory is another model's: {len(different)} layers differ, first"
            f" {different[0]}"
        )
    for name, layer in layers.items():
        try:
            layer.load_memory_state_dict(state[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def norm_diagnostics(model: nn.Module) -> dict[str, float]:
    """What the norms report of their latest forward, each value (``layer.diagnostics`` of CBN, BRN,
    MBN, KN and GKN says which) as ``{"norm/clamped": ...}``, its average over layers, and
    ``"norm/clamped_worst"``, the largest. Empty before burn-in ends.
    """
    values: dict[str, list[torch.Tensor]] = {}
    for layer in model.modules():
        ours = name_of(type(layer)) is not None and not getattr(layer, "frozen", False)
        for key, value in (getattr(layer, "diagnostics", {}) if ours else {}).items():
            values.setdefault(f"norm/{key}", []).append(value)
    summary = {}
    for key, of_layers in values.items():
        stacked = torch.stack(of_layers)
        summary[key] = float(stacked.mean())
        summary[f"{key}_worst"] = float(stacked.max())
    return summary


_CONFIG_NAMES = {
    "BatchNorm2d": "BN",
    "SyncBatchNorm": "SyncBN",
    "NaiveSyncBatchNorm": "naiveSyncBN",
    "FrozenBatchNorm2d": "FrozenBN",
    "GroupNorm": "GN",
    "LayerNorm": "LN",
}


@dataclass(frozen=True)
class NormRow:
    """One norm layer of a model.

    Attributes:
        name: of the layer in the model.
        norm: as a config names it where it has a name there, else the class.
        options: of a layer of ours (:func:`~.spec.shown_options`).
        channels: of its input.
        conv: name of the convolution it is bound to, "" if none.
        trainable: whether it has a parameter that is trained, or statistics that move.
    """

    name: str
    norm: str
    options: str
    channels: int
    conv: str
    trainable: bool

    @property
    def kind(self) -> str:
        return f"{self.norm}({self.options})" if self.options else self.norm


def norm_rows(model: nn.Module) -> list[NormRow]:
    """Every norm layer of a model, torch's and detectron2's included."""
    names = {id(module): name for name, module in model.named_modules()}
    rows = []
    for name, module in model.named_modules():
        cls = type(module).__name__
        registered = name_of(type(module))
        if not (registered or "Norm" in cls) or list(module.children()):
            continue
        conv = getattr(module, "conv", None) if registered else None
        rows.append(
            NormRow(
                name=name,
                norm=registered or _CONFIG_NAMES.get(cls, cls),
                options=shown_options(module) if hasattr(module, "options") else "",
                channels=getattr(module, "num_features", getattr(module, "num_channels", 0)),
                conv="" if conv is None else names.get(id(conv), "(outside this model)"),
                trainable=any(p.requires_grad for p in module.parameters())
                or (isinstance(module, nn.BatchNorm2d) and module.training),
            )
        )
    return rows


def format_norm_table(rows: list[NormRow]) -> str:
    """The rows as text: a line of totals for each kind, marked with a letter, then every layer."""
    if not rows:
        return "norms: none"
    kinds: dict[str, list[NormRow]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    letters = {kind: chr(ord("a") + i % 26) * (1 + i // 26) for i, kind in enumerate(kinds)}
    lines = ["norms:"]
    for kind, group in kinds.items():
        frozen = sum(not row.trainable for row in group)
        total = f"{len(group)} layer{'s' * (len(group) > 1)}"
        lines.append(f"  [{letters[kind]}] {total}{f', {frozen} frozen' if frozen else ''}: {kind}")
    width = max(len(row.name) for row in rows)
    for row in rows:
        state = "trainable" if row.trainable else "frozen"
        # a convolution that owns its norm needs no mention
        conv = f"  of {row.conv}" if row.conv and row.name != f"{row.conv}.norm" else ""
        kind = f"[{letters[row.kind]}] {row.norm}"
        lines.append(f"  {row.name:<{width}}  {kind}  {row.channels:>5}  {state}{conv}")
    return "\n".join(lines)
