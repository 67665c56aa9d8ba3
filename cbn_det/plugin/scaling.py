"""A config's schedule on another number of GPUs than it was written for."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer


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


def describe_schedule(cfg: CfgNode) -> str:
    """``"IMS_PER_BATCH 16, BASE_LR 0.02, MAX_ITER 90000, STEPS (60000, 80000), WARMUP_ITERS
    1000"``."""
    keys = ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS")
    return ", ".join(f"{key} {cfg.SOLVER[key]}" for key in keys)
