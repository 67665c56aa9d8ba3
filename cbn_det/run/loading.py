"""Training images that depend on the seed and their position in the order alone: what a resumed run
sees is what an unbroken one sees, with any number of processes that read ahead."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data import DataError
from .signals import ignore_interrupts

Key = tuple[int, int]  # index of an image, and its position in the order of all ranks together


def seed_random(
    entropy: Sequence[int], seed_torch: Callable[[int], Any] = torch.manual_seed
) -> None:
    """Sets torch's, numpy's and Python's random numbers."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(entropy).generate_state(3)
    seed_torch(int(for_torch))
    np.random.seed(for_numpy)
    random.seed(int(for_python))


@contextmanager
def _seeded(entropy: Sequence[int]) -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # torch.manual_seed would seed the GPU's random numbers too
    seed_random(entropy, torch.random.default_generator.manual_seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def read_ahead(
    sample: Callable[[int], Any], entropy: Sequence[int], keys: Iterable[list[Key]], workers: int
) -> Iterator[list[Any]]:
    """Reads batches. The global random numbers of this process are left as they are.

    Args:
        sample: reads an image and augments it, with torch's, numpy's or Python's random numbers.
        entropy: what they are seeded with, with the position of the image behind it.
        keys: of each batch.
        workers: processes that read; 0: this one.

    Raises:
        DataError: an image cannot be read.
    """
    loader = DataLoader(
        _Samples(sample, entropy),
        batch_sampler=keys,
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for batch in loader:
        for found in batch:
            if isinstance(found, DataError):
                raise found
        yield batch


class _Samples(Dataset):
    def __init__(self, sample: Callable[[int], Any], entropy: Sequence[int]) -> None:
        self._sample, self._entropy = sample, entropy

    def __getitem__(self, key: Key) -> Any:
        index, position = key
        with _seeded([*self._entropy, position]):
            try:
                return self._sample(index)
            except DataError as error:
                return error  # raised in a worker, it would reach the user as its traceback
