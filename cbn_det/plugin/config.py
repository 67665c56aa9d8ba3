"""From the command line to a detectron2 config that this machine can run, or one clear error."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from ..run.command_line import check_run, merge
from ..run.errors import ConfigError
from .registry import check_config_norms, norm_keys, register

#: SOLVER.CLIP_GRADIENTS.CLIP_TYPE that detectron2 has in its projects only
FULL_MODEL = "full_model"
# of each gradient's elements, of each gradient, and of all gradients together
_CLIP_TYPES = ("value", "norm", FULL_MODEL)
_SCALED = ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS")
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
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, processes are {world_size}: scaled to "
            + ", ".join(f"{key} {scaled.SOLVER[key]}" for key in _SCALED)
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


def scale_schedule(cfg: CfgNode, world_size: int, accumulate: int = 1) -> CfgNode:
    """Fits a config with ``SOLVER.REFERENCE_WORLD_SIZE`` to the GPUs that there are.

    Images per GPU stay, ``IMS_PER_BATCH // REFERENCE_WORLD_SIZE``; the learning rate goes with the
    images of an optimiser step, iterations, steps and periods against them, as in detectron2's
    ``DefaultTrainer.auto_scale_workers``. Two things differ from that:

    - Warm-up gets no shorter than the config's. detectron2 would warm up to LR 0.16 in 125
      iterations where 1000 lead to 0.02; its own configs of 64 and 128 images keep the 1000.
    - Mini-batches that one process accumulates count like those of as many processes. Such a config
      says ``REFERENCE_WORLD_SIZE 0`` afterwards, as detectron2 has no key for the difference.

    A norm's burn-in that is a fraction of ``SOLVER.MAX_ITER`` follows; one in iterations does not.

    Args:
        world_size: processes of all machines.
        accumulate: mini-batches of an optimiser step, in each process.

    Returns:
        A new config; the same where ``REFERENCE_WORLD_SIZE`` is 0 or nothing has to change. Scaling
        it once more changes nothing.
    """
    if not cfg.SOLVER.REFERENCE_WORLD_SIZE:
        return cfg
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size * accumulate)
    if scaled is cfg and accumulate == 1:
        return cfg
    scaled = scaled.clone()
    scaled.defrost()
    solver = scaled.SOLVER
    solver.WARMUP_ITERS = max(solver.WARMUP_ITERS, cfg.SOLVER.WARMUP_ITERS)
    if accumulate > 1:
        solver.IMS_PER_BATCH //= accumulate
        solver.REFERENCE_WORLD_SIZE = 0
    if cfg.is_frozen():
        scaled.freeze()
    return scaled


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
