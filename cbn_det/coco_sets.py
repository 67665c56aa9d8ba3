"""What ``--coco-dataset NAME ANNOTATIONS IMAGES`` names, checked before anything is prepared."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .run.errors import ConfigError


def check_coco_sets(
    named: Sequence[Sequence[str]], train: Sequence[str], test: Sequence[str]
) -> None:
    """Refuses data sets that are not there, and those that nothing would read: the config's own
    would be trained on in their place.

    Args:
        named: ``(name, annotations, images)`` of each.
        train, test: ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Raises:
        ConfigError: names the set, and the file or what to add to the command line.
    """
    for name, json_file, images in named:
        if not os.path.isfile(json_file):
            raise ConfigError(f"--coco-dataset {name}: there is no annotation file '{json_file}'")
        if not os.path.isdir(images):
            raise ConfigError(f"--coco-dataset {name}: there is no image folder '{images}'")
    unused = [name for name, *_ in named if name not in (*train, *test)]
    if not unused:
        return
    if len(unused) == 2 == len(named):
        remedy = f"{_words('TRAIN', unused[0])} {_words('TEST', unused[1])}"
    else:
        remedy = f"{_words('TRAIN', unused[0])} or {_words('TEST', unused[0])}"
    raise ConfigError(
        f"--coco-dataset {', '.join(unused)}: neither in DATASETS.TRAIN {tuple(train)} nor in"
        f" DATASETS.TEST {tuple(test)}, so nothing would read it. Add {remedy}, or leave it out"
    )


def _words(key: str, name: str) -> str:
    return f"""DATASETS.{key} "('{name}',)\""""
