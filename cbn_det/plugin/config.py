"""From the command line to a detectron2 config that this machine can run, or one clear error."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg

from ..run.command_line import check_run, merge
from ..run.errors import ConfigError
from .optimizer import FULL_MODEL
from .registry import check_config_norms, norm_keys, register
from .scaling import describe_schedule, scale_schedule

# of each gradient's elements, of each gradient, and of all gradients together
_CLIP_TYPES = ("value", "norm", FULL_MODEL)
_SYNC_NORMS = ("SyncBN", "nnSyncBN")
# the one synchronised norm that runs on CPU and survives zero RoIs
_CPU_SYNC_NORM = "naiveSyncBN_N"


def build_config(args: argparse.Namespace, world_size: int) -> tuple[CfgNode, list[str]]:
    """Reads, adapts and checks the config of a run.

    Returns:
        The frozen config, with the batch scaled to ``world_size`` where the config asks for it, and
        one line for everything that was replaced because this machine lacks it.

    Raises:
        ValueError: a file, key or value that cannot be run.
    """
    cfg = read_config(args.config_file, args.opts)
    notes = check_run(cfg, args)
    notes += _replace_sync_norms(cfg, world_size)
    register()
    check_config_norms(cfg)
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not divisible by"
            f" SOLVER.REFERENCE_WORLD_SIZE {reference}"
        )
    scaled = scale_schedule(cfg, world_size, args.accumulate)
    if scaled is not cfg:
        notes.append(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, processes are {world_size}: scaled to"
            f" {describe_schedule(scaled)}"
        )
    cfg = scaled
    _check(cfg, world_size)
    cfg.freeze()
    return cfg, notes


def read_config(file: str, opts: Sequence[str]) -> CfgNode:
    """detectron2's defaults, with a YAML config and KEY VALUE words over them.

    Raises:
        ConfigError: a file, key or value that detectron2 does not take.
    """
    if file.endswith(".py"):
        raise ConfigError(
            f"--config-file {file}: a LazyConfig is for tools/lazyconfig_train_net.py; detectron2's"
            " own takes it too if the file calls cbn_det.register()"
        )
    cfg = get_cfg()
    merge(cfg, file, opts, lambda: cfg.merge_from_file(file), remote=True)
    return cfg


def _check(cfg: CfgNode, world_size: int) -> None:
    if cfg.SOLVER.IMS_PER_BATCH % world_size or cfg.SOLVER.IMS_PER_BATCH < world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is the total batch: {cfg.SOLVER.IMS_PER_BATCH} cannot be shared"
            f" equally by {world_size} processes"
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError(
            "SOLVER.AMP.ENABLED needs a GPU: set it to False, or MODEL.DEVICE to cuda"
        )
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in _CLIP_TYPES:
        raise ConfigError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip.CLIP_TYPE!r}: expected {', '.join(_CLIP_TYPES)}"
        )


def _replace_sync_norms(cfg: CfgNode, world_size: int) -> list[str]:
    if world_size == 1 or cfg.MODEL.DEVICE != "cpu":
        return []  # one CPU process: nn.SyncBatchNorm computes what BatchNorm computes
    notes = []
    for key, norm in list(norm_keys(cfg)):
        if norm in _SYNC_NORMS:
            notes.append(
                f"{key}: {norm} does not run in several CPU processes, replaced by {_CPU_SYNC_NORM}"
            )
            cfg.merge_from_list([key, _CPU_SYNC_NORM])
    return notes
