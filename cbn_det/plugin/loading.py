"""Training batches that depend on ``SEED`` and the iteration alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Sampler

from ..data import DataError
from ..run.loading import Key, read_ahead, seed_random

# What a random number is for: the augmentation of an image, or a training step.
_AUGMENTATION, _STEP = 1, 2
_TRIES = 1000  # images, where the mapper refuses one
# whose order depends on SEED alone; detectron2's others draw a seed of their own
_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


class ResumableLoader:
    """Endless training batches of one rank, the same in a resumed run as in an unbroken one.

    The order of the images is the sampler's. Its beginning is replayed up to the batch to start
    with, and so is the grouping by aspect ratio: from the images' sizes, without reading any, about
    a second for a million images. See :func:`~cbn_det.run.loading.read_ahead` for the rest.

    Args:
        records: detectron2's dicts of the images; not empty.
        mapper: makes a training sample of a record; where it returns None, another image is taken.
        sampler: gives this rank's indices of images without an end, the same ones every time.
        grouped: whether a batch holds either wide images only, or none; records need ``width`` and
            ``height``.

    Attributes:
        start: how many batches of this order come before the first one.
        seed: of augmentation, at least 0.
    """

    start = 0
    seed = 0

    def __init__(
        self,
        records: list[dict[str, Any]],
        mapper: Any,
        sampler: Sampler,
        images_per_gpu: int,
        grouped: bool,
        workers: int,
    ) -> None:
        self._wide = [r["width"] > r["height"] for r in records] if grouped else None
        self._records = DatasetFromList(records, copy=False)
        self._mapper = PicklableWrapper(mapper)
        self._sampler = sampler
        self._images_per_gpu = images_per_gpu
        self._workers = workers

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        keys = grouped_keys(
            self._sampler,
            self._wide,
            self._images_per_gpu,
            comm.get_rank(),
            comm.get_world_size(),
        )
        entropy = [self.seed, _AUGMENTATION, 0]
        return read_ahead(self._sample, entropy, islice(keys, self.start, None), self._workers)

    def _sample(self, index: int) -> dict[str, Any]:
        for _ in range(_TRIES):
            sample = self._mapper(self._records[index])
            if sample is not None:
                return sample
            index = random.randrange(len(self._records))
        raise DataError(f"DATASETS.TRAIN: the mapper refused {_TRIES} images in a row")


def build_loader(cfg: CfgNode, mapper: Any = None) -> Any:
    """The training loader of a config: a :class:`ResumableLoader`, or detectron2's own where
    :func:`why_not_resumable` gives a reason.

    Args:
        mapper: makes a training sample of a record; detectron2's ``DatasetMapper`` by default.
    """
    parts = build_detection_train_loader.from_config(cfg, mapper=mapper)
    why_not = why_not_resumable(cfg, parts["dataset"])
    if why_not:
        log_first_n(
            logging.WARNING,
            f"{why_not}: a resumed run sees its images in another order",
            key="message",
        )
        return build_detection_train_loader(**parts)
    images_per_gpu, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
    if rest or not images_per_gpu:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH: {cfg.SOLVER.IMS_PER_BATCH} images cannot be shared by"
            f" {comm.get_world_size()} processes"
        )
    return ResumableLoader(
        parts["dataset"],
        parts["mapper"],
        parts["sampler"],
        images_per_gpu,
        cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        cfg.DATALOADER.NUM_WORKERS,
    )


def place(loader: Any, seed: int, start: int = 0) -> None:
    """Lets a :class:`ResumableLoader` begin with a later batch. Others begin where they do."""
    if isinstance(loader, ResumableLoader):
        loader.seed, loader.start = seed, start


def why_not_resumable(cfg: CfgNode, records: Any) -> str | None:
    """Why the images of a resumed run differ from those of an unbroken one; None if they do not."""
    if cfg.DATALOADER.SAMPLER_TRAIN not in _SAMPLERS:
        return f"DATALOADER.SAMPLER_TRAIN: {cfg.DATALOADER.SAMPLER_TRAIN} cannot go on where it was"
    if not isinstance(records, list):
        return "DATASETS.TRAIN: a data set that is no list of dicts"
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING and not all(
        "width" in record and "height" in record for record in records
    ):
        return "DATALOADER.ASPECT_RATIO_GROUPING: images without width and height in DATASETS.TRAIN"
    return None


def grouped_keys(
    order: Iterator[int], wide: Sequence[bool] | None, size: int, rank: int, ranks: int
) -> Iterator[list[Key]]:
    """The batches of one rank, from the first iteration on.

    Args:
        order: indices of the images that this rank takes, endless.
        wide: of each image, whether it is wider than high; None takes them as they come.
        size: images in a batch.

    Yields:
        a batch: as soon as ``size`` images of one shape have come.
    """
    waiting: dict[bool, list[Key]] = {False: [], True: []}
    for turn, index in enumerate(order):
        shape = wide is not None and wide[index]
        waiting[shape].append((index, turn * ranks + rank))
        if len(waiting[shape]) == size:
            yield waiting[shape]
            waiting[shape] = []


def seed_step(seed: int, rank: int, iteration: int) -> None:
    """Sets torch's, numpy's and Python's random numbers for a training step."""
    seed_random([seed, _STEP, rank, iteration])
