"""What a run shows of its results: AP of each class, and pictures of predictions."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate

from ..data.scenes import Scenes, write_pictures
from ..data.worst_images import write_worst_images
from .folder import PREDICTIONS, WORST_IMAGES

logger = logging.getLogger(__name__)

_PREFIX = "AP-"
_NAMES = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}
_COLUMNS = 3  # of classes side by side


def class_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """AP of each class and task as a table, worst of the first task first, in columns to be read
    downwards; classes without an object in the set come last. "" where no result is of a class.

    Args:
        results: of one data set, by task: ``{"bbox": {"AP": ..., "AP-person": ...}}``.
    """
    tasks = [t for t, values in results.items() if any(k.startswith(_PREFIX) for k in values)]
    names = dict.fromkeys(k for task in tasks for k in results[task] if k.startswith(_PREFIX))
    if not names:
        return ""
    table = [(name, *(results[task].get(name) for task in tasks)) for name in names]
    lines = [(name, *(math.nan if ap is None else ap for ap in aps)) for name, *aps in table]
    lines.sort(key=lambda line: (math.isnan(line[1]), line[1]))
    cells = [
        [name.removeprefix(_PREFIX), *("-" if math.isnan(ap) else f"{ap:.1f}" for ap in aps)]
        for name, *aps in lines
    ]
    length = -(-len(cells) // _COLUMNS)
    columns = [cells[start : start + length] for start in range(0, len(cells), length)]
    rows = [sum(row, []) for row in zip_longest(*columns, fillvalue=[""] * len(cells[0]))]
    headers = ["class", *(_NAMES.get(task, f"{task} AP") for task in tasks)] * len(columns)
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def write_all_pictures(output: Path, annotations: Path, images: Path, trainer: Any) -> None:
    """Writes pictures of predictions beside annotations into the predictions' folder, for
    TensorBoard too; after an evaluation on its own, which has no trainer, also the images with the
    lowest F1."""
    scenes = Scenes(output / PREDICTIONS, annotations, images)
    pictures = write_pictures(scenes, output / "pictures")
    if trainer is None:
        worst = write_worst_images(scenes, output / WORST_IMAGES)
        if worst:
            logger.info(f"the {len(worst)} images with the lowest F1: {output / WORST_IMAGES}")
        return
    with contextlib.suppress(ImportError):  # whoever writes the curves has said so
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(output)) as events:
            for path in pictures:
                with Image.open(path) as picture:
                    pixels = np.asarray(picture)
                events.add_image(
                    f"predictions/{path.stem}", pixels, trainer.iter, dataformats="HWC"
                )
