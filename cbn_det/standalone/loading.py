"""Training batches that depend on the iteration alone, and test images in order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import Dataset

from ..run.loading import Key, read_ahead

# What a random number is for: the order of an epoch, or the augmentation of an image.
_ORDER, _AUGMENTATION = 0, 1

Sample = tuple[Tensor, dict[str, Any]]  # image and target, as DetectionDataset gives them


def batches(dataset: Dataset, cfg: CfgNode, start: int = 0) -> Iterator[list[Sample]]:
    """Endless training batches of ``SOLVER.IMS_PER_BATCH`` images, each epoch in an order of its
    own. Which images make up batch i and how they are augmented depends on ``SEED`` and i alone.

    Args:
        dataset: of :class:`.datasets.DetectionDataset`, or several concatenated; not empty.
        start: how many batches come before the first one.

    Raises:
        DataError: an image cannot be read.
    """
    keys, entropy = _training_keys(len(dataset), cfg, start), [cfg.SEED, _AUGMENTATION]
    return read_ahead(dataset.__getitem__, entropy, keys, cfg.DATALOADER.NUM_WORKERS)


def in_order(dataset: Dataset, cfg: CfgNode) -> Iterator[Sample]:
    """Each image of the set once, read ahead by ``DATALOADER.NUM_WORKERS`` processes.

    Raises:
        DataError: an image cannot be read.
    """
    keys = [[(index, 0)] for index in range(len(dataset))]
    for (sample,) in read_ahead(dataset.__getitem__, [], keys, cfg.DATALOADER.NUM_WORKERS):
        yield sample


def _training_keys(size: int, cfg: CfgNode, start: int) -> Iterator[list[Key]]:
    @lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([cfg.SEED, _ORDER, epoch]).permutation(size)

    images = cfg.SOLVER.IMS_PER_BATCH
    for first in count(start * images, images):
        positions = range(first, first + images)
        yield [(int(order(p // size)[p % size]), p) for p in positions]
