"""Reading ahead: training batches that depend on the iteration alone, and test images in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import DataError
from ..run.signals import ignore_interrupts

# What a random number is for: the order of an epoch, or the augmentation of an image.
_ORDER, _AUGMENTATION = 0, 1

Sample = tuple[Tensor, dict[str, Any]]  # image and target, as DetectionDataset gives them


def batches(dataset: Dataset, cfg: CfgNode, start: int = 0) -> Iterator[list[Sample]]:
    """
    Endless training batches of ``SOLVER.IMS_PER_BATCH`` images, each epoch in an order of its own.

    Which images make up batch i and how they are augmented depends on ``SEED`` and i alone: a
    run resumed at i sees what an unbroken one sees, with any number of ``DATALOADER.NUM_WORKERS``.
    The global random numbers of this process are left as they are.

    Args:
        dataset: of :class:`.datasets.DetectionDataset`, or several concatenated; not empty.
        start: how many batches come before the first one; an iteration takes one, or several whose
            gradients it accumulates.

    Raises:
        DataError: an image cannot be read.
    """
    return _load(dataset, _training_keys(len(dataset), cfg, start), cfg)


def in_order(dataset: Dataset, cfg: CfgNode) -> Iterator[Sample]:
    """Each image of the set once, read ahead by ``DATALOADER.NUM_WORKERS`` processes.

    Raises:
        DataError: an image cannot be read.
    """
    keys = [[(index, 0)] for index in range(len(dataset))]
    for (sample,) in _load(dataset, keys, cfg):
        yield sample


def _training_keys(size: int, cfg: CfgNode, start: int) -> Iterator[list[tuple[int, int]]]:
    """For each batch from ``start`` on: index and augmentation seed of each of its images."""

    @lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([cfg.SEED, _ORDER, epoch]).permutation(size)

    def key(position: int) -> tuple[int, int]:
        state = np.random.SeedSequence([cfg.SEED, _AUGMENTATION, position]).generate_state(1)
        return int(order(position // size)[position % size]), int(state[0])

    images = cfg.SOLVER.IMS_PER_BATCH
    for first in count(start * images, images):
        yield [key(position) for position in range(first, first + images)]


@dataclass
class _Seeded(Dataset):
    """A data set whose keys are pairs of index and random seed."""

    dataset: Dataset

    def __getitem__(self, key: tuple[int, int]) -> Sample | DataError:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPU's random numbers too
            torch.random.default_generator.manual_seed(seed)
            try:
                return self.dataset[index]
            except DataError as e:
                return e  # raised in a worker, it would reach the user as that worker's traceback


def _load(
    dataset: Dataset, keys: Iterable[list[tuple[int, int]]], cfg: CfgNode
) -> Iterator[list[Sample]]:
    loader = DataLoader(
        _Seeded(dataset),
        batch_sampler=keys,
        collate_fn=list,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for batch in loader:
        for sample in batch:
            if isinstance(sample, DataError):
                raise sample
        yield batch
